
"use strict";
(() => {
  const ABSENT = 65535, BROKEN = [150, 150, 150], THUMBNAIL = 92;
  const find = id => document.getElementById(id);
  const make = (tag, attributes = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), attributes);
    element.append(...children);
    return element;
  };
  const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  const index = JSON.parse(find("index").textContent);
  const colours = bytes(index.colours);
  const state = {
    image: 0, mode: index.mode, level: "", scale: index.perImage ? "image" : "file", overlay: index.overlay,
    zoom: 272, point: null,
  };
  const images = [];
  let panels = [];

  // Data -------------------------------------------------------------------------------------------------------
  const image = number => images[number] ??= JSON.parse(find(`image-${number}`).textContent);

  // Values of a map by mode, decoded once: Float32Array of height × width, NaN where there is none.
  const values = (map, mode) => {
    const kept = map[mode];
    if (kept.decoded) return kept.decoded;
    const raw = bytes(kept.values), view = new DataView(raw.buffer), step = (kept.high - kept.low) / (ABSENT - 1);
    const decoded = new Float64Array(raw.length / 2);
    for (let i = 0; i < decoded.length; i++) {
      const stored = view.getUint16(2 * i, true);
      decoded[i] = stored === ABSENT ? NaN : kept.low + stored * step;
    }
    return kept.decoded = decoded;
  };

  const cellAt = (map, point) => ({
    y: Math.min(map.height - 1, Math.floor(point.y / map.reach[0] * map.height)),
    x: Math.min(map.width - 1, Math.floor(point.x / map.reach[1] * map.width)),
  });

  const similarity = (map, point, count) => {
    const vectors = new Int8Array((map.vectors ??= bytes(map.directions)).buffer);
    const { y, x } = cellAt(map, point), from = (y * map.width + x) * count;
    const cosines = new Float64Array(map.height * map.width);
    const length = start => {
      let sum = 0;
      for (let k = 0; k < count; k++) sum += vectors[start + k] ** 2;
      return Math.sqrt(sum);
    };
    const own = length(from);
    for (let i = 0; i < cosines.length; i++) {
      let sum = 0;
      for (let k = 0; k < count; k++) sum += vectors[from + k] * vectors[i * count + k];
      const other = length(i * count);
      cosines[i] = own && other ? Math.min(1, Math.max(-1, sum / (own * other))) : NaN;
    }
    return cosines;
  };

  // What a map shows now: values with their range, or colours.
  const shownMap = (map, facts, mode) => {
    if (mode === "pca") return { colours: map.colours ??= bytes(map.pca) };
    if (mode === "similarity") {
      const cosines = similarity(map, state.point, facts.directions);
      return { values: cosines, low: cosines.reduce((a, b) => (b < a ? b : a), 1), high: 1 };
    }
    const [low, high] = state.scale === "image" ? [map[mode].low, map[mode].high] : facts.ranges[mode];
    return { values: values(map, mode), low, high };
  };

  const paint = (canvas, map, shown) => {
    canvas.width = map.width;
    canvas.height = map.height;
    const context = canvas.getContext("2d"), pixels = context.createImageData(map.width, map.height);
    const span = shown.high > shown.low ? shown.high - shown.low : 0;
    for (let i = 0; i < map.width * map.height; i++) {
      let colour = BROKEN;
      if (shown.colours) colour = shown.colours.subarray(3 * i, 3 * i + 3);
      else if (!Number.isNaN(shown.values[i])) {
        const share = span ? Math.min(1, Math.max(0, (shown.values[i] - shown.low) / span)) : 0;
        const entry = 3 * Math.round(255 * share);
        colour = colours.subarray(entry, entry + 3);
      }
      pixels.data.set(colour, 4 * i);
      pixels.data[4 * i + 3] = 255;
    }
    context.putImageData(pixels, 0, 0);
  };

  const number = value => {
    if (value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5))
      return Math.abs(value) >= 1000 ? value.toFixed(0) : String(Number(value.toPrecision(3)));
    return value.toExponential(2).replace("e+", "e");
  };

  // Thumbnails -------------------------------------------------------------------------------------------------
  const thumbnailLevel = file => state.level && file.maps[state.level] ? state.level : Object.keys(file.maps)[0];

  const thumbnail = (button, place) => {
    const about = image(place), which = about.files.findIndex(file => file.maps);
    const pair = button.querySelector(".pair"), scale = Math.min(THUMBNAIL / about.size[1], 128 / about.size[0]);
    const [height, width] = about.size.map(side => `${Math.max(side * scale, 8)}px`);
    for (const child of pair.children) Object.assign(child.style, { height, width });
    const photo = pair.querySelector("img");
    if (about.photo && !photo.src) photo.src = about.photo;
    photo.hidden = !about.photo;
    button.querySelector(".name").textContent = about.name;
    if (which < 0) return;
    const level = thumbnailLevel(about.files[which]), map = about.files[which].maps[level];
    const mode = state.mode === "similarity" ? "energy" : state.mode;
    const facts = index.files[which].levels[level];
    paint(pair.querySelector("canvas"), map, shownMap(map, facts, mode));
  };

  const visible = new Set();
  const observer = new IntersectionObserver(entries => {
    for (const entry of entries) {
      if (!entry.isIntersecting) visible.delete(entry.target);
      else {
        visible.add(entry.target);
        thumbnail(entry.target, Number(entry.target.dataset.place));
      }
    }
  }, { root: find("list"), rootMargin: "300px" });

  const listImages = () => {
    for (let place = 0; place < index.images; place++) {
      const pair = make("span", { className: "pair" }, make("img", { alt: "" }), make("canvas"));
      const button = make("button", { type: "button" }, pair, make("span", { className: "name" }));
      button.dataset.place = place;
      button.addEventListener("click", () => choose(place));
      find("list").append(button);
      observer.observe(button);
    }
  };

  // The image that is looked at ----------------------------------------------------------------------------------
  const choose = place => {
    state.image = Math.min(Math.max(place, 0), index.images - 1);
    for (const button of find("list").children)
      button.setAttribute("aria-current", String(Number(button.dataset.place) === state.image));
    find("list").children[state.image].scrollIntoView({ block: "nearest" });
    build();
  };

  const stageOf = about => {
    const stage = make("div", { className: "stage" });
    if (about.photo) stage.append(make("img", { src: about.photo, alt: "" }));
    return stage;
  };

  const panelOf = (about, which, level) => {
    const map = about.files[which].maps[level], facts = index.files[which].levels[level];
    const stage = stageOf(about), canvas = make("canvas");
    const cell = make("div", { className: "cell", hidden: true });
    const point = make("div", { className: "point", hidden: true });
    stage.append(canvas, cell, point);
    const bar = make("canvas", { className: "bar", width: 256, height: 1 });
    const ends = make("div", { className: "ends" });
    const detail = make("small");
    const caption = make("figcaption", {}, make("b", { textContent: level }), `${map.height}×${map.width}`, detail);
    const panel = { map, facts, level, which, stage, canvas, cell, point, bar, ends, detail };
    stage.addEventListener("pointermove", event => hover(panel, event));
    stage.addEventListener("pointerleave", () => hover(null));
    stage.addEventListener("click", event => {
      state.point = positionIn(stage, event);
      state.mode = "similarity";
      refresh();
    });
    panels.push(panel);
    return make("figure", {}, caption, stage, bar, ends);
  };

  const build = () => {
    const about = image(state.image), main = find("main");
    panels = [];
    main.replaceChildren(make("h2", { textContent: about.name }));
    const note = text => main.append(make("p", { className: "note", textContent: text }));
    if (about.remark) note(about.remark);
    about.files.forEach((file, which) => {
      const facts = index.files[which];
      const title = facts.name && index.files.length > 1 ? `${facts.name} · ${facts.about}` : facts.about;
      main.append(make("p", { className: "about", textContent: title }));
      if (file.missing) return note(file.missing);
      const names = Object.keys(file.maps).filter(level => !state.level || level === state.level);
      let first = true;
      for (const kind of ["C", "P"]) {
        const levels = names.filter(level => level[0] === kind);
        if (!levels.length) continue;
        const row = make("div", { className: first ? "row" : "row later" });
        first = false;
        const stage = stageOf(about);
        if (!about.photo) stage.append(make("div", { className: "text", textContent: about.remark }));
        const caption = make("figcaption", {}, make("b", { textContent: "source" }), about.size.join("×"),
          make("small", { textContent: `model input ${file.seen.join("×")}` }));
        panels.push({ stage, source: true });
        row.append(make("figure", {}, caption, stage), ...levels.map(level => panelOf(about, which, level)));
        main.append(row);
      }
    });
    for (const text of index.notes) note(text);
    const facts = index.files.flatMap(file => Object.entries(file.levels));
    const worst = facts.reduce((a, [, level]) => Math.max(a, level.error), 0);
    note(`Similarity is computed here from at most ${Math.max(...facts.map(([, level]) => level.directions))} ` +
      `directions of each level's channels, in 8 bits: 95 % of it lies within ${number(worst)} of the exact cosine.`);
    refresh();
  };

  const resize = () => {
    const about = image(state.image), scale = state.zoom / Math.max(...about.size);
    const [height, width] = about.size.map(side => Math.max(Math.round(side * scale), 24));
    for (const panel of panels) {
      Object.assign(panel.stage.style, { width: `${width}px`, height: `${height}px` });
      if (panel.source) continue;
      const { map, canvas, bar, ends } = panel;
      Object.assign(canvas.style, { width: `${map.reach[1] * width}px`, height: `${map.reach[0] * height}px` });
      bar.style.width = ends.style.width = `${Math.max(width, 150)}px`;
    }
    marks();
  };

  const place = (element, panel, cell) => {
    const { map, stage } = panel, width = parseFloat(stage.style.width), height = parseFloat(stage.style.height);
    const step = [map.reach[0] * height / map.height, map.reach[1] * width / map.width];
    Object.assign(element.style, {
      left: `${cell.x * step[1]}px`, top: `${cell.y * step[0]}px`, width: `${step[1]}px`, height: `${step[0]}px`,
    });
    element.hidden = false;
  };

  const marks = () => {
    for (const panel of panels) {
      if (panel.source) continue;
      panel.point.hidden = true;
      if (state.mode === "similarity") place(panel.point, panel, cellAt(panel.map, state.point));
    }
  };

  const refresh = () => {
    if (state.mode === "similarity") state.point ??= { x: 0.5, y: 0.5 };
    const maps = panels.filter(panel => !panel.source);
    for (const panel of maps) panel.shown = shownMap(panel.map, panel.facts, state.mode);
    if (state.mode === "similarity" && state.scale === "file") {  // one scale for all that is on the page
      const low = maps.reduce((a, panel) => Math.min(a, panel.shown.low), 1);
      for (const panel of maps) panel.shown.low = low;
    }
    for (const panel of maps) {
      const { map, facts, stage, canvas, bar, ends, detail } = panel;
      paint(canvas, map, panel.shown);
      stage.classList.toggle("over", state.overlay);
      bar.hidden = state.mode === "pca";
      detail.textContent = `stride ${facts.stride}, ${facts.channels} channels`;
      if (state.mode === "pca") {
        const shares = facts.explained.map((share, i) => `${"RGB"[i]} ${Math.round(100 * share)}`).join(" · ");
        ends.replaceChildren(`${shares} % of variance`);
        continue;
      }
      const { low, high } = panel.shown;
      const ramp = Float64Array.from({ length: 256 }, (_, i) => i);
      paint(bar, { width: 256, height: 1 }, { values: ramp, low: 0, high: 255 });
      ends.replaceChildren(...[low, (low + high) / 2, high].map(value => make("span", { textContent: number(value) })));
    }
    find("mode").value = state.mode;
    find("hint").textContent = state.mode === "similarity" ? "cosine with the marked cell; Esc goes back" : "";
    for (const button of visible) thumbnail(button, Number(button.dataset.place));
    resize();
  };

  // Pointing ---------------------------------------------------------------------------------------------------
  const positionIn = (stage, event) => {
    const box = stage.getBoundingClientRect(), inside = share => Math.min(Math.max(share, 0), 1 - 1e-9);
    return { x: inside((event.clientX - box.left) / box.width), y: inside((event.clientY - box.top) / box.height) };
  };

  const hover = (panel, event) => {
    const position = panel && positionIn(panel.stage, event);
    for (const other of panels) {
      if (other.source) continue;
      if (position) place(other.cell, other, cellAt(other.map, position));
      else other.cell.hidden = true;
    }
    if (!panel) return;
    const { y, x } = cellAt(panel.map, position), at = y * panel.map.width + x;
    const value = panel.shown.colours
      ? `RGB ${Array.from(panel.shown.colours.subarray(3 * at, 3 * at + 3)).join(" ")}`
      : Number.isNaN(panel.shown.values[at]) ? "not finite" : Number(panel.shown.values[at].toPrecision(4));
    find("readout").textContent = `${panel.level} cell (y ${y}, x ${x}): ${state.mode} ${value}`;
  };

  // Controls ---------------------------------------------------------------------------------------------------
  const start = () => {
    const files = index.files.map(file => file.name).filter(Boolean);
    const title = files.length ? files.join(", ") : "fpnx";
    find("title").textContent = document.title = title;
    const names = [...new Set(index.files.flatMap(file => Object.keys(file.levels)))];
    names.sort((a, b) => a[1] - b[1] || (a < b ? -1 : 1));
    find("level").append(make("option", { value: "", textContent: "all" }),
      ...names.map(level => make("option", { value: level, textContent: level })));
    find("overlay").checked = state.overlay;
    find("scale").value = state.scale;
    find("mode").addEventListener("change", event => { state.mode = event.target.value; refresh(); });
    find("level").addEventListener("change", event => { state.level = event.target.value; build(); });
    find("scale").addEventListener("change", event => { state.scale = event.target.value; refresh(); });
    find("overlay").addEventListener("change", event => { state.overlay = event.target.checked; refresh(); });
    find("zoom").addEventListener("input", event => { state.zoom = Number(event.target.value); resize(); });
    document.addEventListener("keydown", event => {
      if (event.target.matches("select, input")) return;
      const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
      if (step) {
        event.preventDefault();
        choose(state.image + step);
      } else if (event.key === "Escape" && state.mode === "similarity") {
        state.mode = index.mode;
        refresh();
      }
    });
    if (!index.images) return;
    listImages();
    choose(0);
  };
  start();
})();
