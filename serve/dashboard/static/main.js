// The page: looks at the server once a second and hands each look to every panel that has something to say about it.

import { redrawAll } from "./charts.js";
import { key } from "./client.js";
import { el, keyed, setText, show } from "./dom.js";
import { clock, span } from "./format.js";
import { History } from "./history.js";
import { KeyDialog } from "./key.js";
import { PANELS } from "./panels/index.js";
import { Poller } from "./poller.js";
import { viewOf } from "./view.js";

const byId = (id) => document.getElementById(id);
const history = new History();
const dialog = new KeyDialog(() => poller.now());
const poller = new Poller(onSnapshot, onError);
const panels = PANELS.map((make) => make({ look: () => poller.now(), askKey: (reason) => dialog.open(reason) }));
const windowChoice = byId("window");
const themeChoice = byId("theme");
let refusal = null;

start();

function start() {
  byId("main").append(...panels.map((panel) => panel.node));
  remember(windowChoice, "halftone-window", update);
  remember(themeChoice, "halftone-theme", applyTheme);
  applyTheme();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
  byId("key").addEventListener("click", () => dialog.open("The key that this tab sends with every question."));
  poller.now();
}

function onSnapshot(snapshot, adminRefusal) {
  refusal = adminRefusal;
  history.push(snapshot);
  show(byId("trouble"), false);
  document.body.classList.remove("stale");
  update();
}

/** One look that fails is a slow moment, not a lost server: the second in a row is told. */
function onError(error, retryMs, failures) {
  if (failures === 1 && history.latest && error.status !== 401) {
    setText(byId("status"), `No answer since ${clock(history.latest.atMs)}; asking again`);
    return;
  }
  const trouble = byId("trouble");
  const seen = history.latest ? ` What you see is from ${clock(history.latest.atMs)}.` : "";
  const next = Number.isFinite(retryMs) ? ` Next try in ${Math.round(retryMs / 1000)} s.` : "";
  const message = error.status === 401 ? "This server answers only those who send a key: “Key …” above takes it." : error.message;
  setText(trouble, `${message.replace(/[^.!?]$/, "$&.")}${seen}${next}`);
  show(trouble, true);
  document.body.classList.toggle("stale", history.latest !== null);
  setText(byId("status"), "Not connected");
  if (error.status === 401) {
    dialog.open(key.get() ? "The server refused this key." : "This server answers only those who send a key.");
  }
}

function update() {
  if (!history.latest) return;
  const view = viewOf(history, Number(windowChoice.value), refusal);
  setText(byId("model"), view.snapshot.model);
  setText(byId("status"), statusOf(view));
  document.title = `${view.snapshot.model} · Halftone`;
  for (const panel of panels) {
    show(panel.node, panel.available(view));
    if (!panel.node.hidden) panel.update(view);
  }
  updateSections();
}

function statusOf({ variants, span: { whole, seconds, quiet } }) {
  const ready = variants.filter((variant) => variant.state === "ready").length;
  const when = quiet ? "quiet now: numbers of the whole run" : whole ? "numbers of the whole run" : `last ${span(seconds)}`;
  return `${ready} of ${variants.length} variants ready · ${when}`;
}

function updateSections() {
  const visible = panels.filter((panel) => !panel.node.hidden);
  const make = (panel) => el("a", { href: `#${panel.node.id}` }, panel.title);
  keyed(byId("sections"), visible, (panel) => panel.node.id, make, () => {});
}

function remember(choice, name, onChange) {
  const stored = localStorage.getItem(name);
  if ([...choice.options].some((option) => option.value === stored)) choice.value = stored;
  choice.addEventListener("change", () => {
    localStorage.setItem(name, choice.value);
    onChange();
  });
}

function applyTheme() {
  if (themeChoice.value) document.documentElement.dataset.theme = themeChoice.value;
  else delete document.documentElement.dataset.theme;
  redrawAll();
}
