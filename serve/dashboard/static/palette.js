// One colour, dash and mark per variant, by its place in the configuration: told apart without colour, too.

const DASHES = [[], [7, 3], [2, 3], [10, 3, 2, 3], [4, 2], [12, 4], [1, 2], [6, 2, 1, 2]];
const MARKS = ["●", "■", "▲", "◆", "▼", "★", "✚", "○"];
const COUNT = MARKS.length;

export const seriesClass = (variant) => `series-${variant.index % COUNT}`;

export const markOf = (variant) => MARKS[variant.index % COUNT];

export const dashOf = (variant) => DASHES[variant.index % COUNT];

/** Read when drawn, so that a chart follows the theme. */
export const colorOf = (variant) => themed(`--series-${variant.index % COUNT}`);

export const themed = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
