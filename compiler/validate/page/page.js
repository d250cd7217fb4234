"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const LEVELS = data.levels; // [{name, title, meaning}], weakest first
const rank = Object.fromEntries(LEVELS.map((level, index) => [level.name, index]));
const by = (list) => Object.fromEntries(list.map((item) => [item.name, item]));
const models = by(data.models), precisions = by(data.precisions), gpus = by(data.gpus);
const parts = data.gpus.flatMap((gpu) => gpu.parts.map((part) => ({ ...part, gpu: gpu.name })));
const SHOWS = {
  evidence: { title: "Evidence level", text: (cell) => LEVELS[rank[cell.level]].title },
  kl: { title: "Mean KL from float32", text: (cell) => tiny(numbersOf(cell).mean_kl), value: (cell) => numbersOf(cell).mean_kl },
  top1: { title: "Same first token", text: (cell) => percent(numbersOf(cell).top1), value: (cell) => -numbersOf(cell).top1 },
  relative: { title: "Relative error", text: (cell) => tiny(numbersOf(cell).relative), value: (cell) => numbersOf(cell).relative },
  perplexity: { title: "Perplexity change", text: (cell) => change(numbersOf(cell)), value: (cell) => numbersOf(cell).perplexity },
  bits: { title: "Bits per weight", text: (cell) => number(numbersOf(cell).bits_per_weight, 1), value: (cell) => numbersOf(cell).bits_per_weight },
  weights: { title: "Weights, published size", text: (cell) => bytes(numbersOf(cell).weight_bytes), value: (cell) => numbersOf(cell).weight_bytes },
};
const SORTS = { given: "As listed", name: "Name", known: "Most known first", error: "Largest error first" };
const state = { gpu: "any", toolchain: "any", show: "evidence", sort: "given", find: "", levels: new Set(LEVELS.map((l) => l.name)) };

// ---- small helpers

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
function number(value, digits = 2) { return value === null || value === undefined || Number.isNaN(value) ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits }); }
function tiny(value) { return value === null || value === undefined ? "–" : value === 0 ? "0" : value >= 0.01 && value < 1000 ? value.toPrecision(2) : value.toExponential(1).replace("e-", "e−"); }
function percent(value, digits = 1) { return value === null || value === undefined ? "–" : (100 * value).toFixed(digits) + " %"; }
function change(n) { return n.perplexity ? (100 * (n.perplexity / n.reference_perplexity - 1)).toFixed(2).replace(/^(?=\d)/, "+").replace("-", "−") + " %" : "–"; }
function bytes(value) {
  if (value === null || value === undefined) return "–";
  const unit = ["B", "kB", "MB", "GB", "TB"]; let index = 0;
  while (value >= 999.5 && index < 4) { value /= 1000; index += 1; }
  return value.toPrecision(3).replace(/\.0+$/, "") + " " + unit[index];
}
function numbersOf(cell) { return data.numbers[cell.model + "|" + cell.precision] ?? {}; }
function fill(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, title]) => el("option", { value, selected: value === chosen }, title)));
}

// ---- which cell stands for a place in the matrix: the best known of those that the choices admit

const index = new Map();
for (const row of data.cells.rows) {
  const cell = Object.fromEntries(data.cells.keys.map((key, column) => [key, data.cells.texts[row[column]]]));
  cell.evidence = row[row.length - 2];
  cell.stale = Boolean(row[row.length - 1]);
  const key = cell.model + "|" + cell.precision;
  if (!index.has(key)) index.set(key, []);
  index.get(key).push(cell);
}
function cellAt(model, precision) {
  const found = (index.get(model + "|" + precision) ?? []).filter(
    (cell) => (state.gpu === "any" ? cell.gpu !== "cpu" : cell.gpu === state.gpu) && (state.toolchain === "any" || cell.toolchain === state.toolchain));
  return found.reduce((best, cell) => (best === null || rank[cell.level] > rank[best.level] ? cell : best), null);
}

// ---- totals and the matrix

function totals() {
  const counts = Object.fromEntries(LEVELS.map((level) => [level.name, 0]));
  for (const model of data.models) for (const precision of data.precisions) {
    const cell = cellAt(model.name, precision.name);
    if (cell) counts[cell.level] += 1;
  }
  $("totals").replaceChildren(...[...LEVELS].reverse().map((level) => el("li", {}, el("button", {
    type: "button", class: level.name, "aria-pressed": String(state.levels.has(level.name)), title: level.meaning,
    onclick: () => { state.levels.has(level.name) ? state.levels.delete(level.name) : state.levels.add(level.name); render(); },
  }, el("strong", {}, String(counts[level.name])), level.title))));
}
function rows() {
  const words = state.find.toLowerCase().trim();
  const chosen = data.models.filter((model) => (model.name + " " + model.title).toLowerCase().includes(words));
  const cells = (model) => data.precisions.map((precision) => cellAt(model.name, precision.name)).filter(Boolean);
  const worst = (model) => Math.max(0, ...cells(model).map((cell) => numbersOf(cell).mean_kl ?? 0));
  const known = (model) => cells(model).reduce((sum, cell) => sum + rank[cell.level], 0);
  if (state.sort === "name") chosen.sort((a, b) => a.title.localeCompare(b.title));
  if (state.sort === "known") chosen.sort((a, b) => known(b) - known(a));
  if (state.sort === "error") chosen.sort((a, b) => worst(b) - worst(a));
  return chosen;
}
function matrix() {
  const show = SHOWS[state.show], chosen = rows();
  const head = el("tr", {}, el("th", { scope: "col" }, "Model"),
    ...data.precisions.map((precision) => el("th", { scope: "col", title: precision.meaning }, precision.title)));
  const body = chosen.map((model) => el("tr", {}, el("th", { scope: "row" }, model.title), ...data.precisions.map((precision) => {
    const cell = cellAt(model.name, precision.name);
    if (cell === null || !state.levels.has(cell.level)) return el("td", {});
    const level = LEVELS[rank[cell.level]];
    return el("td", {}, el("button", {
      type: "button", class: cell.level + (cell.stale ? " stale" : ""), "data-model": model.name, "data-precision": precision.name,
      "aria-label": `${model.title}, ${precision.title}: ${level.title}${cell.stale ? ", stale" : ""}. ${show.text(cell)}`,
      title: cell.reason, onclick: () => openCell(cell),
    }, show.text(cell)));
  })));
  $("grid").replaceChildren(el("thead", {}, head), el("tbody", {}, ...body));
  const where = [state.gpu === "any" ? "the best of all GPUs" : gpus[state.gpu].title, state.toolchain === "any" ? "any toolchain" : state.toolchain];
  $("caption").textContent = `${chosen.length} models × ${data.precisions.length} precisions; ${where.join(", ")}. Open a cell for its reasons and numbers.`;
}
$("grid").addEventListener("keydown", (event) => {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const move = moves[event.key], td = event.target.closest("td");
  if (!move || !td) return;
  let row = td.parentElement, column = td.cellIndex;
  do {
    row = move[0] ? row.parentElement.rows[row.sectionRowIndex + move[0]] : row;
    column += move[1];
    const button = row?.cells[column]?.querySelector("button");
    if (button) { event.preventDefault(); button.focus(); return; }
  } while (row && row.cells[column]);
});

// ---- one cell

function table(head, lines) {
  // words may break, numbers may not; what is still too wide scrolls by itself
  return el("div", { class: "wide" }, el("table", {}, el("thead", {}, el("tr", {}, ...head.map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, ...lines.map((line) => el("tr", {}, ...line.map((text) => el("td", { class: /[a-z]{3}.* .*[a-z]{3}/i.test(text) ? "text" : null }, text)))))));
}
function openCell(cell) {
  const model = models[cell.model], precision = precisions[cell.precision], n = numbersOf(cell), level = LEVELS[rank[cell.level]];
  $("cell-title").textContent = `${model.title}, ${precision.title}`;
  const body = [el("p", {}, el("span", { class: "badge " + cell.level }, level.title), " ", level.meaning),
    el("p", {}, `On ${gpus[cell.gpu]?.title ?? cell.gpu} with ${cell.toolchain}: `, cell.reason, " ", el("code", {}, cell.code))];
  if (model.had) body.push(el("p", {}, model.had.includes(cell.precision) ? "The system whose matrix this is had it." : "The system whose matrix this is left this cell blank."));
  if (precision.meaning) body.push(el("p", { class: "note" }, precision.meaning));
  if (n.mean_kl !== undefined) body.push(el("h3", {}, "Against float32, " + n.subject), table(["measure", "value", "bound"], [
    ["mean KL divergence, nats", tiny(n.mean_kl), tiny(n.bound_kl)], ["same first token", percent(n.top1), ""], ["same five likeliest", percent(n.top5), ""],
    ["greatest absolute error of a logit", tiny(n.max_abs), ""], ["relative error", tiny(n.relative), tiny(n.bound_relative)], ["1 − cosine", tiny(n.cosine_distance), ""],
    ...(n.perplexity ? [["perplexity", `${n.perplexity.toFixed(3)} (float32 ${n.reference_perplexity.toFixed(3)}, ${change(n)})`, ""]] : []),
  ]));
  if (n.weight_bytes !== undefined) body.push(el("h3", {}, `Size, ${model.size}`), table(["", ""], [
    ["weights", bytes(n.weight_bytes)], ["bits per weight", number(n.bits_per_weight, 2)], ["KV cache for a token", bytes(n.kv_bytes_per_token)]]));
  if (cell.evidence.length) body.push(el("h3", {}, "Evidence"), table(["level", "when", "with", "what"], cell.evidence.map((key) => {
    const item = data.evidence[key];
    return [LEVELS[rank[item.level]].title + (item.stale ? " (stale: " + item.stale + ")" : ""), item.date, item.versions, item.text];
  })));
  if (n.profile?.length) body.push(el("h3", {}, "Error along the model"), profile(n.profile), el("details", {}, el("summary", {}, "as a table"),
    table(["value", "relative error", "spec"], n.profile.map((step) => [step.value, tiny(step.relative), step.place]))));
  const fits = data.fits[cell.model + "|" + cell.precision];
  if (fits) body.push(el("h3", {}, `Fit and predicted speed, ${model.size}`), table(
    ["part", "largest batch × context", "decode, batch 1", "decode, largest batch"], parts.filter((part) => state.gpu === "any" || part.gpu === state.gpu).map((part) => {
      const fit = fits[part.name];
      return [part.title, fit.batch ? `${number(fit.batch)} × ${number(fit.context)}` : "does not fit", fit.batch ? number(fit.decode_1, 0) + " tokens/s" : "–", fit.batch ? number(fit.decode_max, 0) + " tokens/s" : "–"];
    })));
  const again = data.again.replace(/{(\w+)}/g, (_, key) => (key === "source" ? model.source : cell[key]));
  body.push(el("h3", {}, "Again"), el("div", { class: "command" }, el("code", { id: "command" }, again),
    el("button", { type: "button", id: "copy", onclick: (event) => copy(again, event.target) }, "Copy")));
  $("cell-body").replaceChildren(...body);
  $("cell").showModal();
}
async function copy(text, button) {
  try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; }
  catch { getSelection().selectAllChildren($("command")); button.textContent = "Selected: press Ctrl+C"; }
}

// ---- charts

const svg = (width, height, label) => draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label });
function scale(values, from, to, logarithmic = false) {
  const f = logarithmic ? Math.log10 : (x) => x, low = f(Math.min(...values)), high = f(Math.max(...values)), span = high - low || 1;
  return (x) => from + ((f(x) - low) / span) * (to - from);
}
function profile(steps) {
  const found = steps.filter((step) => step.relative > 0), width = 840, height = 190;
  if (!found.length) return el("p", {}, "no error at any value");
  const chart = svg(width, height, "relative error of each value, in the order of the model");
  const x = scale([0, steps.length - 1], 60, width - 10), y = scale(found.flatMap((step) => [step.relative]), height - 24, 12, true);
  for (const value of [Math.min(...found.map((s) => s.relative)), Math.max(...found.map((s) => s.relative))])
    chart.append(draw("line", { x1: 60, x2: width - 10, y1: y(value), y2: y(value), class: "axis" }), label(chart, 54, y(value) + 4, tiny(value), "end"));
  steps.forEach((step, i) => { if (step.relative > 0) chart.append(draw("circle", { cx: x(i), cy: y(step.relative), r: 3 }, draw("title", {}, document.createTextNode(`${step.value}: ${tiny(step.relative)}`)))); });
  chart.append(label(chart, 60, height - 6, "first value", "start"), label(chart, width - 10, height - 6, "last value", "end"));
  return el("figure", { class: "chart" }, chart);
}
function label(_, x, y, text, anchor = "start") { return draw("text", { x, y, "text-anchor": anchor }, document.createTextNode(text)); }
const FLOOR = 1e-8; // below is the rounding of float32 itself
function pareto() {
  const points = Object.entries(data.numbers).map(([key, n]) => ({ key, x: n.bits_per_weight, y: n.mean_kl > 0 ? Math.max(n.mean_kl, FLOOR) : n.mean_kl })).filter((p) => p.x && p.y > 0);
  if (!points.length) { $("pareto").replaceChildren(el("p", {}, "No cell has both numbers.")); return; }
  const width = 900, height = 380, chart = svg(width, height, "mean KL divergence against bits of a stored weight");
  const x = scale([0, ...points.map((p) => p.x)], 70, width - 20), y = scale(points.map((p) => p.y), height - 44, 14, true);
  const low = Math.ceil(Math.log10(Math.min(...points.map((p) => p.y)))), high = Math.floor(Math.log10(Math.max(...points.map((p) => p.y))));
  for (let power = low; power <= high; power += Math.max(1, Math.round((high - low) / 6)))
    chart.append(draw("line", { x1: 70, x2: width - 20, y1: y(10 ** power), y2: y(10 ** power), class: "axis" }), label(chart, 62, y(10 ** power) + 4, tiny(10 ** power), "end"));
  for (const bits of [4, 8, 16, 32].filter((b) => b <= Math.max(...points.map((p) => p.x))))
    chart.append(draw("line", { x1: x(bits), x2: x(bits), y1: 14, y2: height - 44, class: "axis" }), label(chart, x(bits), height - 26, bits + " bits", "middle"));
  const front = [];
  for (const point of [...points].sort((a, b) => a.x - b.x || a.y - b.y)) if (!front.length || point.y < front[front.length - 1].y) front.push(point);
  chart.append(draw("polyline", { class: "front", points: front.map((p) => `${x(p.x)},${y(p.y)}`).join(" ") }));
  for (const point of points) {
    const [model, precision] = point.key.split("|");
    chart.append(draw("circle", { cx: x(point.x), cy: y(point.y), r: 4 }, draw("title", {}, document.createTextNode(`${models[model]?.title ?? model}, ${precisions[precision]?.title ?? precision}: ${tiny(point.y)} at ${number(point.x, 2)} bits`))));
  }
  $("pareto").replaceChildren(chart);
}
function memory() {
  const model = models[$("model").value], part = parts.find((p) => p.name === $("part").value);
  const lines = data.precisions.map((precision) => ({ precision, n: data.numbers[model.name + "|" + precision.name], fit: data.fits[model.name + "|" + precision.name]?.[part?.name] })).filter((line) => line.n?.weight_bytes);
  const width = 620, left = 130, row = 26, height = lines.length * row + 44;
  const stack = svg(width, height, `memory of ${model.title} ${model.size} by precision`), roof = svg(width, height, `predicted decode speed of ${model.title} ${model.size}`);
  const kv = (n) => n.kv_bytes_per_token * model.context, capacity = (part?.memory_gb ?? 0) * 1e9;
  const x = scale([0, ...lines.map((line) => line.n.weight_bytes + kv(line.n)), capacity], left, width - 90);
  const s = scale([0, ...lines.map((line) => line.fit?.decode_1 ?? 0)], left, width - 90);
  stack.append(label(stack, left, 14, `weights, then KV cache of one sequence of ${number(model.context)} tokens`));
  roof.append(label(roof, left, 14, `decode at batch 1 on ${part?.title ?? "–"}, tokens/s, 80 % of its bandwidth`));
  lines.forEach((line, i) => {
    const y = 24 + i * row, end = line.n.weight_bytes + kv(line.n);
    stack.append(label(stack, left - 8, y + 15, line.precision.title, "end"), draw("rect", { class: "a", x: left, y, width: x(line.n.weight_bytes) - left, height: row - 8 }),
      draw("rect", { class: "b", x: x(line.n.weight_bytes), y, width: Math.max(0, x(end) - x(line.n.weight_bytes)), height: row - 8 }), label(stack, x(end) + 6, y + 15, bytes(end)));
    const speed = line.fit?.batch ? line.fit.decode_1 : 0;
    roof.append(label(roof, left - 8, y + 15, line.precision.title, "end"), draw("rect", { class: "a", x: left, y, width: Math.max(0, s(speed) - left), height: row - 8 }),
      label(roof, s(speed) + 6, y + 15, speed ? number(speed, 0) : "does not fit"));
  });
  if (capacity) stack.append(draw("line", { x1: x(capacity), x2: x(capacity), y1: 20, y2: height - 18, class: "front" }), label(stack, x(capacity), height - 4, part.title + " holds " + bytes(capacity), "middle"));
  $("memory").replaceChildren(stack);
  $("roofline").replaceChildren(roof);
}

// ---- the page

function render() { totals(); matrix(); }
fill($("gpu"), [["any", "best of all"], ...data.gpus.map((gpu) => [gpu.name, gpu.title])], state.gpu);
fill($("toolchain"), [["any", "any"], ...data.toolchains.map((t) => [t.name, t.title])], state.toolchain);
fill($("show"), Object.entries(SHOWS).map(([key, show]) => [key, show.title]), state.show);
fill($("sort"), Object.entries(SORTS), state.sort);
fill($("model"), data.models.filter((m) => m.size).map((m) => [m.name, `${m.title} ${m.size}`]));
fill($("part"), parts.map((part) => [part.name, part.title]), parts.find((part) => part.name.startsWith("h100"))?.name);
for (const key of ["gpu", "toolchain", "show", "sort", "find"]) $(key).addEventListener("input", (event) => { state[key] = event.target.value; render(); });
for (const form of document.querySelectorAll("form.controls")) form.addEventListener("submit", (event) => event.preventDefault());
for (const key of ["model", "part"]) $(key).addEventListener("input", memory);
function isDark() { return (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark"; }
function nameTheme() { $("theme").textContent = isDark() ? "Light" : "Dark"; $("theme").setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`); }
$("theme").addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); });
nameTheme();
$("about").textContent = data.about;
$("foot").textContent = `${data.command} · ${data.date} · ${data.versions}`;
render();
pareto();
if (data.models.some((m) => m.size)) memory();
