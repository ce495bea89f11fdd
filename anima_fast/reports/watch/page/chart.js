// One line chart as SVG: axes, lines, dots and bands, a crosshair, and a legend that reads values.

import { make } from "./format.js";
import { makeScale, nearest, ticks } from "./scale.js";

const SVG = "http://www.w3.org/2000/svg";
let clips = 0;

function svg(tag, attributes = {}, text = null) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null) element.textContent = text;
  return element;
}

/**
 * A chart inside a card.
 *
 * A series is {name, color: 1..6, x, y, low?, high?, style: "line" | "faint" | "dots"}, y null where
 * nothing is known; `clip: true` leaves its rarest values out of the scale.
 */
export class Chart {
  constructor(card, { format, tick = format, empty = "Nothing logged yet.", zero = false }) {
    Object.assign(this, { format, tick, empty, zero, series: [], marks: [], at: null });
    this.title = card.querySelector("h2").textContent;
    this.legend = make("ul", { class: "legend" });
    this.plot = make("div", { class: "plot" });
    this.svg = svg("svg", { role: "img", tabindex: "0" });
    this.note = make("p", { class: "note" });
    this.plot.append(this.svg, this.note);
    card.append(this.legend, this.plot);
    this.onHover = () => {};
    this.clip = `clip-${++clips}`;
    new ResizeObserver(() => this.draw()).observe(this.plot);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerdown", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.onHover(null));
    this.svg.addEventListener("blur", () => this.onHover(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  /** Show other data. `marks` are {x, text} for vertical lines, `range` the steps shown. */
  set({ series, marks = [], range = null, log = false }) {
    this.series = series.filter((one) => one.y.some((y) => y !== null && y !== undefined));
    Object.assign(this, { marks, range, log });
    this.draw();
  }

  /** What is shown instead of curves while there are none. */
  setEmpty(text) {
    if (this.empty === text) return;
    this.empty = text;
    this.draw();
  }

  draw() {
    const [width, height] = [this.plot.clientWidth, this.plot.clientHeight];
    if (!width || !height) return;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren();
    this.writeLegend();
    this.note.textContent = this.series.length ? "" : this.empty;
    if (!this.series.length) {
      this.scale = null;
      this.svg.setAttribute("aria-label", `${this.title}: ${this.empty}`);
      return;
    }
    this.scale = makeScale(this, width, height);
    this.drawAxes(width, height);
    const clip = svg("clipPath", { id: this.clip });
    const { left, right, top, bottom } = this.scale;
    clip.append(svg("rect", { x: left, y: top - 2, width: right - left, height: bottom - top + 4 }));
    const lines = svg("g", { "clip-path": `url(#${this.clip})` });
    for (const one of this.series) this.drawSeries(lines, one);
    this.svg.append(clip, this.drawMarks(), lines);
    this.cross = svg("g", { class: "cross" });
    this.svg.append(this.cross);
    this.hover(this.at);
  }

  drawAxes(width, height) {
    const { left, right, bottom, x0, x1, marks } = this.scale;
    const step = marks[1] - marks[0];
    for (const y of marks) {
      const at = this.scale.y(y);
      this.svg.append(svg("line", { class: "grid", x1: left, x2: right, y1: at, y2: at }));
      this.svg.append(svg("text", { x: left - 8, y: at + 4, "text-anchor": "end" }, this.tick(y, step)));
    }
    // Letters are about 7 pixels wide, and the last number may end where its mark is.
    const room = Math.max(46, 10 * Math.round(x1).toLocaleString("en").length + 8);
    const most = Math.max(2, Math.floor((right - left) / room));
    const inside = ticks(x0, x1, most).filter((x) => x >= x0 && x <= x1 && Number.isInteger(x));
    for (const x of inside) {
      const at = this.scale.x(x);
      // A number in the middle of its mark would leave the chart at the right end.
      const anchor = at > width - 24 ? "end" : "middle";
      const text = Number(x.toPrecision(12)).toLocaleString("en");
      this.svg.append(svg("text", { x: at, y: height - 6, "text-anchor": anchor }, text));
    }
    this.svg.append(svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
    const latest = this.series.map((one) => `${one.name} ${this.format(lastKnown(one.y))}`);
    const where = `steps ${Math.round(x0)} to ${Math.round(x1)}`;
    this.svg.setAttribute("aria-label", `${this.title}, ${where}. Latest: ${latest.join(", ")}`);
  }

  drawSeries(group, one) {
    const { x, y } = this.scale;
    const color = `c${one.color}`;
    if (one.low && one.style !== "dots") {
      group.append(svg("path", { class: `band ${color}`, d: band(one, x, y) }));
    }
    const known = one.y.reduce((n, v) => n + (v !== null && v !== undefined), 0);
    if (one.style === "dots" || known === 1) {
      if (known > 1) group.append(svg("path", { class: `dotted ${color}`, d: path(one, x, y) }));
      one.y.forEach((v, i) => {
        if (v === null || v === undefined) return;
        group.append(svg("circle", { class: `dot ${color}`, cx: x(one.x[i]), cy: y(v), r: known > 60 ? 2 : 3.5 }));
      });
      return;
    }
    group.append(svg("path", { class: `${one.style} ${color}`, d: path(one, x, y) }));
  }

  drawMarks() {
    const group = svg("g");
    const { left, right, top, bottom, x } = this.scale;
    for (const mark of this.marks) {
      const at = x(mark.x);
      if (at < left - 1 || at > right + 1) continue;
      group.append(svg("line", { class: `event ${mark.kind}`, x1: at, x2: at, y1: top, y2: bottom }));
      if (mark.kind === "happened") {
        const flag = svg("path", { class: "flag", d: `M${at - 5} ${top - 8}h10l-5 8z` });
        flag.append(svg("title", {}, `step ${mark.x}: ${mark.text}`));
        group.append(flag);
      }
    }
    return group;
  }

  writeLegend() {
    const names = this.series.map((one) => `${one.color} ${one.name}`).join("\n");
    if (this.legendFor === names) return;
    this.legendFor = names;
    this.numbers = this.series.map(() => make("b"));
    const items = this.series.map((one, i) => {
      const key = make("i", { class: `key c${one.color} ${one.style}`, "aria-hidden": "true" });
      return make("li", {}, key, make("span", { title: one.name }, one.name), this.numbers[i]);
    });
    this.where = make("li", { class: "where" });
    this.legend.replaceChildren(...items, this.where);
  }

  point(event) {
    if (!this.scale) return;
    const box = this.svg.getBoundingClientRect();
    const { left, right, x0, x1 } = this.scale;
    const share = (event.clientX - box.left - left) / (right - left);
    this.onHover(share < -0.02 || share > 1.02 ? null : x0 + Math.min(1, Math.max(0, share)) * (x1 - x0));
  }

  key(event) {
    if (!this.scale) return;
    const xs = this.series[0].x;
    const now = this.at === null ? xs.length : nearest(xs, this.at);
    const stride = event.shiftKey ? Math.max(10, Math.round(xs.length / 20)) : 1;
    const to = { ArrowLeft: now - stride, ArrowRight: now + stride, Home: 0, End: xs.length - 1 }[event.key];
    if (event.key === "Escape") this.onHover(null);
    else if (to !== undefined) {
      const { x0, x1 } = this.scale;
      this.onHover(Math.min(x1, Math.max(x0, xs[Math.min(xs.length - 1, Math.max(0, to))])), true);
    } else return;
    event.preventDefault();
  }

  /** Put the crosshair at a step, or take it away with null. Returns what is read there. */
  hover(step) {
    this.at = step;
    if (!this.scale) return "";
    this.cross.replaceChildren();
    const { top, bottom, x, y, x0, x1 } = this.scale;
    const shown = step !== null && step >= x0 && step <= x1;
    const main = this.series[0].x;
    const on = shown ? main[nearest(main, step)] : null;
    if (shown) this.cross.append(svg("line", { x1: x(on), x2: x(on), y1: top, y2: bottom }));
    const read = this.series.map((one, i) => {
      let value = lastKnown(one.y);
      if (shown) {
        const j = nearest(one.x, on);
        value = one.y[j];
        if (Number.isFinite(value)) {
          const cy = Math.min(bottom, Math.max(top, y(value)));
          this.cross.append(svg("circle", { class: `dot c${one.color}`, cx: x(one.x[j]), cy, r: 4 }));
        }
      }
      this.numbers[i].textContent = this.format(value);
      return `${one.name} ${this.format(value)}`;
    });
    const near = shown && this.marks.find((m) => m.kind === "happened" && Math.abs(x(m.x) - x(on)) < 6);
    this.where.textContent = shown ? `step ${on.toLocaleString("en")}${near ? `: ${near.text}` : ""}` : "";
    return shown ? `step ${on}: ${read.join(", ")}` : "";
  }
}

function lastKnown(ys) {
  for (let i = ys.length - 1; i >= 0; i--) if (ys[i] !== null && ys[i] !== undefined) return ys[i];
  return null;
}

function path(one, x, y) {
  let [text, pen] = ["", "M"];
  one.y.forEach((v, i) => {
    if (v === null || v === undefined) pen = one.style === "dots" ? pen : "M";
    else {
      text += `${pen}${x(one.x[i]).toFixed(1)} ${y(v).toFixed(1)}`;
      pen = "L";
    }
  });
  return text;
}

/** The area between the lowest and the highest values, a closed piece for each stretch. */
function band(one, x, y) {
  const pieces = [];
  let piece = [];
  one.low.forEach((v, i) => {
    if (v === null || v === undefined) {
      if (piece.length) pieces.push(piece);
      piece = [];
    } else piece.push(i);
  });
  if (piece.length) pieces.push(piece);
  const at = (i, v) => `${x(one.x[i]).toFixed(1)} ${y(v).toFixed(1)}`;
  return pieces
    .map((is) => `M${is.map((i) => at(i, one.high[i])).join("L")}L${is.reverse().map((i) => at(i, one.low[i])).join("L")}Z`)
    .join("");
}
