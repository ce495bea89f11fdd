// The previews: in groups by step, over time with a slider per prompt, and one of them large.

import { count, make, say, several } from "./format.js";
import { about, address, when } from "./picture.js";
import { openViewer, updateViewer } from "./viewer.js";

const FIRST_GROUPS = 3;
const body = document.getElementById("previews-body");
const views = document.getElementById("previews-view");

let prompts = [];
let groups = [];
let view = "steps";
let showAll = false;
// Place of the slider of each prompt; absent while it follows the newest picture.
const places = new Map();
const images = new Map();

/** Take in a new list of pictures. */
export function updateGallery({ total, pictures }) {
  const inOrder = [...pictures].sort(
    (a, b) => b.earlier - a.earlier || (a.step ?? -1) - (b.step ?? -1) || a.time - b.time || (a.index ?? 0) - (b.index ?? 0),
  );
  prompts = collect(inOrder, (one) => one.index ?? -1).sort((a, b) => a.key - b.key);
  groups = collect(inOrder, (one) => `${one.earlier} ${one.step ?? one.label ?? Math.round(one.time / 60)}`).reverse();
  const kept = new Set(inOrder.map(address));
  for (const key of images.keys()) if (!kept.has(key)) images.delete(key);
  const hidden = total > pictures.length ? `, the newest ${count(pictures.length)} shown` : "";
  say("previews-count", total ? several(total, "picture") + hidden : "");
  views.hidden = !pictures.length;
  draw();
  updateViewer(prompts);
}

/** Items with the same key together, in the order of their first one. */
function collect(items, keyOf) {
  const found = new Map();
  for (const one of items) {
    const key = keyOf(one);
    if (!found.has(key)) found.set(key, { key, items: [] });
    found.get(key).items.push(one);
  }
  return [...found.values()];
}

function picture(one) {
  const key = address(one);
  if (!images.has(key)) {
    images.set(key, make("img", { src: key, width: one.width, height: one.height, loading: "lazy", decoding: "async" }));
  }
  const image = images.get(key);
  image.alt = `${about(one)}, ${when(one)}`;
  return image;
}

function tile(one) {
  const button = make("button", { type: "button", class: "shot", title: about(one) }, picture(one));
  button.addEventListener("click", () => openViewer(prompts, one));
  const figure = make("figure", {}, button, make("figcaption", {}, about(one)));
  figure.style.setProperty("--ratio", Math.min(3, one.width / one.height));
  return figure;
}

function bySteps() {
  const shown = showAll ? groups : groups.slice(0, FIRST_GROUPS);
  const parts = shown.map(({ items }) => {
    const newest = items.at(-1);
    const note = newest.earlier ? "of an earlier run" : "";
    const head = make("h3", {}, when(newest), make("span", { class: "soft" }, note && ` ${note}`));
    return make("section", { class: "group" }, head, make("div", { class: "strip" }, ...items.map(tile)));
  });
  if (groups.length > shown.length) {
    const more = make("button", { type: "button", class: "plain" }, `Show all ${count(groups.length)} steps`);
    more.addEventListener("click", () => {
      showAll = true;
      draw();
    });
    parts.push(more);
  }
  return parts;
}

function overTime() {
  return [make("div", { class: "grid" }, ...prompts.map(timeline))];
}

function timeline({ key, items }) {
  const own = items.filter((one) => !one.earlier);
  const shown = own.length ? own : items;
  const slot = make("button", { type: "button", class: "shot" });
  const label = make("output", {});
  const caption = make("figcaption", {});
  const slider = make("input", { type: "range", min: 0, max: shown.length - 1, step: 1, disabled: shown.length < 2 });
  const show = (place) => {
    const one = shown[place];
    const image = picture(one);
    image.loading = "eager";
    slot.replaceChildren(image);
    slot.onclick = () => openViewer(prompts, one);
    label.textContent = when(one);
    // The file of prompts may change during a run.
    caption.textContent = about(one);
    slider.setAttribute("aria-valuetext", when(one));
  };
  const place = Math.min(places.get(key) ?? shown.length - 1, shown.length - 1);
  slider.value = place;
  slider.setAttribute("aria-label", `Time, ${about(shown.at(-1))}`);
  slider.addEventListener("input", () => {
    const chosen = Number(slider.value);
    if (chosen === shown.length - 1) places.delete(key);
    else places.set(key, chosen);
    show(chosen);
  });
  show(place);
  return make("figure", {}, slot, make("div", { class: "time" }, slider, label), caption);
}

function draw() {
  // Rebuilding must not take the slider out of the reader's hand: the same pictures stay.
  const text = JSON.stringify([view, showAll, groups.map((g) => g.items.map((i) => [address(i), when(i), about(i)]))]);
  if (body.dataset.shown === text) return;
  body.dataset.shown = text;
  const at = body.contains(document.activeElement) ? focusPlace() : null;
  const empty = [make("p", { class: "empty" }, "No previews yet: --sample_prompts and --sample_every_n_epochs make them.")];
  body.replaceChildren(...(groups.length ? (view === "steps" ? bySteps() : overTime()) : empty));
  if (at) body.querySelectorAll(at.tag)[at.index]?.focus({ preventScroll: true });
}

function focusPlace() {
  const tag = document.activeElement.tagName;
  return { tag, index: [...body.querySelectorAll(tag)].indexOf(document.activeElement) };
}

views.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  view = button.dataset.view;
  for (const one of views.querySelectorAll("button")) one.setAttribute("aria-pressed", one === button);
  draw();
});
