// Every text on the page with its contrast to the ground that it is seen on (WCAG 2.2, success criterion 1.4.3). A
// translucent ground or text, and the opacity of whatever surrounds it, is composited as the browser does it.
() => {
  const parse = (text) => {
    const numbers = text.match(/-?[\d.]+(e-?\d+)?/g)?.map(Number) ?? [0, 0, 0, 0];
    const [r, g, b, a = 1] = numbers;
    return text.startsWith("color(") ? [r * 255, g * 255, b * 255, a] : [r, g, b, a];
  };
  const over = ([r, g, b, a = 1], ground, opacity = 1) =>
    [r, g, b].map((value, i) => value * a * opacity + ground[i] * (1 - a * opacity));
  const styles = (node) => getComputedStyle(node);
  const opaque = (node) => {
    const own = parse(styles(node).backgroundColor);
    return over(own, node.parentElement ? opaque(node.parentElement) : [255, 255, 255]);
  };
  const faded = (node, colour) => {
    for (let at = node; at.parentElement; at = at.parentElement) {
      colour = over([...colour, 1], opaque(at.parentElement), Number(styles(at).opacity));
    }
    return colour;
  };
  const linear = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ratio = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const found = [];
  const look = (node, what, style) => {
    if (!node.checkVisibility({ visibilityProperty: true }) || node.closest(":disabled, label:has(:disabled), .unseen, .skip:not(:focus), option")) return;
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const ground = opaque(node);
    const ink = over(parse(style.color), ground);
    found.push({ what, ratio: ratio(faded(node, ink), faded(node, ground)), least: large ? 3 : 4.5 });
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const { data, parentElement: node } = texts.currentNode;
    if (!data.trim() || node.closest("script, style, noscript")) continue;
    look(node, `${node.tagName}.${node.className} ${data.trim().slice(0, 40)}`, styles(node));
  }
  for (const node of document.querySelectorAll("input, textarea, select")) {
    look(node, `${node.tagName} ${node.name}`, styles(node));
    if (node.placeholder) look(node, `placeholder ${node.placeholder}`, getComputedStyle(node, "::placeholder"));
  }
  for (const node of document.querySelectorAll(".diverged")) look(node, "::before ≠", getComputedStyle(node, "::before"));
  // What a canvas draws: lines and marks (3 is enough), and names and axes beside them. And edges of controls.
  const surface = opaque(document.querySelector(".panel"));
  const named = (name) => {
    const probe = document.body.appendChild(document.createElement("i"));
    probe.style.color = `var(${name})`;
    const colour = parse(styles(probe).color);
    probe.remove();
    return colour;
  };
  const drawn = [...Array(8).keys()].map((index) => [`--series-${index}`, 4.5]);
  for (const [name, least] of [...drawn, ["--muted", 4.5], ["--edge", 3], ["--accent", 3]]) {
    found.push({ what: name, ratio: ratio(named(name), surface), least });
  }
  return found;
}
