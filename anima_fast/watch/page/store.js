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
 * A running mean that forgets over `steps` steps, each row counting as `stride` of them; the start
 * is corrected as in Adam. Unknown values stay unknown.
 */
export function smooth(values, steps, stride) {
  if (!steps || steps <= stride) return values;
  const keep = Math.exp(-stride / steps);
  let [sum, weight] = [0, 0];
  return values.map((value) => {
    if (value === null || value === undefined) return null;
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return sum / weight;
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
