// What is said about a preview.

import { count, moment } from "./format.js";

/** The URL of a picture; it changes with the contents. */
export function address(one) {
  return `sample/${encodeURIComponent(one.name)}?v=${one.version}`;
}

/** When a picture was made, in words. */
export function when(one) {
  if (one.step === 0) return "before training";
  const parts = [];
  if (one.step !== null && one.step !== undefined) parts.push(`step ${count(one.step)}`);
  if (one.epoch !== null && one.epoch !== undefined) parts.push(`epoch ${one.epoch}`);
  return parts.join(", ") || one.label || moment(one.time, Date.now() / 1000);
}

/** What a picture shows, in words. */
export function about(one) {
  return one.prompt || (one.index === undefined ? one.name : `prompt ${one.index + 1}`);
}
