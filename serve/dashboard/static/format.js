// Numbers as people read them: three significant digits, a unit, and an en dash where nothing is known.

export const NOTHING = "–";

const known = (value) => typeof value === "number" && Number.isFinite(value);

function significant(value, digits = 3) {
  if (value === 0) return "0";
  const decimals = Math.max(0, digits - 1 - Math.floor(Math.log10(Math.abs(value))));
  return value.toLocaleString("en", { minimumFractionDigits: 0, maximumFractionDigits: Math.min(decimals, 6) });
}

export function number(value, digits = 3) {
  return known(value) ? significant(value, digits) : NOTHING;
}

export function count(value) {
  return known(value) ? Math.round(value).toLocaleString("en") : NOTHING;
}

/** Seconds; `Infinity` is a quantile beyond the last bucket. */
export function duration(seconds, digits = 3) {
  if (!known(seconds)) return NOTHING;
  if (seconds < 1) return `${significant(seconds * 1000, digits)} ms`;
  return seconds < 120 ? `${significant(seconds, digits)} s` : `${significant(seconds / 60, digits)} min`;
}

export function span(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${significant(seconds / 3600, 2)} h`;
}

export function bytes(value, digits = 3) {
  if (!known(value)) return NOTHING;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let size = Math.abs(value);
  let unit = 0;
  while (size >= 1000 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${value < 0 ? "−" : ""}${significant(size, digits)} ${units[unit]}`;
}

export function percent(ratio, digits = 3) {
  if (!known(ratio)) return NOTHING;
  if (ratio > 0 && ratio < 0.0001) return "<0.01 %";
  return `${significant(ratio * 100, digits)} %`;
}

export function factor(ratio) {
  return known(ratio) ? `${ratio.toFixed(2)}×` : NOTHING;
}

export function clock(milliseconds) {
  return new Date(milliseconds).toLocaleTimeString("en-GB");
}
