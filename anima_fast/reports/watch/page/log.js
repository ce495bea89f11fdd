// The tail of the console log: follows the end unless the reader scrolled up.

import { count, make, say } from "./format.js";

const MOST_LINES = 1000;
const box = document.getElementById("log-lines");
const newest = document.getElementById("log-newest");
let following = true;

/** Add the lines of an answer; one that begins at 0 or behind a gap starts the list over. */
export function updateLog({ first, lines }) {
  const end = Number(box.dataset.end ?? 0);
  // Asked here too: the event of a scroll that was just made comes later.
  if (box.dataset.end) following = isAtEnd();
  if (first !== end || (first === 0 && lines.length)) {
    box.replaceChildren();
    following = true;
  }
  box.append(...lines.map(lineOf));
  while (box.childElementCount > MOST_LINES) box.firstElementChild.remove();
  box.dataset.end = first + lines.length;
  if (!box.childElementCount) box.replaceChildren(make("p", { class: "empty" }, "No console.log yet."));
  else if (box.childElementCount > 1) box.querySelector(":scope > .empty")?.remove();
  say("log-count", first + lines.length ? `${count(first + lines.length)} lines` : "");
  if (following) box.scrollTop = box.scrollHeight;
}

function lineOf(line) {
  const [, day, time, text] = /^(\d{4}-\d{2}-\d{2}) (\d{2}:\d{2}:\d{2}) (.*)$/s.exec(line) ?? [null, null, null, line];
  const kind = /\b(error|failed|out of memory|traceback)\b/i.test(text)
    ? "bad"
    : /\b(warning|warn|skipped|retry|retried|no preview|no validation loss)\b/i.test(text) ? "odd" : null;
  return make("div", { class: kind }, time && make("time", { title: day }, time), text);
}

function isAtEnd() {
  return box.scrollHeight - box.scrollTop - box.clientHeight < 24;
}

box.addEventListener("scroll", () => {
  following = isAtEnd();
  newest.hidden = following;
});
newest.addEventListener("click", () => {
  following = true;
  box.scrollTop = box.scrollHeight;
  box.focus();
});
new ResizeObserver(() => {
  if (following) box.scrollTop = box.scrollHeight;
}).observe(box);
