// Asks the server every two seconds what is new and hands the answer to the parts of the page.

import { smoothedLoss, updateCharts } from "./charts.js";
import { updateDataset } from "./dataset.js";
import { span } from "./format.js";
import { updateGallery } from "./gallery.js";
import { updateLog } from "./log.js";
import { updateEvents, updateSummary } from "./summary.js";

const EVERY_MS = 2000;
const WHEN_ENDED_MS = 10000;
const MOST_MS = 30000;
const ENDED = new Set(["finished", "interrupted", "failed", "ended"]);

let tokens = {};
let failures = 0;
let timer = null;
let lost = null;
let busy = false;

async function poll() {
  // Two answers at once would both be taken for the one that follows.
  if (busy) return;
  busy = true;
  clearTimeout(timer);
  let wait = EVERY_MS;
  try {
    const response = await fetch(`api/run?${new URLSearchParams(tokens)}`, { signal: AbortSignal.timeout(60000) });
    if (!response.ok) throw new Error(`status ${response.status}`);
    const answer = await response.json();
    failures = 0;
    lost = null;
    show(answer);
    tokens = answer.tokens;
    if (answer.behind) wait = 0;
    else if (ENDED.has(answer.state.name) || document.hidden) wait = WHEN_ENDED_MS;
  } catch {
    wait = Math.min(MOST_MS, EVERY_MS * 2 ** failures++);
    lost ??= Date.now();
    showLost();
  }
  busy = false;
  timer = setTimeout(poll, wait);
}

/** Every part on its own: one that fails must not take the others along. */
function show(answer) {
  const parts = [
    () => updateCharts(answer),
    () => updateSummary(answer, smoothedLoss()),
    () => answer.marks && updateEvents(answer.marks.events),
    () => answer.pictures && updateGallery(answer.pictures),
    () => updateLog(answer.console),
    () => "dataset" in answer && updateDataset(answer.dataset),
  ];
  for (const part of parts) {
    try {
      part();
    } catch (error) {
      console.error(error);
    }
  }
  document.documentElement.dataset.loaded = "yes";
  document.documentElement.dataset.polls = Number(document.documentElement.dataset.polls ?? 0) + 1;
}

function showLost() {
  const banner = document.getElementById("banner");
  banner.dataset.state = "lost";
  banner.hidden = false;
  const since = span((Date.now() - lost) / 1000);
  banner.textContent = `The watch server has not answered for ${since}; what you see is from before. ` +
    "Start anima-fast watch again and this page goes on by itself.";
  document.getElementById("badge").dataset.state = "stalled";
  document.getElementById("badge").textContent = "not connected";
}

const THEMES = ["system", "light", "dark"];

function setTheme(theme) {
  const root = document.documentElement;
  if (theme === "system") delete root.dataset.theme;
  else root.dataset.theme = theme;
  const button = document.getElementById("theme");
  const text = theme === "system" ? "Colours: as the system" : `Colours: ${theme}`;
  button.setAttribute("aria-label", text);
  button.title = text;
  button.dataset.theme = theme;
}

function setUpTheme() {
  const stored = () => {
    try {
      return localStorage.getItem("watch-theme");
    } catch {
      return null;
    }
  };
  setTheme(THEMES.includes(stored()) ? stored() : "system");
  document.getElementById("theme").addEventListener("click", (event) => {
    const next = THEMES[(THEMES.indexOf(event.currentTarget.dataset.theme) + 1) % THEMES.length];
    setTheme(next);
    try {
      localStorage.setItem("watch-theme", next);
    } catch {
      // The choice lasts as long as the page then.
    }
  });
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) poll();
});
setUpTheme();
poll();
