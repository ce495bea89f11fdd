// The head of the page: name, state, progress, tiles, and the facts of the run.

import { clock, count, exponent, fileName, make, memory, moment, say, short, span } from "./format.js";

const byId = (id) => document.getElementById(id);
const WORDS = {
  running: "running", preparing: "preparing", finished: "finished", interrupted: "stopped",
  failed: "failed", stalled: "no update", ended: "no update", waiting: "waiting",
};

/** Show everything that an answer says about the run as a whole. */
export function updateSummary(answer, smoothed) {
  const { run, state, last } = answer;
  const step = last.step ?? (answer.state.name === "preparing" ? 0 : null);
  const share = step !== null && run.steps ? Math.min(1, step / run.steps) : null;
  const name = run.output_name || fileName(answer.out) || answer.out;
  say("title", name);
  say("about", [run.method, run.base_model && `on ${run.base_model}`].filter(Boolean).join(" ") || answer.out);
  showState(state, share, name);
  showProgress(share, state.name);
  showBanner(answer);
  tiles(answer, step, smoothed);
  facts(answer);
  say("updated", news(answer));
  say("foot", `anima-fast ${answer.version} watches ${answer.out}`);
}

function news({ behind, read, updated_at: updated, now }) {
  if (behind) return `reading the log: ${Math.floor(100 * read)} %`;
  if (updated === null) return "";
  return now - updated < 5 ? "updated now" : `updated ${span(now - updated)} ago`;
}

function showState(state, share, name) {
  const badge = byId("badge");
  badge.dataset.state = state.name;
  badge.title = state.text;
  if (badge.textContent !== WORDS[state.name]) badge.textContent = WORDS[state.name] ?? state.name;
  const percent = share === null ? "" : `${Math.floor(100 * share)} % `;
  const note = { failed: "failed: ", stalled: "no update: ", finished: "done: " }[state.name];
  document.title = `${note ?? percent}${name}`;
}

function showProgress(share, state) {
  const bar = byId("progress");
  bar.dataset.state = state;
  byId("done").style.width = `${100 * (share ?? 0)}%`;
  if (share === null) bar.removeAttribute("aria-valuenow");
  else bar.setAttribute("aria-valuenow", Math.floor(100 * share));
}

function showBanner(answer) {
  const { name, text } = answer.state;
  const banner = byId("banner");
  const shown = ["failed", "interrupted", "stalled", "ended"].includes(name) ? text : null;
  banner.hidden = shown === null;
  banner.dataset.state = name;
  if (shown !== null && banner.textContent !== shown) banner.textContent = shown;
}

function tiles(answer, step, smoothed) {
  const { run, last } = answer;
  const values = last.values ?? {};
  say("tile-step", step === null ? "–" : count(step));
  const epoch = last.epoch ? `epoch ${last.epoch}${run.epochs ? ` of ${run.epochs}` : ""}` : "";
  say("tile-step-more", [run.steps ? `of ${count(run.steps)}` : "", epoch].filter(Boolean).join(", "));
  time(answer, step);
  say("tile-loss", short(smoothed ?? values.loss));
  const odd = answer.not_finite ? `${count(answer.not_finite)} not finite` : "";
  const average = Number.isFinite(values.loss_avg) ? `epoch mean ${short(values.loss_avg)}` : "";
  say("tile-loss-more", odd || average);
  byId("tile-loss-more").classList.toggle("bad", Boolean(odd));
  say("tile-speed", answer.step_s === null ? "–" : `${short(answer.step_s, 3)} s/step`);
  say("tile-speed-more", Number.isFinite(values.images_per_s) ? `${short(values.images_per_s, 3)} images/s` : "");
  say("tile-memory", memory(values.memory_mib));
  say("tile-memory-more", run.device ?? "");
  rate(values);
}

function time(answer, step) {
  const { run, state, now, started_at: started } = answer;
  const live = ["running", "preparing"].includes(state.name);
  const left = live && step !== null && run.steps && answer.step_s !== null ? (run.steps - step) * answer.step_s : null;
  const end = live ? now : answer.updated_at;
  const took = started !== null && end !== null ? Math.max(0, end - started) : null;
  say("tile-time-name", live || state.name === "waiting" ? "Time left" : "Took");
  say("tile-time", live ? clock(left) : state.name === "waiting" ? "–" : clock(took));
  const ends = left === null ? "" : `until ${moment(now + left, now)}`;
  say("tile-time-more", live ? ends : end !== null && state.name !== "waiting" ? `ended ${moment(end, now)}` : "");
}

function rate(values) {
  const groups = Object.entries(values).filter(([name]) => name.startsWith("lr/"));
  const rates = [...new Set(groups.map(([, value]) => exponent(value)))];
  say("tile-rate", rates[0] ?? "–");
  const more = rates.length > 1 ? `and ${rates.slice(1, 3).join(", ")}${rates.length > 3 ? ", …" : ""}` : "";
  say("tile-rate-more", more || (groups.length === 1 ? groups[0][0].slice(3) : ""));
}

function facts(answer) {
  const { run, now, started_at: started } = answer;
  const live = ["running", "preparing"].includes(answer.state.name);
  const end = live ? now : answer.updated_at;
  const rows = {
    method: run.method,
    "base model": run.base_model,
    device: run.device,
    images: run.images === undefined ? null : count(run.images),
    "steps per epoch": Number.isFinite(run.steps / run.epochs) ? count(run.steps / run.epochs) : null,
    resumed: run.first_step ? `at step ${count(run.first_step)}` : null,
    started: started === null ? null : moment(started, now),
    [live ? "running for" : "took"]: started === null || end === null ? null : clock(end - started),
    "saved file": run.final && fileName(run.final),
    folder: answer.out,
  };
  const shown = Object.entries(rows).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const list = byId("facts-list");
  const text = JSON.stringify(shown);
  if (list.dataset.shown === text) return;
  list.dataset.shown = text;
  list.replaceChildren(...shown.flatMap(([key, value]) => [make("dt", {}, key), make("dd", {}, String(value))]));
}

/** List what changed the way of the run, the newest first. */
export function updateEvents(events) {
  byId("events").hidden = events.length === 0;
  const items = events.slice(-50).reverse();
  byId("events-list").replaceChildren(
    ...items.map((event) => make("li", {}, make("b", {}, `step ${count(event.step)}`), ` ${event.text}`)),
  );
}
