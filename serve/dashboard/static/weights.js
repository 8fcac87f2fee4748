// Percentages that sum to 100 whatever a hand does to one of them.

/**
 * `weights` by name with `name` set to `value`: the others keep their proportions, in whole percent. Where all others
 * are zero, `fallback` takes the rest (or the first other, if it is `fallback` itself that moves).
 */
export function rebalanced(weights, name, value, fallback) {
  const others = Object.keys(weights).filter((other) => other !== name);
  if (!others.length) return { [name]: 100 };
  const rest = 100 - value;
  const before = others.reduce((total, other) => total + weights[other], 0);
  const heir = others.includes(fallback) ? fallback : others[0];
  const ideal = others.map((other) => (before ? (rest * weights[other]) / before : other === heir ? rest : 0));
  const whole = largestRemainder(ideal, rest);
  return Object.fromEntries(Object.keys(weights).map((key) => [key, key === name ? value : whole[others.indexOf(key)]]));
}

function largestRemainder(ideal, total) {
  const floors = ideal.map(Math.floor);
  const missing = Math.round(total - floors.reduce((sum, value) => sum + value, 0));
  const order = ideal.map((value, index) => [value - floors[index], index]).sort((a, b) => b[0] - a[0]);
  for (const [, index] of order.slice(0, missing)) floors[index] += 1;
  return floors;
}

export const rounded = (weight) => Number(weight.toFixed(2));
