// The dataset's health: how many of what, what is wrong, which sizes, which tags.

import { count, fileName, make, several } from "./format.js";

const MOST_ROWS = 60;
const MOST_TAGS = 60;
const list = (value) => (Array.isArray(value) ? value.filter((one) => one !== null) : []);
const total = (part, name) => part?.[`${name}_total`] ?? list(part?.[name]).length;

/** Show a `dataset.json`, or that there is none. */
export function updateDataset(data) {
  const body = document.getElementById("dataset-body");
  const open = new Set([...body.querySelectorAll("details[open] > summary")].map((s) => s.dataset.name));
  document.getElementById("dataset-count").textContent = data ? several(data.images ?? 0, "image") : "";
  if (!data) {
    body.replaceChildren(make("p", { class: "empty" }, "No dataset.json yet: a run writes it when its data is read."));
    return;
  }
  body.replaceChildren(make("div", { class: "dataset" }, health(data), sizes(data), words(data)));
  for (const summary of body.querySelectorAll("summary")) {
    if (open.has(summary.dataset.name)) summary.parentElement.open = true;
  }
}

function fold(name, number, ...inside) {
  const summary = make("summary", { "data-name": name }, `${name} `, make("b", {}, count(number)));
  return make("details", {}, summary, ...inside);
}

function files(entries, whole, show = (entry) => fileName(entry)) {
  const items = entries.slice(0, MOST_ROWS).map((entry) => make("li", {}, show(entry)));
  if (whole > items.length) items.push(make("li", { class: "more" }, `and ${count(whole - items.length)} more`));
  return make("ul", { class: "files" }, ...items);
}

function health(data) {
  const captions = data.captions ?? {};
  const counts = [
    ["images", data.images], ["uses / epoch", data.uses], ["held out", data.validation || null],
    ["batches / epoch", data.batches_per_epoch], ["captions", captions.count],
  ].filter(([, value]) => Number.isFinite(value));
  const numbers = make("dl", { class: "numbers" },
    ...counts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, count(value)))));
  const kinds = groupBy(list(data.problems));
  // What is among the problems, with a text, is not listed twice.
  const found = [
    ["missing captions", "missing", "no caption", (entry) => fileName(entry)],
    ["empty captions", "empty", "empty caption", (entry) => fileName(entry)],
    ["long captions", "long", "long caption", (entry) => `${fileName(entry.file)}: ${several(entry.tokens, "token")}`],
  ].filter(([, key, kind]) => total(captions, key) && !kinds.has(kind))
    .map(([name, key, , show]) => fold(name, total(captions, key), files(list(captions[key]), total(captions, key), show)));
  for (const [kind, problems] of kinds) {
    const show = (one) => [fileName(one.file), one.text].filter(Boolean).join(": ");
    found.push(fold(kind, problems.length, files(problems, problems.length, show)));
  }
  const unseen = total(data, "problems") - list(data.problems).length;
  if (unseen > 0) found.push(make("p", { class: "soft" }, `and ${several(unseen, "further problem")}`));
  const verdict = found.length
    ? make("div", { class: "findings" }, ...found)
    : make("p", { class: "good" }, "No problems found.");
  return make("div", {}, numbers, make("h3", {}, "Findings"), verdict);
}

function groupBy(problems) {
  const groups = new Map();
  for (const one of problems) groups.set(one.kind, [...(groups.get(one.kind) ?? []), one]);
  return groups;
}

function sizes(data) {
  const buckets = [...list(data.buckets)].sort((a, b) => b.repeats - a.repeats);
  const most = Math.max(1, ...buckets.map((one) => one.repeats ?? one.images));
  const rows = buckets.slice(0, MOST_ROWS).map((one) => {
    const meter = make("i", { class: "meter", "aria-hidden": "true" });
    meter.style.width = `${(100 * (one.repeats ?? one.images)) / most}%`;
    return make("tr", {},
      make("th", { scope: "row" }, `${one.width} × ${one.height}`),
      make("td", { class: "number" }, count(one.images)),
      make("td", { class: "number" }, count(one.repeats)),
      make("td", { class: "meter-cell" }, meter));
  });
  const head = make("tr", {}, ...["size", "images", "uses"].map((text, i) =>
    make("th", { scope: "col", class: i ? "number" : null }, text)), make("td"));
  const table = make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
  const scroll = make("div", { class: "scroll", tabIndex: 0, role: "group", "aria-label": "Buckets" }, table);
  const subsets = list(data.subsets).map((one) =>
    make("li", { title: one.folder }, `${fileName(one.folder) || one.folder}: ${several(one.images, "image")} × ${count(one.repeats)}`));
  return make("div", {}, make("h3", {}, "Buckets"), scroll,
    make("h3", {}, "Folders"), make("ul", { class: "files" }, ...subsets));
}

function words(data) {
  const tags = list(data.tags).filter(Array.isArray).slice(0, MOST_TAGS);
  const chips = tags.map(([tag, number]) => make("li", {}, tag, make("b", {}, count(number))));
  const more = total(data, "tags") - tags.length;
  if (more > 0) chips.push(make("li", { class: "more" }, `and ${count(more)} more`));
  const body = chips.length ? make("ul", { class: "tags" }, ...chips) : make("p", { class: "soft" }, "No tags.");
  return make("div", {}, make("h3", {}, "Tags"), body);
}
