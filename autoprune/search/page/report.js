"use strict";
// Draws the study of this page; texts enter as text nodes only, so that no prompt is ever read as markup.
const study = JSON.parse(document.getElementById("study").textContent);
const byId = (id) => document.getElementById(id);
const points = study.front.points;
const pictures = study.pictures;
const hidden = new Set();
const SHAPES = { // paths around (0, 0)
  circle: (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`,
  diamond: (r) => `M0 ${-1.3 * r}L${1.3 * r} 0L0 ${1.3 * r}L${-1.3 * r} 0Z`,
  square: (r) => `M${-r} ${-r}H${r}V${r}H${-r}Z`,
  star: (r) => "M" + [...Array(10).keys()].map((corner) => {
    const [reach, angle] = [corner % 2 ? 0.7 * r : 1.6 * r, (corner * Math.PI) / 5];
    return `${(reach * Math.sin(angle)).toFixed(2)} ${(-reach * Math.cos(angle)).toFixed(2)}`;
  }).join("L") + "Z",
};
const RADIUS = { rejected: 4, trial: 4, control: 5, preset: 6, "search-front": 5, "front-point": 6, dense: 6 };
let chosen = points.find((point) => point.tiers.includes("balanced")) || points.findLast((point) => point.tiers.length)
  || points[points.length - 1];

function make(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function button(text, pressed, act) {
  const made = make("button", { type: "button", "aria-pressed": pressed }, text);
  made.addEventListener("click", () => act(made));
  return made;
}

function ticks(low, high, most) {
  const rough = (high - low) / most;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, place) => ((first + place) * step).toFixed(digits));
}

// Returns an SVG with grid and axes, and `place` from values to pixels. `range` is [left, right, bottom, top].
function chart(host, height, range, names) {
  const width = Math.max(200, host.clientWidth - 16);
  const box = { left: 50, right: width - 12, top: 26, bottom: height - 40 };
  const place = {
    x: (value) => box.left + ((value - range[0]) / (range[1] - range[0])) * (box.right - box.left),
    y: (value) => box.bottom - ((value - range[2]) / (range[3] - range[2])) * (box.bottom - box.top),
  };
  const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": names.title });
  for (const tick of ticks(range[0], range[1], Math.max(2, width / 90))) {
    svg.append(draw("line", { class: "grid", x1: place.x(tick), x2: place.x(tick), y1: box.top, y2: box.bottom }));
    svg.append(draw("text", { class: "axis", x: place.x(tick), y: box.bottom + 16, "text-anchor": "middle" }, tick + names.unit));
  }
  for (const tick of ticks(range[2], range[3], height / 60)) {
    svg.append(draw("line", { class: "grid", x1: box.left, x2: box.right, y1: place.y(tick), y2: place.y(tick) }));
    svg.append(draw("text", { class: "axis", x: box.left - 6, y: place.y(tick) + 4, "text-anchor": "end" }, tick));
  }
  svg.append(draw("text", { class: "axis", x: 4, y: 14 }, names.y));
  svg.append(draw("text", { class: "axis", x: box.right, y: height - 6, "text-anchor": "end" }, names.x));
  return { svg, place, box, width, height };
}

function drawFront() {
  const host = byId("front");
  const { top, right, kinds } = study.front;
  const left = Math.min(...points.map((point) => point.x), 1);
  const range = [left - 0.05 * (right - left), right, 0, top];
  const names = { title: "Speed-up against loss, one mark a trial", unit: "x", x: "speed-up over dense", y: `loss (${study.loss} to dense)` };
  const drawn = chart(host, Math.min(500, Math.max(320, host.clientWidth * 0.62)), range, names);
  const { svg, place } = drawn;
  const marks = [];
  for (const kind of ["search-front", "front-point"]) {
    const members = points.filter((point) => point.kind === kind && !hidden.has(kind)).sort((one, other) => one.x - other.x);
    const corners = members.map((point) => `${place.x(point.x)} ${place.y(point.y)}`);
    if (corners.length) svg.append(draw("path", { class: "line", d: `M${corners.join("L")}` }));
  }
  for (const point of points.filter((each) => !hidden.has(each.kind))) {
    const [x, y] = [place.x(Math.min(point.x, right)), place.y(Math.min(point.y, top))];
    const mark = draw("g", {
      class: `mark ${point.kind}`, role: "button", tabindex: -1, transform: `translate(${x} ${y})`, "data-trial": point.trial,
      "aria-label": `${point.title}, ${kinds[point.kind]}: ${point.x.toFixed(2)}x, loss ${point.y.toFixed(3)}`,
    }, draw("path", { d: shape(point) }), draw("circle", { class: "ring", r: RADIUS[point.kind] + 5 }));
    svg.append(mark);
    marks.push({ point, mark, x, y });
  }
  placeLabels(drawn, marks);
  const tip = make("div", { class: "tip", hidden: "" });
  host.replaceChildren(svg, tip);
  listen(svg, tip, marks);
  markChosen();
}

function shape(point) {
  const name = point.kind === "dense" ? "star" : { preset: "diamond", control: "square" }[point.shape] || "circle";
  return SHAPES[name](RADIUS[point.kind]);
}

// Writes each label at the first place beside its point that covers no other label and no labelled point, those of tiers over
// points where it must be; a label without a place is left out.
function placeLabels({ svg, width, height }, marks) {
  const labelled = marks.filter(({ point }) => point.label).sort((one, other) => other.point.tiers.length - one.point.tiers.length);
  const around = labelled.map(({ x, y }) => [x - 8, y - 8, x + 8, y + 8]);
  const texts = [];
  for (const { point, x, y } of labelled) {
    const length = 7 * point.label.length;
    const tries = [[10, 16], [-10 - length, -8], [10, -8], [-10 - length, 16], [-length / 2, 24], [-length / 2, -14]];
    const boxes = tries.map(([right, down]) => [x + right, y + down - 12, x + right + length, y + down + 4])
      .filter(([l, t, r, b]) => l > 46 && r < width && t > 18 && b < height - 38);
    const free = (taken) => boxes.find(([l, t, r, b]) => !taken.some((other) => l < other[2] && r > other[0] && t < other[3] && b > other[1]));
    const box = free([...texts, ...around]) || (point.tiers.length ? free(texts) : null);
    if (!box) continue;
    texts.push(box);
    svg.append(draw("text", { class: `label ${point.kind}`, x: box[0], y: box[3] - 4 }, point.label));
  }
}

function listen(svg, tip, marks) {
  const nearest = (event, reach) => {
    const [x, y] = [event.clientX - svg.getBoundingClientRect().left, event.clientY - svg.getBoundingClientRect().top];
    const far = (each) => Math.hypot(each.x - x, each.y - y);
    const near = marks.reduce((best, each) => (far(each) <= far(best) ? each : best));  // of equals the one drawn last
    return far(near) <= reach ? near : null;
  };
  const show = (found) => (found ? showTip(tip, svg, found) : tip.setAttribute("hidden", ""));
  svg.addEventListener("pointermove", (event) => show(nearest(event, 18)));
  svg.addEventListener("pointerleave", () => show(null));
  svg.addEventListener("click", (event) => {
    const found = nearest(event, 28);
    if (found) choose(found.point);
  });
  const order = marks.toSorted((one, other) => one.x - other.x || one.y - other.y);
  const start = order.find(({ point }) => point === chosen) || order[0];
  start.mark.setAttribute("tabindex", 0);
  svg.addEventListener("focusin", (event) => show(marks.find(({ mark }) => mark === event.target)));
  svg.addEventListener("focusout", () => show(null));
  svg.addEventListener("keydown", (event) => {
    const here = order.findIndex(({ mark }) => mark === event.target);
    const goal = { ArrowRight: here + 1, ArrowDown: here + 1, ArrowLeft: here - 1, ArrowUp: here - 1, Home: 0, End: order.length - 1 }[event.key];
    if (event.key === "Enter" || event.key === " ") choose(order[here].point);
    else if (goal === undefined) return;
    else if (order[goal]) {
      order[here].mark.setAttribute("tabindex", -1);
      order[goal].mark.setAttribute("tabindex", 0);
      order[goal].mark.focus();
    }
    event.preventDefault();
  });
}

function showTip(tip, svg, { point, x, y }) {
  const numbers = `${point.x.toFixed(2)}x, loss ${point.y.toFixed(3)}`;
  tip.replaceChildren(...[point.title, numbers, ...point.lines].map((line, row) => make(row ? "span" : "strong", {}, line)));
  tip.removeAttribute("hidden");
  const [wide, high] = [tip.offsetWidth, tip.offsetHeight];
  tip.style.left = `${Math.max(8, Math.min(x - wide / 2 + 8, svg.clientWidth - wide + 8))}px`;
  tip.style.top = `${y - high - 8 > 0 ? y - high - 8 : y + 24}px`;
}

function drawLegend() {
  const entries = Object.entries(study.front.kinds).map(([kind, name]) => {
    const sample = points.findLast((point) => point.kind === kind && (kind !== "front-point" || point.shape !== "preset")) || { kind };
    const mark = draw("svg", { viewBox: "-9 -9 18 18", "aria-hidden": true }, draw("path", { class: `mark ${kind}`, d: shape(sample) }));
    const made = button(name, true, () => {
      hidden[hidden.has(kind) ? "delete" : "add"](kind);
      if (hidden.size === Object.keys(study.front.kinds).length) hidden.delete(kind);
      made.setAttribute("aria-pressed", !hidden.has(kind));
      drawFront();
    });
    made.prepend(mark);
    return made;
  });
  byId("legend").replaceChildren(...entries);
}

function choose(point) {
  chosen = point;
  markChosen();
  showChosen();
  showPictures();
}

function markChosen() {
  for (const mark of byId("front").querySelectorAll(".mark")) mark.classList.toggle("chosen", mark.dataset.trial === String(chosen.trial));
}

function showChosen() {
  const splits = Object.keys(chosen.numbers);
  const names = new Set(splits.flatMap((split) => Object.keys(chosen.numbers[split])));
  const rows = [...names].map((name) => [name, ...splits.map((split) => chosen.numbers[split][name] || "-")]);
  byId("chosen").replaceChildren(
    make("h3", {}, chosen.title),
    make("ul", { class: "schedule" }, ...chosen.lines.map((line) => make("li", {}, line))),
    table(["", ...splits], rows),
    ...(chosen.note ? [make("p", {}, `Note: ${chosen.note}`)] : []),
    ...chosen.tiers.map((tier) => make("p", { class: "file" }, `${study.folder}/policies/${tier}.json`)),
  );
}

function table(heads, rows) {
  const head = make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)));
  const body = rows.map(([name, ...cells]) => make("tr", {}, make("th", { scope: "row" }, name), ...cells.map((cell) => make("td", {}, cell))));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
}

function showPictures() {
  byId("pictures-section").hidden = !pictures;
  if (!pictures) return;
  const shown = pictures.policies[chosen.trial];
  const members = points.filter((point) => pictures.policies[point.trial]);
  byId("tiers").replaceChildren(...members.map((point) => button(point.label, point === chosen, () => {
    choose(point);
    byId("tiers").querySelector("[aria-pressed=true]").focus();
  })));
  byId("pictures").replaceChildren(...(shown ? wall(shown) : [make("p", { class: "hint" }, "Pictures are kept of the tiers; choose one of them.")]));
}

function wall(shown) {
  const figures = pictures.prompts.map((prompt, place) => {
    const layers = { dense: pictures.dense, policy: shown.policy, difference: shown.difference };
    const images = Object.entries(layers).map(([name, uris]) => make("img", { class: name, src: uris[place], alt: `${name}: ${prompt}` }));
    return make("figure", {}, make("div", { class: pictures.clip ? "stack clip" : "stack" }, ...images), make("figcaption", {}, prompt));
  });
  const made = make("div", { class: "wall" }, ...figures);
  const slider = make("input", { type: "range", min: 0, max: 2, step: 0.02, value: 1, "aria-label": "From dense over policy to difference" });
  const stops = ["dense", "policy", `difference x ${pictures.gain}`];
  const buttons = stops.map((name, value) => button(name, value === 1, () => {
    slider.value = value;
    slide();
  }));
  const slide = () => {
    const value = Number(slider.value);
    made.style.setProperty("--policy", Math.min(value, 1));
    made.style.setProperty("--difference", Math.max(value - 1, 0));
    slider.setAttribute("aria-valuetext", Number.isInteger(value) ? stops[value] : `between ${stops[Math.floor(value)]} and ${stops[Math.ceil(value)]}`);
    buttons.forEach((each, place) => each.setAttribute("aria-pressed", place === value));
  };
  slider.addEventListener("input", slide);
  slide();
  return [make("div", { class: "slider" }, slider, make("div", { class: "stops" }, ...buttons)), made];
}

// Steps through all videos of the page at once; one that someone has moved by hand, or who wants no motion, stands still.
function playClips() {
  if (!pictures?.clip) return;
  const { frames, columns, rate, ratio } = pictures.clip;
  const host = byId("pictures");
  for (const [name, value] of Object.entries({ ratio, columns, rows: Math.ceil(frames / columns) })) host.style.setProperty(`--${name}`, value);
  let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  const place = make("input", { type: "range", min: 0, max: frames - 1, value: 0, "aria-label": "Frame" });
  const count = make("span", { class: "hint" });
  const show = (frame) => {
    place.value = frame;
    count.textContent = `frame ${frame + 1} of ${frames}`;
    host.style.setProperty("--column", frame % columns);
    host.style.setProperty("--row", Math.floor(frame / columns));
  };
  const play = (wanted) => {
    playing = wanted;
    toggle.setAttribute("aria-pressed", playing);
  };
  const toggle = button("Play", playing, () => play(!playing));
  place.addEventListener("input", () => {
    play(false);
    show(Number(place.value));
  });
  byId("clip").replaceChildren(toggle, place, count);
  byId("clip").hidden = false;
  show(0);
  setInterval(() => playing && show((Number(place.value) + 1) % frames), 1000 / rate);
}

function drawHistory() {
  const { trials, values, presets } = study.history;
  const host = byId("history");
  const last = trials[trials.length - 1];
  const range = [trials[0], Math.max(last, trials[0] + 1), 0, 1.1 * Math.max(...values, presets) || 1];
  const drawn = chart(host, 280, range, { title: "Hypervolume over the trials", unit: "", x: "trial", y: "hypervolume" });
  const { svg, place, box } = drawn;
  const steps = values.map((value, row) => `${row ? `H${place.x(trials[row])}V` : `M${place.x(trials[row])} `}${place.y(value)}`);
  svg.append(draw("path", { class: "line", d: steps.join("") }));
  if (presets) {
    svg.append(draw("path", { class: "line presets", d: `M${box.left} ${place.y(presets)}H${box.right}` }));
    svg.append(draw("text", { class: "label preset", x: box.right, y: place.y(presets) + 16, "text-anchor": "end" }, `presets alone ${presets.toFixed(3)}`));
  }
  const text = `after trial ${last}: ${values[values.length - 1].toFixed(3)}`;
  svg.append(draw("text", { class: "label front-point", x: box.right, y: place.y(values[values.length - 1]) - 8, "text-anchor": "end" }, text));
  svg.setAttribute("aria-label", `Hypervolume over the trials, ${text}; presets alone ${presets.toFixed(3)}`);
  svg.setAttribute("role", "img");
  host.replaceChildren(svg);
}

function drawTimes() {
  const rows = study.times.filter((row) => row.parts.length);
  byId("times-section").hidden = !rows.length;
  if (!rows.length) return;
  const total = (row) => row.parts.reduce((sum, part) => sum + part.ms, 0);
  const longest = Math.max(...rows.map(total));
  const scales = Math.max(...rows.flatMap((row) => row.parts.map((part) => part.scale)));
  const bars = rows.map((row) => {
    const spans = row.parts.map((part) => segment(part, longest, scales));
    const segments = make("div", { class: "segments", role: "img", "aria-label": `${row.name}: ${total(row).toFixed(1)} milliseconds, by scale in the table below` }, ...spans);
    return make("div", { class: "row" }, make("div", {}, make("span", {}, row.name), make("span", {}, `${total(row).toFixed(1)} ms`)), segments);
  });
  const missing = study.times.filter((row) => !row.parts.length).map((row) => row.name);
  const note = missing.length ? [make("p", { class: "hint" }, `Not shown: ${missing.join(", ")}: what runs depends on the data, or was not timed.`)] : [];
  const labels = [...new Set(rows.flatMap((row) => row.parts.map((part) => part.label)))];
  labels.push(labels.splice(labels.indexOf("text and decoding"), 1)[0]);
  const cell = (row, label) => row.parts.filter((part) => part.label === label).map((part) => `${part.ms.toFixed(1)} ± ${part.spread.toFixed(1)}`)[0] || "-";
  const numbers = table(["ms", ...rows.map((row) => row.name)], labels.map((label) => [label, ...rows.map((row) => cell(row, label))]));
  byId("times").replaceChildren(...bars, ...note, make("details", {}, make("summary", {}, "Numbers"), make("div", { class: "scroll", tabindex: 0 }, numbers)));
}

function segment(part, longest, scales) {
  const share = part.scale < 0 ? null : part.scale / Math.max(1, scales);
  const made = make("span", { title: `${part.label}: ${part.ms.toFixed(1)} ± ${part.spread.toFixed(1)} ms` }, part.ms > 0.04 * longest && share !== null ? `${part.scale}` : "");
  made.style.width = `${(100 * part.ms) / longest}%`;
  made.style.background = share === null ? "var(--rejected)" : `oklch(${0.38 + 0.48 * share} 0.13 ${290 - 190 * share})`;
  made.style.color = share > 0.5 ? "#000" : "#fff";
  return made;
}

function drawDimensions() {
  const rank = (row) => Math.max(row.owed, row.latency, row.loss);
  const rows = study.dimensions.filter((row) => rank(row) >= 0.01).sort((one, other) => rank(other) - rank(one));
  byId("dimensions-section").hidden = !rows.length;
  const bar = (row, name) => {
    const filled = make("div", { class: `bar ${name}` });
    filled.style.width = `${100 * row[name]}%`;
    return make("div", {}, `${(100 * row[name]).toFixed(1)} %`, filled);
  };
  const cells = rows.map((row) => [`${row.name} (${row.used})`, ...["owed", "latency", "loss"].map((name) => bar(row, name))]);
  const rest = study.dimensions.length - rows.length;
  const note = rest ? [make("p", { class: "hint" }, `${rest} more below 1 % in all three.`)] : [];
  byId("dimensions").replaceChildren(table(["dimension (trials using it)", "front owes", "latency", "loss"], cells), ...note);
}

function drawCommands() {
  const rows = Object.entries(study.commands).flatMap(([purpose, command]) => {
    const code = make("code", {}, command);
    const copy = make("button", { type: "button", "aria-label": `Copy: ${purpose}` }, "Copy");
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(command);
        copy.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        copy.textContent = "Selected";
      }
    });
    return [make("div", {}, purpose), make("div", { class: "command" }, code, copy)];
  });
  byId("commands").replaceChildren(...rows);
}

byId("status").textContent = study.status;
byId("status").classList.toggle("stopped", study.stopped);
byId("findings").replaceChildren(...study.findings.map((line) => make("li", {}, line)));
byId("conditions").replaceChildren(...Object.entries(study.conditions).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
drawLegend();
playClips();
choose(chosen);
drawTimes();
drawDimensions();
drawCommands();
let width = 0;
new ResizeObserver(() => {
  if (byId("front").clientWidth === width) return;
  width = byId("front").clientWidth;
  drawFront();
  drawHistory();
}).observe(byId("front"));
