// One picture large: the arrow keys go through time and prompts, Escape closes.

import { say } from "./format.js";
import { about, address, when } from "./picture.js";

const byId = (id) => document.getElementById(id);
const dialog = byId("viewer");
const image = byId("viewer-image");
const slider = byId("viewer-time");
let prompts = [];
let row = 0;
let place = 0;

/** Show one of the pictures of `prompts` ([{items}]) large. */
export function openViewer(all, one) {
  prompts = all;
  row = Math.max(0, prompts.findIndex((prompt) => prompt.items.includes(one)));
  place = Math.max(0, prompts[row].items.indexOf(one));
  show();
  if (!dialog.open) dialog.showModal();
}

/** Take in new pictures and stay at the one that is shown. */
export function updateViewer(all) {
  if (!dialog.open) return;
  const shown = prompts[row].items[place];
  prompts = all;
  row = Math.max(0, prompts.findIndex((prompt) => prompt.items.some((one) => one.name === shown.name)));
  if (!prompts.length) {
    dialog.close();
    return;
  }
  place = Math.max(0, prompts[row].items.findIndex((one) => one.name === shown.name));
  show();
}

function show() {
  const { items } = prompts[row];
  const one = items[place];
  const source = address(one);
  if (image.getAttribute("src") !== source) image.src = source;
  image.alt = `${about(one)}, ${when(one)}`;
  image.width = one.width;
  image.height = one.height;
  slider.max = items.length - 1;
  slider.value = place;
  slider.setAttribute("aria-valuetext", when(one));
  byId("viewer-older").disabled = place === 0;
  byId("viewer-newer").disabled = place === items.length - 1;
  const seed = one.seed === null || one.seed === undefined ? "" : `, seed ${one.seed}`;
  say("viewer-title", `${when(one)}${seed}, ${one.width} × ${one.height}`);
  say("viewer-prompt", about(one));
}

function move(time, prompt = 0) {
  if (prompt) {
    const shown = prompts[row].items[place];
    row = (row + prompt + prompts.length) % prompts.length;
    // The same moment of the other prompt, if it was rendered then.
    const same = prompts[row].items.findLastIndex((one) => one.step === shown.step);
    place = same < 0 ? Math.min(place, prompts[row].items.length - 1) : same;
  } else place = Math.min(prompts[row].items.length - 1, Math.max(0, place + time));
  show();
}

dialog.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!by) return;
  event.preventDefault();
  move(...by);
});
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});
slider.addEventListener("input", () => {
  place = Number(slider.value);
  show();
});
byId("viewer-older").addEventListener("click", () => move(-1));
byId("viewer-newer").addEventListener("click", () => move(1));
byId("viewer-close").addEventListener("click", () => dialog.close());
