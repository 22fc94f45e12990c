// Draws the footprint of every run out of the data in the page, and shows what lies under the pointer.
// Without it the page lacks this picture and nothing else.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const chart = document.getElementById("chart");
  const controls = document.getElementById("controls");
  const HEIGHT = 380, LEFT = 64, RIGHT = 14, TOP = 34, BOTTOM = 34;
  const SVG = "http://www.w3.org/2000/svg";
  const hidden = new Set();
  let align = data.align, guest = true, at = null, view = null;

  // The end of a console is what is looked for.
  const toEnd = () => document.querySelectorAll("pre.console").forEach(pre => { pre.scrollTop = pre.scrollHeight; });
  document.querySelectorAll("details").forEach(part => part.addEventListener("toggle", toEnd, { once: true }));
  toEnd();
  if (!data.runs.length) return;
  document.getElementById("missing").remove();

  const make = (name, attributes, text) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const html = (name, text, kind) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };
  const size = kib => kib >= 1048576 ? `${(kib / 1048576).toFixed(2)} GiB` : kib >= 10240 ? `${Math.round(kib / 1024)} MiB`
    : kib >= 1024 ? `${(kib / 1024).toFixed(1)} MiB` : `${kib} KiB`;
  const seconds = ms => `${(ms / 1000).toFixed(Math.abs(ms) < 99950 ? 1 : 0)} s`;

  // When second 0 of the axis is in a run: the begin of the phase where runs meet. A run that never came there meets the
  // first one where its guest was up; one that never was begins where it begins.
  const begin = (run, name) => run.phases.find(phase => phase.name === name)?.begin;
  const origin = run => {
    if (align === "") return 0;
    const first = data.runs[0];
    if (begin(run, align) !== undefined) return begin(run, align);
    const up = run.phases[1]?.begin, firstUp = first.phases[1]?.begin;
    return begin(first, align) - (up !== undefined && firstUp !== undefined ? firstUp - up : 0);
  };
  // The last position whose time is not after ms; -1 before the first one.
  const position = (times, ms) => {
    let low = 0, high = times.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (times[middle] <= ms) low = middle + 1; else high = middle;
    }
    return low - 1;
  };
  const value = (run, ms) => {
    const zero = origin(run), found = position(run.times, ms + zero);
    return found < 0 || ms + zero > run.times[run.times.length - 1] + 1000 ? null : run.held[found];
  };
  const visible = () => data.runs.filter(run => !hidden.has(run.arm));
  const firsts = runs => Object.keys(data.arms).map(arm => runs.find(run => run.arm === arm)).filter(Boolean);
  const nice = (span, parts, steps) => steps.find(step => span / step <= parts) ?? steps[steps.length - 1];

  const scales = runs => {
    const width = Math.max(360, chart.clientWidth);
    const begins = runs.map(run => run.times[0] - origin(run));
    const ends = runs.map(run => run.times[run.times.length - 1] - origin(run));
    const x0 = runs.length ? Math.min(...begins) : 0, x1 = runs.length ? Math.max(...ends, x0 + 1) : 1000;
    const top = 1.06 * Math.max(1024, ...runs.map(run => run.held.reduce((most, held) => Math.max(most, held), 0)));
    const x = ms => LEFT + (ms - x0) / (x1 - x0) * (width - LEFT - RIGHT);
    const y = kib => HEIGHT - BOTTOM - kib / top * (HEIGHT - TOP - BOTTOM);
    const time = pixels => x0 + (pixels - LEFT) / (width - LEFT - RIGHT) * (x1 - x0);
    return { width, x0, x1, top, x, y, time };
  };

  const axes = svg => {
    const { width, x0, x1, top, x, y } = view;
    const up = nice(top, 7, [256, 1024, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576, 2097152, 4194304,
      8388608, 16777216, 67108864]);
    for (let kib = 0; kib <= top; kib += up) {
      svg.append(make("line", { x1: LEFT, x2: width - RIGHT, y1: y(kib), y2: y(kib), class: "axis" }));
      svg.append(make("text", { x: LEFT - 8, y: y(kib) + 4, "text-anchor": "end" }, kib ? size(kib) : "0"));
    }
    const across = nice(x1 - x0, width / 80, [100, 200, 500, 1000, 2000, 5000, 10000, 20000, 30000, 60000, 120000, 300000,
      600000, 1800000, 3600000, 36000000]);
    for (let ms = Math.ceil(x0 / across) * across; ms <= x1; ms += across) {
      svg.append(make("text", { x: x(ms), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, `${ms / 1000}`));
    }
    const from = align === "" ? "QEMU's start" : `the beginning of ${align}`;
    svg.append(make("text", { x: width - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, `seconds since ${from}`));
  };

  // The phases of the first run: every other one has a band, names go down a line where there is no room.
  const phases = (svg, run) => {
    const { x } = view;
    let free = [-1e9, -1e9];
    run.phases.forEach((phase, number) => {
      const begin = x(phase.begin - origin(run)), end = x(phase.end - origin(run));
      const box = { x: begin, y: TOP - 6, width: Math.max(0, end - begin), height: HEIGHT - TOP - BOTTOM + 6 };
      if (number % 2) svg.append(make("rect", { ...box, class: "phase" }));
      const line = free[0] <= begin ? 0 : 1;
      if (free[line] > begin) return;
      free[line] = begin + 7 * phase.name.length + 8;
      svg.append(make("text", { x: begin + 3, y: 11 + 12 * line }, phase.name));
    });
  };

  const path = (times, values, zero) => {
    const { x, y } = view;
    return times.map((ms, i) => `${i ? "L" : "M"}${x(ms - zero).toFixed(1)} ${y(values[i]).toFixed(1)}`).join("");
  };

  const curves = (svg, runs) => {
    const bold = new Set(firsts(runs));
    const order = [...runs].sort((a, b) => bold.has(a) - bold.has(b) || (a.arm === "off" ? -1 : b.arm === "off" ? 1 : 0));
    for (const run of order) {
      const kind = `run ${run.arm}${bold.has(run) ? " first" : ""}`;
      svg.append(make("path", { d: path(run.times, run.held, origin(run)), class: kind }));
    }
    const first = [...bold][0];
    if (guest && first) svg.append(make("path", { d: path(first.looks, first.used, origin(first)), class: "guest" }));
    for (const run of runs.filter(run => run.ended)) {
      const last = run.times.length - 1, cx = view.x(run.times[last] - origin(run)), cy = view.y(run.held[last]);
      const mark = make("path", { d: `M${cx - 5} ${cy - 5}l10 10m0 -10l-10 10`, class: "early" });
      mark.append(make("title", {}, `${run.arm} run ${run.number}: ${run.ended}`));
      svg.append(mark);
    }
  };

  const svg = make("svg", { tabindex: "0", role: "img", "aria-label": "What the host holds of guest RAM over time, every run" });
  const tip = html("div"); tip.id = "tip"; tip.hidden = true;
  chart.append(svg, tip);
  const cursor = make("g", {});

  const draw = () => {
    const runs = visible();
    view = scales(runs);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${view.width} ${HEIGHT}`);
    if (runs.length) phases(svg, runs[0]);
    axes(svg);
    curves(svg, runs);
    svg.append(cursor);
    point();
  };

  // Crosshair and values at the moment pointed at: the first run of each arm, and the least and most of its others.
  const point = () => {
    cursor.replaceChildren();
    tip.hidden = at === null;
    if (at === null) return;
    const runs = visible(), first = runs[0];
    at = Math.min(view.x1, Math.max(view.x0, at));
    const x = view.x(at);
    cursor.append(make("line", { x1: x, x2: x, y1: TOP - 6, y2: HEIGHT - BOTTOM, class: "cross" }));
    const named = first?.phases.findLast(phase => phase.begin - origin(first) <= at);
    tip.replaceChildren(html("b", `${seconds(at)}${named ? `, ${named.name}` : ""}`));
    const rows = html("table");
    for (const run of firsts(runs)) row(rows, run, runs, x);
    const look = first ? position(first.looks, at + origin(first)) : -1;
    if (guest && look >= 0) line(rows, "", "not free in the guest", size(first.used[look]), "");
    tip.append(rows);
    const scale = svg.clientWidth / view.width || 1, right = x > view.width * 0.6;
    tip.style.left = right ? "" : `${x * scale + 14}px`;
    tip.style.right = right ? `${(view.width - x) * scale + 14}px` : "";
  };
  const row = (rows, run, runs, x) => {
    const own = value(run, at);
    const all = runs.filter(other => other.arm === run.arm).map(other => value(other, at)).filter(kib => kib !== null);
    if (own !== null) cursor.append(make("circle", { cx: x, cy: view.y(own), r: 4, class: `dot ${run.arm}` }));
    const range = all.length > 1 ? `${size(Math.min(...all))} to ${size(Math.max(...all))}` : "";
    line(rows, run.arm, data.arms[run.arm], own === null ? "-" : size(own), range);
  };
  const line = (rows, arm, name, text, range) => {
    const made = html("tr"), label = html("td");
    if (arm) label.append(html("span", "", `key ${arm}`));
    label.append(name);
    made.append(label, html("td", text), html("td", range));
    rows.append(made);
  };

  const toggle = (text, key, change) => {
    const label = html("label"), box = html("input");
    box.type = "checkbox"; box.checked = true;
    box.addEventListener("change", () => { change(box.checked); draw(); });
    label.append(box);
    if (key) label.append(html("span", "", `key ${key}`));
    label.append(text);
    controls.append(label);
  };
  for (const [arm, name] of Object.entries(data.arms)) {
    toggle(name, arm, on => on ? hidden.delete(arm) : hidden.add(arm));
  }
  toggle("not free in the first run's guest", "", on => { guest = on; });
  const meet = html("select"), label = html("label", "runs meet at", "screen");
  for (const name of ["", ...new Set(data.runs[0].phases.map(phase => phase.name))]) {
    const option = html("option", name === "" ? "QEMU's start" : name);
    option.value = name; option.selected = name === align;
    meet.append(option);
  }
  meet.addEventListener("change", () => { align = meet.value; at = null; draw(); });
  label.append(meet);
  controls.append(label);

  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    at = view.time((event.clientX - box.left) * view.width / box.width);
    point();
  });
  svg.addEventListener("pointerleave", () => { at = null; point(); });
  svg.addEventListener("keydown", event => {
    const step = (view.x1 - view.x0) / (event.shiftKey ? 20 : 200);
    if (event.key === "ArrowRight") at = (at ?? view.x0 - step) + step;
    else if (event.key === "ArrowLeft") at = (at ?? view.x1 + step) - step;
    else if (event.key === "Escape") at = null;
    else return;
    event.preventDefault();
    point();
  });
  new ResizeObserver(() => { if (view === null || Math.max(360, chart.clientWidth) !== view.width) draw(); }).observe(chart);
  draw();
})();
