// What the measurements say to somebody who must choose: an answer for each thing one may want, and what to keep in mind.
//
// It claims no more than was measured: nothing is ranked before enough tokens were timed or scored, and speeds within
// five percent of each other, which move by that much from minute to minute, are called the same.

import { bytes, factor, number, percent } from "./format.js";

const FEW_GAPS = 300;
const FEW_TOKENS = 200;
const TOLD_APART = 1.05;

/**
 * `points`: {variant, size, speed, gaps, drift, agreement, scored, guard} of every ready variant (see panels/choice.js);
 * `reference`: the one of them that the others are held against, or undefined. Returns `{answers, remarks}`: an answer is
 * `{want, points, why}`.
 */
export function adviceOn(points, reference) {
  const timed = points.filter((p) => Number.isFinite(p.speed));
  const ranked = timed.length > 1 && timed.every((p) => p.gaps >= FEW_GAPS) ? timed : [];
  const scored = points.filter((p) => p.scored >= FEW_TOKENS);
  const answers = [];
  if (scored.length && !contested(points, scored)) answers.push(closest(scored, reference));
  if (ranked.length) answers.push(fastest(ranked, reference));
  if (points.length > 1) answers.push(smallest(points, reference));
  return { answers, remarks: [...unknown(points, timed, reference), ...beyond(scored), ...beaten(ranked, scored, reference)] };
}

/** Whether one of whom too little was scored to tell looks closer than all of whom enough was. */
function contested(points, scored) {
  const best = Math.min(...scored.map((p) => p.drift));
  return points.some((p) => p.scored > 0 && p.scored < FEW_TOKENS && p.drift < best);
}

function closest(scored, reference) {
  const point = least(scored, (p) => p.drift);
  const why = said(agreement(point, reference), speed(point, reference), size(point, reference));
  return { want: `Closest to ${nameOf(reference)}`, points: [point], why };
}

function fastest(ranked, reference) {
  const top = Math.max(...ranked.map((p) => p.speed));
  const points = ranked.filter((p) => p.speed * TOLD_APART > top);
  if (points.length > 1) return { want: "Fastest", points, why: "about as fast as each other" };
  return { want: "Fastest", points, why: said(speed(points[0], reference), agreement(points[0], reference)) };
}

function smallest(points, reference) {
  const point = least(points, (p) => p.size);
  const why = said(bytes(point.size), size(point, reference), agreement(point, reference));
  return { want: "Smallest", points: [point], why };
}

const said = (...parts) => parts.filter(Boolean).join("; ");

const nameOf = (reference) => reference?.variant.name ?? "the reference";

function speed(point, reference) {
  const ratio = point === reference ? NaN : point.speed / reference?.speed;
  return Number.isFinite(ratio) ? `${factor(ratio)} the speed` : "";
}

function size(point, reference) {
  return point === reference || !reference ? "" : `${factor(point.size / reference.size)} the bytes`;
}

function agreement(point, reference) {
  if (point === reference) return "it is the reference";
  if (!(point.scored >= FEW_TOKENS)) return "its quality is not measured yet";
  return `${percent(point.agreement)} of its tokens are ${nameOf(reference)}'s first choice (KL ${number(point.drift, 2)})`;
}

function unknown(points, timed, reference) {
  const told = [];
  const few = timed.filter((p) => p.gaps < FEW_GAPS);
  if (!timed.length) told.push("No answers yet to time. Send some, or try the loupe.");
  else if (few.length) told.push(`Too few tokens timed yet to tell: ${listed(few)}.`);
  else if (timed.length === 1) told.push(`Only ${timed[0].variant.name} has answered so far.`);
  const unscored = points.filter((p) => p !== reference && p.scored > 0 && p.scored < FEW_TOKENS);
  if (unscored.length) told.push(`Too few tokens scored yet to tell: ${listed(unscored)}.`);
  return told;
}

function beyond(scored) {
  const strayed = scored.filter((p) => p.drift > p.guard);
  return strayed.map((p) => {
    return `${p.variant.name} is beyond its guard: it strays further than its precision should (KL ${number(p.drift, 2)}, guard ${number(p.guard, 2)}).`;
  });
}

/** Another is faster, no larger, and where quality is known closer, too. */
function beaten(ranked, scored, reference) {
  const closer = (other, p) => other === reference || other.drift < p.drift;
  const beats = (other, p) => other.speed > p.speed * TOLD_APART && other.size <= p.size && (!scored.length || closer(other, p));
  return ranked.flatMap((p) => {
    const better = p === reference ? [] : ranked.filter((other) => beats(other, p));
    if (!better.length) return [];
    const best = least(better, (other) => other.size).variant.name;
    return [`Nothing speaks for ${p.variant.name}: ${best} is ${scored.length ? "faster, smaller and closer" : "faster and smaller"}.`];
  });
}

const least = (points, valueOf) => points.reduce((best, point) => (valueOf(point) < valueOf(best) ? point : best));

const listed = (points) => points.map((p) => p.variant.name).join(", ");
