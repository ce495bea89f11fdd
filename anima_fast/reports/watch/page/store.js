// The curves of a run, put together from the pieces that the server sends.

/** An empty table: rows with a step, an epoch, and a mean (with lowest and highest) per column. */
export function emptyTable() {
  return { steps: [], epochs: [], stride: 1, columns: {} };
}

/** The table with the rows from `part.first` on replaced by those of the part. */
export function merge(table, part) {
  const keep = part.first;
  const steps = [...table.steps.slice(0, keep), ...part.steps];
  const columns = {};
  for (const name of new Set([...Object.keys(keep ? table.columns : {}), ...Object.keys(part.columns)])) {
    columns[name] = mergeColumn(table.columns[name], part.columns[name], keep, steps.length);
  }
  const epochs = [...table.epochs.slice(0, keep), ...part.epochs];
  return { steps, epochs, stride: part.stride, columns };
}

function mergeColumn(old, added, keep, length) {
  const joined = (before, after) => {
    const head = (before ?? []).slice(0, keep);
    while (head.length < keep) head.push(null);
    const all = head.concat(after ?? []);
    while (all.length < length) all.push(null);
    return all;
  };
  const mean = joined(old?.mean, added?.mean);
  // Where a piece has one record a row, its lowest and highest values are the mean.
  if (!old?.low && !added?.low) return { mean };
  return {
    mean,
    low: joined(old?.low ?? old?.mean, added?.low ?? added?.mean),
    high: joined(old?.high ?? old?.mean, added?.high ?? added?.mean),
  };
}

/**
 * Means over about `steps` steps around each row, nearer ones weighing more; a row counts as
 * `stride` steps. Both sides count, so the curve does not lag. Unknown values stay unknown.
 */
export function smooth(values, steps, stride) {
  if (!steps || steps <= stride) return values;
  const keep = Math.exp((-2 * stride) / steps);
  const before = decayingSums(values, keep);
  const after = decayingSums([...values].reverse(), keep).reverse();
  return values.map((value, i) => {
    if (!Number.isFinite(value)) return null;
    // The row itself is in both sums.
    return (before[i][0] + after[i][0] - value) / (before[i][1] + after[i][1] - 1);
  });
}

/** For each row, the sums of values and of weights up to it, older ones fading by `keep` a row. */
function decayingSums(values, keep) {
  let [sum, weight] = [0, 0];
  return values.map((value) => {
    const known = Number.isFinite(value);
    sum = keep * sum + (known ? value : 0);
    weight = keep * weight + (known ? 1 : 0);
    return [sum, weight];
  });
}

/** The bins of a `sigma_bins` record as {low, high, loss, count}, of equal width from 0 to 1. */
export function sigmaBins(record) {
  const means = Array.isArray(record?.means) ? record.means : [];
  return means.map((loss, i) => ({
    low: i / means.length,
    high: (i + 1) / means.length,
    loss: Number.isFinite(loss) ? loss : null,
    count: record.counts?.[i] ?? null,
  }));
}
