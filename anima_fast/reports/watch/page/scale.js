// Where a value goes in a chart: round marks, ranges without their rarest values, logarithms.

const SPACE = { left: 54, right: 14, top: 10, bottom: 24 };

/** Round numbers (1, 2 or 5 times a power of ten apart) that enclose or lie within a range. */
export function ticks(low, high, most) {
  // Sums of one constant differ in their last bits; marks between them are no numbers of their own.
  if (high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high))) {
    const room = Math.abs(low) * 0.1 || 1;
    [low, high] = [low - room, high + room];
  }
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * (1 - 1e-9));
  const found = [];
  for (let i = Math.floor(low / step + 1e-9); i <= Math.ceil(high / step - 1e-9); i++) found.push(i * step);
  return found;
}

/** The value that a share of the others does not exceed. */
function quantile(sorted, share) {
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

/** Index of the x that is nearest to `at`, in rising xs. */
export function nearest(xs, at) {
  let [low, high] = [0, xs.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < at) low = middle + 1;
    else high = middle;
  }
  return low > 0 && at - xs[low - 1] < xs[low] - at ? low - 1 : low;
}

/**
 * The scale of a chart of that size in pixels: its edges, ranges and marks, and `x` and `y` from
 * values to pixels. `chart` has series, range (steps shown, or null), log and zero.
 */
export function makeScale(chart, width, height) {
  const [left, right] = [SPACE.left, width - SPACE.right];
  const [top, bottom] = [SPACE.top, height - SPACE.bottom];
  const xs = chart.series.flatMap((one) => [one.x[0], one.x[one.x.length - 1]]);
  let [x0, x1] = chart.range ?? [Math.min(...xs), Math.max(...xs)];
  if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
  let values = valuesBetween(chart.series, x0, x1);
  const log = chart.log && values.some((y) => y > 0);
  if (log) values = values.filter((y) => y > 0);
  const marks = log ? powers(values) : linear(values, chart.zero, bottom - top);
  const [y0, y1] = [marks[0], marks[marks.length - 1]];
  const along = log ? (y) => Math.log(Math.max(y, y0 / 10)) : (y) => y;
  return {
    left, right, top, bottom, x0, x1, y0, y1, marks, log,
    x: (x) => left + ((x - x0) / (x1 - x0)) * (right - left),
    y: (y) => bottom - ((along(y) - along(y0)) / (along(y1) - along(y0))) * (bottom - top),
  };
}

/** All finite values between two steps that the scale must hold. */
function valuesBetween(series, x0, x1) {
  const found = [];
  for (const one of series) {
    const inside = (ys) =>
      (ys ?? []).filter((y, i) => Number.isFinite(y) && one.x[i] >= x0 && one.x[i] <= x1);
    let own = [...inside(one.y), ...(one.clip ? [] : [...inside(one.low), ...inside(one.high)])];
    if (one.clip && own.length > 20) {
      own.sort((a, b) => a - b);
      own = [quantile(own, 0.005), quantile(own, 0.985)];
    }
    for (const y of own) found.push(y);
  }
  return found;
}

function bounds(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const y of values) [low, high] = [Math.min(low, y), Math.max(high, y)];
  return values.length ? [low, high] : [0, 1];
}

function linear(values, zero, height) {
  const [low, high] = bounds(values);
  return ticks(zero ? Math.min(0, low) : low, high, Math.max(2, Math.floor(height / 34)));
}

/** Powers of ten around the values, with 2 and 5 times them where there are few. */
function powers(values) {
  const [low, high] = bounds(values);
  // Within one power, evenly spaced marks say more.
  if (high < 10 * low) {
    const marks = ticks(low, high, 6).filter((y) => y > low / 2);
    return marks[0] > low ? [low, ...marks] : marks;
  }
  const tens = [];
  for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++) tens.push(10 ** p);
  const fine = tens.length < 4 ? tens.flatMap((p) => [p, 2 * p, 5 * p]) : tens;
  const first = Math.max(0, fine.findLastIndex((y) => y <= low));
  const last = fine.findIndex((y, i) => i > first && y >= high);
  return fine.slice(first, last < 0 ? undefined : last + 1);
}
