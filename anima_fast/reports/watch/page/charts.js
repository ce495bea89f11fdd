// The curves of a run: which series go into which chart, and the tools above the first one.

import { SigmaBars } from "./bars.js";
import { Chart } from "./chart.js";
import { axisNumber, exponent, say, several, short } from "./format.js";
import { emptyTable, merge, smooth } from "./store.js";

// Steps over which a curve is averaged, by place of the slider. Untouched, it follows the run: a fifth
// of it up to 50 steps, and a fiftieth of long ones.
const WINDOWS = [0, 5, 10, 20, 50, 100, 200, 500, 1000, 5000];
const COLORS = 6;

const byId = (id) => document.getElementById(id);

let table = emptyTable();
let marks = { validation: null, epochs: [], events: [], sigma_bins: [] };
let settings = { window: null, raw: true, log: false, part: 1 };

const charts = {
  loss: new Chart(byId("chart-loss"), { format: short, tick: axisNumber, empty: "No step was logged yet." }),
  rate: new Chart(byId("chart-rate"), { format: exponent, tick: (v) => exponent(Number(v.toPrecision(3))), zero: true }),
  speed: new Chart(byId("chart-speed"), { format: (v) => short(v, 3), tick: axisNumber, zero: true }),
  memory: new Chart(byId("chart-memory"), { format: (v) => short(v, 3), tick: axisNumber, zero: true }),
  norm: new Chart(byId("chart-norm"), { format: (v) => short(v, 3), tick: axisNumber, zero: true }),
};
const bars = new SigmaBars(byId("chart-sigma"));

for (const chart of Object.values(charts)) {
  chart.onHover = (step, aloud = false) => {
    for (const other of Object.values(charts)) {
      const text = other.hover(step);
      if (aloud && other === chart) say("read-out", text);
    }
  };
}

/** Take in what an answer holds about curves and draw what changed. */
export function updateCharts(answer) {
  const changed = answer.log.steps.length > 1 || answer.log.first === 0 || answer.log.steps.at(-1) !== table.steps.at(-1);
  table = merge(table, answer.log);
  if (answer.marks) marks = answer.marks;
  charts.loss.setEmpty(whyEmpty(answer));
  if (changed || answer.marks) draw();
}

function whyEmpty({ state, folder_exists: exists, out }) {
  if (state.name === "waiting") {
    const where = exists ? "in this folder" : `: ${out} does not exist yet`;
    return `Waiting for a run ${where}. Start the training with it as --output_dir.`.replace(" :", ":");
  }
  return state.name === "preparing" ? state.text : "No step was logged.";
}

function place() {
  const steps = table.steps.at(-1) ?? 0;
  const most = Math.max(5, Math.min(50, steps / 5), steps / 50);
  return settings.window ?? WINDOWS.findLastIndex((one) => one <= most);
}

/** Steps over which curves are averaged now. */
const averaged = () => WINDOWS[place()] ?? 0;

/** The newest point of the smoothed loss, for the tiles. */
export function smoothedLoss() {
  const values = smooth(column("loss").mean ?? [], averaged(), table.stride);
  return values.findLast((value) => value !== null) ?? null;
}

function column(name) {
  return table.columns[name] ?? {};
}

function series(name, shown, options = {}) {
  const { mean = [], low, high } = column(name);
  return { name: shown, x: table.steps, y: mean, low, high, color: 1, style: "line", ...options };
}

/** A column as a faint curve and its smoothed one; only the latter without the tick at "each step". */
function noisy(name, { clip = false, from = 0 } = {}) {
  const raw = series(name, "each step", { style: "faint", clip: true });
  if (from) raw.y = raw.y.map((value, i) => (i < from ? null : value));
  if (from && raw.low) raw.low = raw.high = null;
  const window = averaged();
  const smoothed = { ...raw, name: "smoothed", style: "line", y: smooth(raw.y, window, table.stride) };
  Object.assign(smoothed, { low: null, high: null, clip });
  if (!window) return [{ ...raw, style: "line" }];
  return settings.raw ? [raw, smoothed] : [smoothed];
}

function lossSeries() {
  const validation = marks.validation;
  const dots = validation?.columns?.loss?.mean ?? [];
  const shown = noisy("loss");
  if (dots.length) shown.push({ name: "validation", x: validation.steps, y: dots, color: 2, style: "dots" });
  return shown;
}

function rateSeries() {
  // Adaptive optimizers log the rate they really use next to the scheduled one.
  const names = Object.keys(table.columns).filter((name) => /^(d_)?lr\//.test(name));
  const used = names.some((n) => n.startsWith("d_lr/") && column(n).mean.some((v) => v !== null));
  const groups = names.filter((name) => name.startsWith(used ? "d_lr/" : "lr/"));
  return groups.slice(0, COLORS).map((name, i) => series(name, name.replace(/^d?_?lr\//, ""), { color: 1 + i }));
}

/** Peak memory, in GiB as soon as there is one. */
function memorySeries() {
  const { high, mean = [] } = column("memory_mib");
  const values = high ?? mean;
  const unit = Math.max(0, ...values.filter(Number.isFinite)) < 1024 ? ["MiB", 1] : ["GiB", 1024];
  const y = values.map((value) => (Number.isFinite(value) ? value / unit[1] : null));
  return { name: unit[0], x: table.steps, y, color: 4, style: "line" };
}

function range() {
  const steps = table.steps;
  if (settings.part === 1 || steps.length < 3) return null;
  const [first, last] = [steps[0], steps.at(-1)];
  return [last - (last - first) * settings.part, last];
}

function draw() {
  showWindow();
  const events = marks.events.slice(-100).map((event) => ({ x: event.step, text: event.text, kind: "happened" }));
  const epochs = marks.epochs.length > 1 && marks.epochs.length <= 40
    ? marks.epochs.map(([step, epoch]) => ({ x: step, text: `end of epoch ${epoch}`, kind: "epoch" }))
    : [];
  const shared = { range: range() };
  charts.loss.set({ series: lossSeries(), marks: [...epochs, ...events], log: settings.log, ...shared });
  charts.rate.set({ series: rateSeries(), ...shared });
  // The first step reads, compiles and allocates: next to the others it would hide them.
  charts.speed.set({ series: noisy("step_s", { clip: true, from: table.steps.length > 1 ? 1 : 0 }), ...shared });
  charts.memory.set({ series: [memorySeries()], ...shared });
  charts.norm.set({ series: noisy("grad_norm"), ...shared });
  bars.set(marks.sigma_bins, marks.validation);
}

function showWindow() {
  const slider = byId("smooth");
  const text = averaged() ? several(averaged(), "step") : "off";
  slider.value = place();
  say("smooth-text", text);
  slider.setAttribute("aria-valuetext", text);
}

function press(group, button) {
  for (const one of group.querySelectorAll("button")) one.setAttribute("aria-pressed", one === button);
}

function setUp() {
  const slider = byId("smooth");
  slider.max = WINDOWS.length - 1;
  try {
    settings = { ...settings, ...JSON.parse(localStorage.getItem("watch-curves") ?? "{}") };
  } catch {
    // A browser that keeps nothing starts with the defaults.
  }
  byId("raw").checked = settings.raw;
  byId("logarithm").checked = settings.log;
  const change = (values) => {
    settings = { ...settings, ...values };
    try {
      localStorage.setItem("watch-curves", JSON.stringify({ ...settings, part: 1 }));
    } catch {
      // As above.
    }
    draw();
  };
  slider.addEventListener("input", () => change({ window: Number(slider.value) }));
  byId("raw").addEventListener("change", (event) => change({ raw: event.target.checked }));
  byId("logarithm").addEventListener("change", (event) => change({ log: event.target.checked }));
  byId("range").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    press(byId("range"), button);
    change({ part: Number(button.dataset.part) });
  });
  change({});
}

setUp();
