
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
  const readoutHint = byId("readout").textContent;
  const index = JSON.parse(byId("index").textContent);
  const colours = decodeBase64(index.colours);
  const state = {
    image: 0, mode: index.mode, level: "", scale: index.perImage ? "image" : "file", overlay: index.overlay,
    zoom: 272, point: null,
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

  const createPanel = (image, fileIndex, level) => {
    const map = image.files[fileIndex].maps[level], facts = index.files[fileIndex].levels[level];
    const view = createView(image), canvas = createElement("canvas");
    const cell = createElement("div", { className: "cell", hidden: true });
    const point = createElement("div", { className: "point", hidden: true });
    view.append(canvas, cell, point);
    const bar = createElement("canvas", { className: "bar", width: 256, height: 1 });
    const ends = createElement("div", { className: "ends" });
    const detail = createElement("small");
    const name = createElement("b", { textContent: level });
    const caption = createElement("figcaption", {}, name, `${map.height}×${map.width}`, detail);
    const panel = { map, facts, level, view, canvas, cell, point, bar, ends, detail };
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
        first = false;
        const view = createView(image);
        if (!image.photo) view.append(createElement("div", { className: "text", textContent: image.remark }));
        const name = createElement("b", { textContent: "source" });
        const detail = createElement("small", { textContent: `model input ${file.seen.join("×")}` });
        const caption = createElement("figcaption", {}, name, image.size.join("×"), detail);
        panels.push({ view, source: true });
        row.append(createElement("figure", {}, caption, view));
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
      const { map, facts, view, canvas, bar, ends, detail } = panel;
      paint(canvas, map, panel.data);
      view.classList.toggle("over", state.overlay);
      bar.hidden = state.mode === "pca";
      detail.textContent = `stride ${facts.stride}, ${facts.channels} channels`;
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

  // The value of the cell that was last under the pointer, in the mode that is shown now.
  const updateReadout = () => {
    if (!lastRead) {
      byId("readout").textContent = readoutHint;
      return;
    }
    const { panel, position } = lastRead, { y, x } = cellAt(panel.map, position), cell = y * panel.map.width + x;
    const value = panel.data.colours
      ? `RGB ${Array.from(panel.data.colours.subarray(3 * cell, 3 * cell + 3)).join(" ")}`
      : Number.isNaN(panel.data.values[cell]) ? "not finite" : Number(panel.data.values[cell].toPrecision(4));
    byId("readout").textContent = `${panel.level} cell (y ${y}, x ${x}): ${state.mode} ${value}`;
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
    if (!index.images) return;
    listImages();
    selectImage(0);
  };
  start();
})();
