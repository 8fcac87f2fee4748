// What every panel is: `{title, node, available(view), update(view)}`. A new one is a file here and a line in index.js.

import { el, setText, show } from "../dom.js";
import { clock } from "../format.js";

const OLD_MS = 5000;

/**
 * A section with its heading. `available` says whether the server has anything for it to show; `source` names the part
 * of the admin routes' answers that it shows (see snapshot.js): once that is old, the panel says of when it is.
 */
export function panel({ id, title, lead, source, available = () => true, update }, ...children) {
  const heading = el("h2", { id: `${id}-title` }, title);
  const age = el("p", { class: "age", hidden: true });
  const head = el("div", { class: "panel-head" }, heading, lead ? el("p", { class: "lead" }, lead) : null, age);
  const node = el("section", { id, class: "panel", "aria-labelledby": `${id}-title`, hidden: true }, head, ...children);
  const updateAll = (view) => {
    update(view);
    tellAge(age, view.snapshot, source);
  };
  return { title, node, available, update: updateAll };
}

function tellAge(node, { atMs, asOfMs }, source) {
  const since = asOfMs[source] ?? null;
  show(node, since !== null && atMs - since > OLD_MS);
  if (!node.hidden) setText(node, `as of ${clock(since)}: no answer since`);
}
