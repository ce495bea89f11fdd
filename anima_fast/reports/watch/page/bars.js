// Training loss by noise level: bars of the newest epoch, outlines of the first, dots of validation.

import { axisNumber, make, short } from "./format.js";
import { ticks } from "./scale.js";
import { sigmaBins } from "./store.js";

const percent = (share) => `${(100 * share).toFixed(2)}%`;

/** A bar chart inside a card that stays hidden until a run logs such losses. */
export class SigmaBars {
  constructor(card) {
    this.card = card;
    this.legend = make("ul", { class: "legend" });
    this.plot = make("div", { class: "bars", role: "img" });
    this.axis = make("div", { class: "bars-axis", "aria-hidden": "true" });
    card.append(this.legend, this.plot, this.axis);
  }

  /** Show the last of the `sigma_bins` records, and validation losses by σ if there are any. */
  set(records, validation) {
    const newest = sigmaBins(records?.at(-1));
    const oldest = records?.length > 1 ? sigmaBins(records[0]) : [];
    const dots = validationBySigma(validation);
    const losses = [...newest, ...oldest, ...dots].map((one) => one.loss).filter(Number.isFinite);
    this.card.hidden = losses.length === 0;
    document.getElementById("charts").classList.toggle("has-sigma", losses.length > 0);
    if (!losses.length) return;
    const marks = ticks(0, Math.max(...losses) || 1, 3);
    const top = marks.at(-1);
    this.writeLegend(newest.length ? records.at(-1) : null, oldest.length ? records[0] : null, dots.length > 0);
    this.plot.replaceChildren(
      ...marks.map((mark) => {
        const text = make("span", {}, axisNumber(mark, marks[1]));
        const line = make("i", { class: "bar-mark", "aria-hidden": "true" }, text);
        line.style.bottom = percent(mark / top);
        return line;
      }),
      ...newest.map((bin, i) => bar(bin, oldest[i], top)),
      ...dots.map((dot) => {
        const mark = make("i", { class: "bar-dot", title: `validation at σ ${dot.sigma}: ${short(dot.loss)}` });
        mark.style.left = percent(dot.sigma);
        mark.style.bottom = percent(dot.loss / top);
        return mark;
      }),
    );
    const texts = newest.map((bin) => `${bin.low.toFixed(1)} to ${bin.high.toFixed(1)}: ${short(bin.loss)}`);
    this.plot.setAttribute("aria-label", `Loss by noise level σ. ${texts.join(", ")}`);
    this.axis.replaceChildren(...["0", "0.25", "0.5", "0.75", "1"].map((text) => make("span", {}, text)));
  }

  writeLegend(newest, oldest, hasDots) {
    const items = [];
    const item = (style, color, text) =>
      make("li", {}, make("i", { class: `key ${style} c${color}`, "aria-hidden": "true" }), text);
    if (newest) items.push(item("block", 1, Number.isFinite(newest.epoch) ? `epoch ${newest.epoch}` : "newest"));
    if (oldest) items.push(item("outline", 1, Number.isFinite(oldest.epoch) ? `epoch ${oldest.epoch}` : "first"));
    if (hasDots) items.push(item("dots", 2, "validation"));
    this.legend.replaceChildren(...items);
  }
}

function bar(bin, before, top) {
  const column = make("div", { class: "bar" });
  column.title = `σ ${bin.low.toFixed(1)} to ${bin.high.toFixed(1)}: ${short(bin.loss)}` +
    (before ? `, first ${short(before.loss)}` : "") + (bin.count === null ? "" : `, ${bin.count} samples`);
  if (bin.loss !== null) {
    const fill = make("i", { class: "bar-fill" });
    fill.style.height = percent(bin.loss / top);
    column.append(fill);
  }
  if (before && before.loss !== null) {
    const line = make("i", { class: "bar-before" });
    line.style.height = percent(before.loss / top);
    column.append(line);
  }
  return column;
}

function validationBySigma(validation) {
  return Object.entries(validation?.columns ?? {})
    .filter(([name]) => name.startsWith("sigma/"))
    .map(([name, { mean }]) => ({ sigma: Number(name.slice(6)), loss: mean.findLast((v) => v !== null) ?? null }))
    .filter((one) => Number.isFinite(one.sigma) && one.sigma >= 0 && one.sigma <= 1 && one.loss !== null);
}
