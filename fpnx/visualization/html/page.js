
"use strict";
(() => {
  const NOT_FINITE = 65535, ALL_ZERO = 255, NOT_FINITE_COLOUR = [150, 150, 150], THUMBNAIL_WIDTH = 92, THUMBNAIL_HEIGHT = 128;
  const byId = id => document.getElementById(id);
  const createElement = (tag, attributes = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), attributes);
    element.append(...children);
    return element;
  };
  const decodeBase64 = text => {
    const characters = atob(text), bytes = new Uint8Array(characters.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
    return bytes;
  };
  const { namespaceURI } = createElement("template", { innerHTML: "<svg></svg>" }).content.firstChild;
  const createShape = (tag, attributes) => {
    const element = document.createElementNS(namespaceURI, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const readoutHint = byId("readout").textContent;
  const index = JSON.parse(byId("index").textContent);
  const colours = decodeBase64(index.colours);
  const state = {
    image: 0, mode: index.mode, level: "", scale: index.perImage ? "image" : "file", overlay: index.overlay,
    zoom: 272, point: null, score: index.boxes?.score ?? 0, hidden: new Set(),
  };
  const images = [];
  let panels = [];
  let lastRead = null;  // the panel and position that the readout describes

  // Data -------------------------------------------------------------------------------------------------------------
  const imageAt = position => images[position] ??= JSON.parse(byId(`image-${position}`).textContent);

  // Values of a map by mode, decoded once: Float64Array of height × width, NaN where a value is not finite.
  const valuesOf = (map, mode) => {
    const encoded = map[mode];
    if (encoded.decoded) return encoded.decoded;
    const raw = decodeBase64(encoded.values), view = new DataView(raw.buffer);
    const step = (encoded.high - encoded.low) / (NOT_FINITE - 1);
    const decoded = new Float64Array(raw.length / 2);
    for (let i = 0; i < decoded.length; i++) {
      const stored = view.getUint16(2 * i, true);
      decoded[i] = stored === NOT_FINITE ? NaN : encoded.low + stored * step;
    }
    return encoded.decoded = decoded;
  };

  const cellAt = (map, point) => ({
    y: Math.min(map.height - 1, Math.floor(point.y / map.reach[0] * map.height)),
    x: Math.min(map.width - 1, Math.floor(point.x / map.reach[1] * map.width)),
  });

  // Coordinates of a map's cells in `count` directions, decoded once from Rice's code: Int8Array of count × cells, and
  // the length of each cell.
  const directionsOf = (map, count) => {
    if (map.vectors) return map.vectors;
    const bytes = decodeBase64(map.directions), cells = map.height * map.width;
    const values = new Int8Array(count * cells), squares = new Float64Array(cells);
    let position = 0;  // in bits
    const next = () => {  // at least 25 bits from `position`, as the highest bits of 32
      const at = position >>> 3;
      return (bytes[at] << 24 | bytes[at + 1] << 16 | bytes[at + 2] << 8 | bytes[at + 3]) << (position & 7);
    };
    for (let k = 0; k < count; k++) {
      const low = bytes[position >>> 3];
      position += 8;
      if (low === ALL_ZERO) continue;
      for (let i = 0; i < cells; i++) {
        let unsigned = 0, zeros;
        while ((zeros = Math.clz32(next())) > 24) {
          unsigned += 25;
          position += 25;
        }
        unsigned += zeros;
        position += zeros + 1;
        if (low) unsigned = unsigned << low | next() >>> (32 - low);
        position += low;
        const value = unsigned >> 1 ^ -(unsigned & 1);
        values[k * cells + i] = value;
        squares[i] += value * value;
      }
      position = (position + 7 | 7) - 7;  // the next whole byte
    }
    map.directions = "";
    return map.vectors = { values, lengths: squares.map(Math.sqrt) };
  };

  // Cosine of every cell with the one at `point`, from coordinates in `count` directions.
  const similarity = (map, point, count) => {
    const { values, lengths } = directionsOf(map, count), cells = map.height * map.width;
    const { y, x } = cellAt(map, point), reference = y * map.width + x;
    const products = new Float64Array(cells);
    for (let k = 0; k < count; k++) {
      const start = k * cells, factor = values[start + reference];
      if (factor) for (let i = 0; i < cells; i++) products[i] += factor * values[start + i];
    }
    return products.map((product, i) => {
      const length = lengths[reference] * lengths[i];
      return length ? Math.min(1, Math.max(-1, product / length)) : NaN;
    });
  };

  // What a map shows in a mode: values with their range, or colours.
  const displayedData = (map, facts, mode) => {
    if (mode === "pca") return { colours: map.colours ??= decodeBase64(map.pca) };
    if (mode === "similarity") {
      const cosines = similarity(map, state.point, facts.channels);
      return { values: cosines, low: cosines.reduce((a, b) => (b < a ? b : a), 1), high: 1 };
    }
    const [low, high] = state.scale === "image" ? [map[mode].low, map[mode].high] : facts.ranges[mode];
    return { values: valuesOf(map, mode), low, high };
  };

  const paint = (canvas, map, data) => {
    canvas.width = map.width;
    canvas.height = map.height;
    const context = canvas.getContext("2d"), pixels = context.createImageData(map.width, map.height);
    const span = data.high > data.low ? data.high - data.low : 0;
    for (let i = 0; i < map.width * map.height; i++) {
      let colour = NOT_FINITE_COLOUR;
      if (data.colours) colour = data.colours.subarray(3 * i, 3 * i + 3);
      else if (!Number.isNaN(data.values[i])) {
        const share = span ? Math.min(1, Math.max(0, (data.values[i] - data.low) / span)) : 0;
        const entry = 3 * Math.round(255 * share);
        colour = colours.subarray(entry, entry + 3);
      }
      pixels.data.set(colour, 4 * i);
      pixels.data[4 * i + 3] = 255;
    }
    context.putImageData(pixels, 0, 0);
  };

  const formatNumber = value => {
    if (value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5))
      return Math.abs(value) >= 1000 ? value.toFixed(0) : String(Number(value.toPrecision(3)));
    return value.toExponential(2).replace("e+", "e");
  };

  // Thumbnails -------------------------------------------------------------------------------------------------------
  const thumbnailLevel = file => state.level && file.maps[state.level] ? state.level : Object.keys(file.maps)[0];

  const drawThumbnail = (button, position) => {
    const image = imageAt(position), fileIndex = image.files.findIndex(file => file.maps);
    const pair = button.querySelector(".pair");
    const scale = Math.min(THUMBNAIL_WIDTH / image.size[1], THUMBNAIL_HEIGHT / image.size[0]);
    const [height, width] = image.size.map(side => `${Math.max(side * scale, 8)}px`);
    for (const child of pair.children) Object.assign(child.style, { height, width });
    const photo = pair.querySelector("img");
    if (image.photo && !photo.src) photo.src = image.photo;
    photo.hidden = !image.photo;
    button.querySelector(".name").textContent = image.name;
    if (fileIndex < 0) return;
    const level = thumbnailLevel(image.files[fileIndex]), map = image.files[fileIndex].maps[level];
    const mode = state.mode === "similarity" ? "energy" : state.mode;
    const facts = index.files[fileIndex].levels[level];
    paint(pair.querySelector("canvas"), map, displayedData(map, facts, mode));
  };

  const visible = new Set();
  const observer = new IntersectionObserver(entries => {
    for (const entry of entries) {
      if (!entry.isIntersecting) visible.delete(entry.target);
      else {
        visible.add(entry.target);
        drawThumbnail(entry.target, Number(entry.target.dataset.position));
      }
    }
  }, { root: byId("list"), rootMargin: "300px" });

  const listImages = () => {
    for (let position = 0; position < index.images; position++) {
      const photo = createElement("img", { alt: "" });
      const pair = createElement("span", { className: "pair" }, photo, createElement("canvas"));
      const button = createElement("button", { type: "button" }, pair, createElement("span", { className: "name" }));
      button.dataset.position = position;
      button.addEventListener("click", () => selectImage(position));
      byId("list").append(button);
      observer.observe(button);
    }
  };

  // The selected image -----------------------------------------------------------------------------------------------
  const selectImage = position => {
    state.image = Math.min(Math.max(position, 0), index.images - 1);
    for (const button of byId("list").children)
      button.setAttribute("aria-current", String(Number(button.dataset.position) === state.image));
    byId("list").children[state.image].scrollIntoView({ block: "nearest" });
    buildPanels();
  };

  const createView = image => {
    const view = createElement("div", { className: "view" });
    if (image.photo) view.append(createElement("img", { src: image.photo, alt: "" }));
    return view;
  };

  const createBoxes = view => {
    const boxes = createShape("svg", { class: "boxes" });
    if (index.boxes) view.append(boxes);
    return boxes;
  };

  const createPanel = (image, fileIndex, level) => {
    const map = image.files[fileIndex].maps[level], facts = index.files[fileIndex].levels[level];
    const view = createView(image), canvas = createElement("canvas");
    const cell = createElement("div", { className: "cell", hidden: true });
    const point = createElement("div", { className: "point", hidden: true });
    view.append(canvas);
    const boxes = createBoxes(view);
    view.append(cell, point);
    const bar = createElement("canvas", { className: "bar", width: 256, height: 1 });
    const ends = createElement("div", { className: "ends" });
    const detail = createElement("small");
    const name = createElement("b", { textContent: level });
    const caption = createElement("figcaption", {}, name, `${map.height}×${map.width}`, detail);
    const panel = { map, facts, level, view, canvas, boxes, cell, point, bar, ends, detail };
    view.addEventListener("pointermove", event => showCell(panel, event));
    view.addEventListener("pointerleave", () => showCell(null));
    view.addEventListener("click", event => {
      state.point = positionIn(view, event);
      lastRead = { panel, position: state.point };
      state.mode = "similarity";
      refresh();
    });
    panels.push(panel);
    return createElement("figure", {}, caption, view, bar, ends);
  };

  const buildPanels = () => {
    const image = imageAt(state.image), main = byId("main");
    panels = [];
    lastRead = null;
    main.replaceChildren(createElement("h2", { textContent: image.name }));
    const note = text => main.append(createElement("p", { className: "note", textContent: text }));
    if (image.remark) note(image.remark);
    image.files.forEach((file, fileIndex) => {
      const facts = index.files[fileIndex];
      const title = facts.name && index.files.length > 1 ? `${facts.name} · ${facts.about}` : facts.about;
      main.append(createElement("p", { className: "model", textContent: title }));
      if (file.missing) return note(file.missing);
      const names = Object.keys(file.maps).filter(level => !state.level || level === state.level);
      let first = true;
      for (const kind of ["C", "P"]) {
        const levels = names.filter(level => level[0] === kind);
        if (!levels.length) continue;
        const row = createElement("div", { className: first ? "row" : "row continued" });
        const repeated = !first;
        first = false;
        const view = createView(image);
        if (!image.photo) view.append(createElement("div", { className: "text", textContent: image.remark }));
        const name = createElement("b", { textContent: "source" });
        const detail = createElement("small", { textContent: `model input ${file.seen.join("×")}` });
        const caption = createElement("figcaption", {}, name, image.size.join("×"), detail);
        view.classList.add("source");
        const panel = { view, source: true, repeated, boxes: createBoxes(view), count: createElement("div", { className: "ends" }) };
        if (index.boxes) {
          view.addEventListener("pointermove", event => showCell(panel, event));
          view.addEventListener("pointerleave", () => showCell(null));
        }
        panels.push(panel);
        row.append(createElement("figure", {}, caption, view, panel.count));
        row.append(...levels.map(level => createPanel(image, fileIndex, level)));
        main.append(row);
      }
    });
    for (const text of index.notes) note(text);
    refresh();
  };

  const resize = () => {
    const image = imageAt(state.image), scale = state.zoom / Math.max(...image.size);
    const [height, width] = image.size.map(side => Math.max(Math.round(side * scale), 24));
    for (const panel of panels) {
      Object.assign(panel.view.style, { width: `${width}px`, height: `${height}px` });
      if (panel.source) continue;
      const { map, canvas, bar, ends } = panel;
      Object.assign(canvas.style, { width: `${map.reach[1] * width}px`, height: `${map.reach[0] * height}px` });
      bar.style.width = ends.style.width = `${Math.max(width, 150)}px`;
    }
    moveReferencePoints();
    drawBoxes();
  };

  const moveToCell = (element, panel, cell) => {
    const { map, view } = panel, width = parseFloat(view.style.width), height = parseFloat(view.style.height);
    const step = [map.reach[0] * height / map.height, map.reach[1] * width / map.width];
    Object.assign(element.style, {
      left: `${cell.x * step[1]}px`, top: `${cell.y * step[0]}px`, width: `${step[1]}px`, height: `${step[0]}px`,
    });
    element.hidden = false;
  };

  const moveReferencePoints = () => {
    for (const panel of panels) {
      if (panel.source) continue;
      panel.point.hidden = true;
      if (state.mode === "similarity") moveToCell(panel.point, panel, cellAt(panel.map, state.point));
    }
  };

  const refresh = () => {
    if (state.mode === "similarity") state.point ??= { x: 0.5, y: 0.5 };
    const maps = panels.filter(panel => !panel.source);
    for (const panel of maps) panel.data = displayedData(panel.map, panel.facts, state.mode);
    if (state.mode === "similarity" && state.scale === "file") {  // one scale for all panels of the page
      const low = maps.reduce((a, panel) => Math.min(a, panel.data.low), 1);
      for (const panel of maps) panel.data.low = low;
    }
    for (const panel of maps) {
      const { map, facts, view, canvas, bar, ends } = panel;
      paint(canvas, map, panel.data);
      view.classList.toggle("over", state.overlay);
      bar.hidden = state.mode === "pca";
      panel.about = `stride ${facts.stride}, ${facts.channels} channels`;
      if (state.mode === "pca") {
        const shares = facts.explained.map((share, i) => `${"RGB"[i]} ${Math.round(100 * share)}`).join(" · ");
        ends.replaceChildren(`${shares} % of variance`);
        continue;
      }
      const { low, high } = panel.data;
      const ramp = Float64Array.from({ length: 256 }, (_, i) => i);
      paint(bar, { width: 256, height: 1 }, { values: ramp, low: 0, high: 255 });
      const labels = [low, (low + high) / 2, high].map(formatNumber);
      ends.replaceChildren(...labels.map(label => createElement("span", { textContent: label })));
    }
    byId("mode").value = state.mode;
    const error = maps.reduce((a, panel) => Math.max(a, panel.facts.error), 0);
    byId("hint").textContent = state.mode !== "similarity" ? ""
      : `cosine with the marked cell, 95 % within ${Number(error.toPrecision(2))} of the exact one; Esc goes back`;
    for (const button of visible) drawThumbnail(button, Number(button.dataset.position));
    resize();
    updateReadout();
  };

  // Predicted boxes --------------------------------------------------------------------------------------------------
  const LINE = 15, TAG_LINES = 3, TAGS_COVER = 0.4, LEAST_ROOM = 150, MOST_READ = 5;
  const measure = document.createElement("canvas").getContext("2d");
  measure.font = "12px system-ui, sans-serif";
  const widths = new Map();
  const widthOf = text => {
    if (!widths.has(text)) widths.set(text, measure.measureText(text).width);
    return widths.get(text);
  };

  // The boxes of an image that are shown, best first: corners in pixels of the source, score, class and level.
  const shownBoxes = image => (image.boxes ?? [])
    .map(([x1, y1, x2, y2, score, kind, level]) => (
      { x1, y1, x2, y2, score, kind, level: index.boxes.levels[level], ...index.boxes.classes[kind] }))
    .filter(box => box.score >= state.score && !state.hidden.has(box.kind));

  const labelOf = box => `${box.name} ${box.score.toFixed(2)} ${box.level}`.trimEnd();
  const counted = (count, one, several) => `${count} ${count === 1 ? one : several}`;

  // A text in at most three lines of a width; one that is longer is cut in the middle.
  const linesOf = (text, width) => {
    if (widthOf(text) <= width) return [text];
    const broken = characters => {
      const lines = [""];
      for (const word of characters.join("").match(/\S+\s*|\s+/gu) ?? []) {
        if (lines.at(-1) && widthOf(lines.at(-1) + word.trimEnd()) > width) lines.push("");
        for (const character of word) {
          if (lines.at(-1) && widthOf((lines.at(-1) + character).trimEnd()) > width) lines.push("");
          lines[lines.length - 1] += character;
        }
      }
      return lines.map(line => line.trimEnd());
    };
    const characters = [...text];
    let lines = broken(characters), dropped = 0;
    while (lines.length > TAG_LINES && dropped < characters.length) {
      dropped += Math.max(1, Math.ceil(characters.length / 50));
      const kept = characters.length - dropped, first = Math.max(0, kept >> 1);
      lines = broken([...characters.slice(0, first), "…", ...characters.slice(characters.length - (kept - first))]);
    }
    return lines.slice(0, TAG_LINES);
  };

  const scaledBox = (box, scale) => {
    const x = Math.max(box.x1 * scale.x, 1), y = Math.max(box.y1 * scale.y, 1);
    const right = Math.min(box.x2 * scale.x, scale.width - 1), bottom = Math.min(box.y2 * scale.y, scale.height - 1);
    return { x, y, width: Math.max(right - x, 1), height: Math.max(bottom - y, 1) };
  };

  // Lines of strong boxes have an edge in black or white, so that they stand out from any background.
  const strongShapes = (box, scale) => {
    const place = scaledBox(box, scale), label = labelOf(box);
    return [
      createShape("rect", { ...place, fill: "none", stroke: box.text, "stroke-width": 4, "stroke-opacity": 0.6 }),
      createShape("rect", { ...place, fill: "none", stroke: box.colour, "stroke-width": 2, class: "strong", "data-label": label }),
    ];
  };

  const faintShapes = (boxes, scale) => {
    const paths = new Map();
    for (const box of boxes) {
      const { x, y, width, height } = scaledBox(box, scale);
      paths.set(box.colour, `${paths.get(box.colour) ?? ""}M${x} ${y}h${width}v${height}h${-width}z`);
    }
    return Array.from(paths, ([stroke, d]) => createShape("path", { d, stroke, fill: "none", class: "faint", "stroke-opacity": 0.45 }));
  };

  // Shapes of the tags that there is room for, the best first choosing. Tags never cover each other or leave
  // the view, or the margin beside a narrow one.
  const tagShapes = (boxes, scale) => {
    const placed = [], shapes = [], room = Math.max(scale.width, LEAST_ROOM);
    let area = TAGS_COVER * room * scale.height;
    for (const box of boxes) {
      if (placed.length && area <= 0) break;
      const lines = linesOf(labelOf(box), room - 10), height = lines.length * LINE + 2;
      const width = Math.max(...lines.map(widthOf)) + 8;
      if (placed.length && width * height > area) continue;
      const { x, y, width: w, height: h } = scaledBox(box, scale);
      const left = Math.max(0, Math.min(x, room - width)), right = Math.max(0, x + w - width);
      const places = [left, right].flatMap(x => [y - height, y, y + h, y + h - height].map(y => [x, y]));
      places.push([x + w, y], [x - width, y], [x + w, y + h - height], [x - width, y + h - height]);
      const free = places.find(([x, y]) => x >= 0 && y >= 0 && x + width <= room && y + height <= scale.height
        && !placed.some(p => x < p.x + p.width && p.x < x + width && y < p.y + p.height && p.y < y + height));
      if (!free) continue;
      const [tagX, tagY] = free;
      placed.push({ x: tagX, y: tagY, width, height });
      area -= width * height;
      shapes.push(createShape("rect", { x: tagX, y: tagY, width, height, fill: box.colour, class: "tag" }));
      lines.forEach((line, i) => {
        const text = createShape("text", { x: tagX + 4, y: tagY + 12 + i * LINE, fill: box.text });
        text.textContent = line;
        shapes.push(text);
      });
    }
    return { shapes, leftOut: boxes.length - placed.length };
  };

  const drawBoxes = () => {
    const image = imageAt(state.image), boxes = shownBoxes(image), worstFirst = [...boxes].reverse();
    for (const panel of panels) {
      const own = panel.source ? boxes : boxes.filter(box => box.level === panel.level);
      if (!panel.source)
        panel.detail.textContent = panel.about + (own.length ? `, ${counted(own.length, "box", "boxes")}` : "");
      if (!index.boxes || panel.repeated) continue;
      const width = parseFloat(panel.view.style.width), height = parseFloat(panel.view.style.height);
      const scale = { x: width / image.size[1], y: height / image.size[0], width, height };
      const isOwn = box => panel.source || box.level === panel.level || !box.level;
      const shapes = faintShapes(worstFirst.filter(box => !isOwn(box)), scale);
      shapes.push(...worstFirst.filter(isOwn).flatMap(box => strongShapes(box, scale)));
      if (panel.source) {
        const tags = tagShapes(boxes, scale);
        shapes.push(...tags.shapes);
        const leftOut = tags.leftOut ? `, ${counted(tags.leftOut, "label", "labels")} left out: zoom in` : "";
        panel.count.textContent = counted(boxes.length, "box", "boxes") + leftOut;
      }
      panel.boxes.replaceChildren(...shapes);
    }
    if (index.boxes) updateFilters(boxes);
  };

  const classLabels = [];  // of the classes by their number: the element with the count

  const updateFilters = boxes => {
    byId("score-value").textContent = state.score.toFixed(2);
    const classes = index.boxes.classes.length, shown = classes - state.hidden.size;
    byId("classes").querySelector("summary").textContent = shown === classes ? `Classes: all ${classes}` : `Classes: ${shown} of ${classes}`;
    if (!byId("classes").open) return;
    const counts = new Array(classes).fill(0);
    for (const box of boxes) counts[box.kind]++;
    counts.forEach((count, kind) => { classLabels[kind].textContent = count || ""; });
  };

  let waiting = false;
  const filterBoxes = () => {  // at most once a frame
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      drawBoxes();
      updateReadout();
    });
  };

  const startBoxes = () => {
    byId("boxes").hidden = false;
    byId("main").classList.add("with-boxes");
    byId("score").value = state.score;
    byId("score").addEventListener("input", event => { state.score = Number(event.target.value); filterBoxes(); });
    const details = byId("classes"), order = index.boxes.classes.map((_, kind) => kind);
    details.hidden = !order.length;
    order.sort((a, b) => index.boxes.classes[a].name.localeCompare(index.boxes.classes[b].name));
    const checks = [];
    for (const kind of order) {
      const { name, colour } = index.boxes.classes[kind], check = createElement("input", { type: "checkbox", checked: true, ariaLabel: name });
      const swatch = createElement("span", { className: "swatch" });
      swatch.style.background = colour;
      check.addEventListener("change", () => {
        state.hidden[check.checked ? "delete" : "add"](kind);
        filterBoxes();
      });
      checks.push(check);
      classLabels[kind] = createElement("span", { className: "count" });
      const title = createElement("span", { className: "class-name", textContent: name });
      byId("class-list").append(createElement("label", {}, check, swatch, title, classLabels[kind]));
    }
    const setAll = shown => {
      state.hidden = new Set(shown ? [] : order);
      for (const check of checks) check.checked = shown;
      filterBoxes();
    };
    byId("all-classes").addEventListener("click", () => setAll(true));
    byId("no-classes").addEventListener("click", () => setAll(false));
    details.addEventListener("toggle", filterBoxes);
    document.addEventListener("pointerdown", event => { if (!details.contains(event.target)) details.open = false; });
    details.addEventListener("keydown", event => {
      if (event.key !== "Escape" || !details.open) return;
      event.stopPropagation();
      details.open = false;
      details.querySelector("summary").focus();
    });
  };

  // The cell under the pointer ---------------------------------------------------------------------------------------
  const positionIn = (view, event) => {
    const box = view.getBoundingClientRect(), inside = share => Math.min(Math.max(share, 0), 1 - 1e-9);
    return { x: inside((event.clientX - box.left) / box.width), y: inside((event.clientY - box.top) / box.height) };
  };

  const showCell = (panel, event) => {
    const position = panel && positionIn(panel.view, event);
    for (const other of panels) {
      if (other.source) continue;
      if (position) moveToCell(other.cell, other, cellAt(other.map, position));
      else other.cell.hidden = true;
    }
    if (!panel) return;
    lastRead = { panel, position };
    updateReadout();
  };

  // Which boxes are shown at a position, the best first.
  const boxesAt = position => {
    const image = imageAt(state.image), x = position.x * image.size[1], y = position.y * image.size[0];
    const boxes = shownBoxes(image).filter(box => box.x1 <= x && x <= box.x2 && box.y1 <= y && y <= box.y2);
    const labels = boxes.slice(0, MOST_READ).map(labelOf);
    if (boxes.length > MOST_READ) labels.push(`${boxes.length - MOST_READ} more`);
    return labels.length ? ` · in ${labels.join(", ")}` : "";
  };

  // The value of the cell that was last under the pointer, in the mode that is shown now, and the boxes there.
  const updateReadout = () => {
    if (!lastRead) {
      byId("readout").textContent = readoutHint;
      return;
    }
    const { panel, position } = lastRead, boxes = boxesAt(position);
    if (panel.source) {
      byId("readout").textContent = `source${boxes}`;
      return;
    }
    const { y, x } = cellAt(panel.map, position), cell = y * panel.map.width + x;
    const value = panel.data.colours
      ? `RGB ${Array.from(panel.data.colours.subarray(3 * cell, 3 * cell + 3)).join(" ")}`
      : Number.isNaN(panel.data.values[cell]) ? "not finite" : Number(panel.data.values[cell].toPrecision(4));
    byId("readout").textContent = `${panel.level} cell (y ${y}, x ${x}): ${state.mode} ${value}${boxes}`;
  };

  // Controls ---------------------------------------------------------------------------------------------------------
  const start = () => {
    const files = index.files.map(file => file.name).filter(Boolean);
    const title = files.length ? files.join(", ") : "fpnx";
    byId("title").textContent = document.title = title;
    const names = [...new Set(index.files.flatMap(file => Object.keys(file.levels)))];
    names.sort((a, b) => a[1] - b[1] || (a < b ? -1 : 1));
    byId("level").append(createElement("option", { value: "", textContent: "all" }),
      ...names.map(level => createElement("option", { value: level, textContent: level })));
    byId("overlay").checked = state.overlay;
    byId("scale").value = state.scale;
    byId("mode").addEventListener("change", event => { state.mode = event.target.value; refresh(); });
    byId("level").addEventListener("change", event => { state.level = event.target.value; buildPanels(); });
    byId("scale").addEventListener("change", event => { state.scale = event.target.value; refresh(); });
    byId("overlay").addEventListener("change", event => { state.overlay = event.target.checked; refresh(); });
    byId("zoom").addEventListener("input", event => { state.zoom = Number(event.target.value); resize(); });
    document.addEventListener("keydown", event => {
      if (event.target.matches("select, input")) return;
      const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
      if (step) {
        event.preventDefault();
        selectImage(state.image + step);
      } else if (event.key === "Escape" && state.mode === "similarity") {
        state.mode = index.mode;
        refresh();
      }
    });
    if (index.boxes) startBoxes();
    if (!index.images) return;
    listImages();
    selectImage(0);
  };
  start();
})();
