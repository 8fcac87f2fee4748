// Prometheus' text format (version 0.0.4), and what can be said from histogram buckets.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?$/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { n: "\n", '"': '"', "\\": "\\" };

/** A map from a series' name to its samples, `{labels, value}` each. Lines that say nothing are passed over. */
export function parse(text) {
  const series = new Map();
  for (const line of text.split("\n")) {
    const found = line.startsWith("#") ? null : LINE.exec(line.trim());
    if (!found) continue;
    const sample = { labels: labelsOf(found[2]), value: numberOf(found[3]) };
    if (series.has(found[1])) series.get(found[1]).push(sample);
    else series.set(found[1], [sample]);
  }
  return series;
}

function labelsOf(text) {
  const labels = {};
  for (const [, name, value] of (text ?? "").matchAll(LABEL)) {
    labels[name] = value.replace(/\\(.)/g, (whole, escaped) => ESCAPES[escaped] ?? whole);
  }
  return labels;
}

function numberOf(text) {
  if (text === "+Inf" || text === "Inf") return Infinity;
  return text === "-Inf" ? -Infinity : Number(text);
}

/** One histogram as `{edges, counts, sum}`: `counts` are cumulative, the last edge is Infinity. */
export function histogramOf(series, name, matches) {
  const buckets = (series.get(`${name}_bucket`) ?? []).filter((sample) => matches(sample.labels));
  if (!buckets.length) return null;
  const ordered = buckets.map(({ labels, value }) => [numberOf(labels.le), value]).sort((a, b) => a[0] - b[0]);
  const sum = (series.get(`${name}_sum`) ?? []).find((sample) => matches(sample.labels))?.value ?? 0;
  return { edges: ordered.map(([edge]) => edge), counts: ordered.map(([, value]) => value), sum };
}

/** What was observed after `earlier`; all of `later` where there is no earlier one, or a counter fell. */
export function difference(later, earlier) {
  if (!later || !earlier || later.counts.some((value, index) => value < earlier.counts[index])) return later;
  const counts = later.counts.map((value, index) => value - earlier.counts[index]);
  return { edges: later.edges, counts, sum: later.sum - earlier.sum };
}

export const observations = (histogram) => histogram?.counts.at(-1) ?? 0;

export const mean = (histogram) => (observations(histogram) ? histogram.sum / observations(histogram) : NaN);

/** As Prometheus' histogram_quantile: linear inside a bucket; the last finite edge where it lies beyond. */
export function quantile(histogram, q) {
  const total = observations(histogram);
  if (!total) return NaN;
  const rank = q * total;
  const index = histogram.counts.findIndex((value) => value >= rank);
  const upper = histogram.edges[index];
  if (upper === Infinity) return histogram.edges[index - 1] ?? NaN;
  const lower = index ? histogram.edges[index - 1] : 0;
  const below = index ? histogram.counts[index - 1] : 0;
  const inside = histogram.counts[index] - below;
  return inside ? lower + ((upper - lower) * (rank - below)) / inside : upper;
}
