// Numbers and times as people read them, and the page's only way to make elements.

/** A number with `digits` significant ones; a dash for nothing. */
export function short(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e7)) return exponent(value);
  const whole = Math.abs(value) < 1 ? 0 : Math.floor(Math.log10(Math.abs(value))) + 1;
  return value.toFixed(Math.max(0, digits - Math.max(1, whole)));
}

/** 1e-4, 9.51e-5: without zeros that say nothing. */
export function exponent(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const [mantissa, power] = value.toExponential(2).split("e");
  return `${Number(mantissa)}e${Number(power)}`;
}

/** A mark of an axis whose marks are `step` apart. */
export function axisNumber(value, step) {
  const digits = Math.max(0, Math.min(8, -Math.floor(Math.log10(step) + 1e-9)));
  return Math.abs(value) >= 1e5 || (value !== 0 && step < 1e-5) ? exponent(value) : value.toFixed(digits);
}

/** 12,345 */
export function count(value) {
  return Number.isFinite(value) ? Math.round(value).toLocaleString("en") : "–";
}

/** "1 image", "3 images" */
export function several(value, one, many = `${one}s`) {
  return `${count(value)} ${value === 1 ? one : many}`;
}

/** MiB as "812 MiB" or "11.2 GiB". */
export function memory(mib) {
  if (mib === null || mib === undefined || !Number.isFinite(mib)) return "–";
  return mib < 1024 ? `${short(mib, 3)} MiB` : `${(mib / 1024).toFixed(1)} GiB`;
}

/** Seconds as h:mm:ss, or m:ss below an hour. */
export function clock(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  const whole = Math.max(0, Math.round(seconds));
  const two = (n) => String(n).padStart(2, "0");
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return h ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
}

/** Seconds as one rounded unit: "5 s", "12 min", "3 h", "2 days". */
export function span(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 60) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

/** Seconds since 1970 as the time of day, with the date when it is another day than `now`. */
export function moment(seconds, now) {
  if (!Number.isFinite(seconds)) return "–";
  const at = new Date(seconds * 1000);
  const time = at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  if (at.toDateString() === new Date(now * 1000).toDateString()) return time;
  return `${at.toLocaleDateString([], { month: "short", day: "numeric" })}, ${time}`;
}

/** The part of a path behind the last slash. */
export function fileName(path) {
  return String(path ?? "").split(/[\\/]/).pop();
}

/** An HTML element with properties, classes in `class`, and children (elements or texts). */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.className = value;
    else if (name.startsWith("aria-") || name.startsWith("data-") || name === "role") {
      element.setAttribute(name, value);
    } else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Set the text of an element by id, leaving it alone when it is already there. */
export function say(id, text) {
  const element = document.getElementById(id);
  const shown = text === "" || text === null || text === undefined ? "\u00a0" : String(text);
  if (element.textContent !== shown) element.textContent = shown;
}
