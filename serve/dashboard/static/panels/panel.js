// What every panel is: `{title, node, available(view), update(view)}`. A new one is a file here and a line in index.js.

import { el } from "../dom.js";

/** A section with its heading. `available` says whether the server has anything for it to show. */
export function panel({ id, title, lead, available = () => true, update }, ...children) {
  const heading = el("h2", { id: `${id}-title` }, title);
  const head = el("div", { class: "panel-head" }, heading, lead ? el("p", { class: "lead" }, lead) : null);
  const node = el("section", { id, class: "panel", "aria-labelledby": `${id}-title`, hidden: true }, head, ...children);
  return { title, node, available, update };
}
