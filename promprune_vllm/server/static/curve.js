// Draws the curve by which entropy splits the budget, and this image's point on it.

import { element } from "./view.js";

const LEFT = 46, RIGHT = 310, TOP = 12, BOTTOM = 146;

export function draw(figure, reply) {
  const options = reply.method?.options ?? {};
  const groups = reply.groups.filter((group) => group.entropy !== null && group.salient !== null);
  figure.hidden = !(groups.length && "mu" in options && "tau" in options);
  if (figure.hidden) return;
  const { mu, tau, kr_min: low = 0, kr_max: high = 1 } = options;
  const share = (h) => low + (high - low) * (1 - 1 / (1 + Math.exp(-Math.max(-20, Math.min(20, (h - mu) / tau)))));
  const x = (h) => LEFT + (RIGHT - LEFT) * h, y = (s) => BOTTOM - (BOTTOM - TOP) * s;
  const svg = figure.querySelector("svg");
  svg.replaceChildren();
  element("line", { class: "axis", x1: LEFT, x2: RIGHT, y1: BOTTOM, y2: BOTTOM }, svg);
  element("line", { class: "axis", x1: LEFT, x2: LEFT, y1: TOP, y2: BOTTOM }, svg);
  element("line", { class: "mu", x1: x(mu), x2: x(mu), y1: TOP, y2: BOTTOM }, svg);
  const label = (text, at, anchor = "middle") => {
    element("text", { x: at[0], y: at[1], "text-anchor": anchor }, svg).textContent = text;
  };
  label(`μ = ${mu}`, [x(mu), BOTTOM + 14]);
  label("0", [LEFT, BOTTOM + 14]); label("1", [RIGHT, BOTTOM + 14]);
  label("entropy", [(LEFT + RIGHT) / 2, BOTTOM + 29]);
  label("salient", [LEFT - 4, TOP + 8], "end"); label("cover", [LEFT - 4, BOTTOM], "end");
  const points = Array.from({ length: 201 }, (_, i) => i / 200).map((h) => `${x(h).toFixed(1)},${y(share(h)).toFixed(1)}`);
  element("polyline", { class: "line", points: points.join(" ") }, svg);
  for (const group of groups) {
    const at = group.kept.length ? group.salient.length / group.kept.length : 0;
    element("circle", { cx: x(group.entropy), cy: y(at), r: 5 }, svg);
  }
  const salient = groups.reduce((sum, group) => sum + group.salient.length, 0);
  const kept = groups.reduce((sum, group) => sum + group.kept.length, 0);
  const each = groups.map((group) => group.entropy);  // a long video has many
  const entropies = each.length > 8 ? [Math.min(...each), Math.max(...each)].map((h) => h.toFixed(3)).join(" to ")
    : each.map((h) => h.toFixed(3)).join(", ");
  figure.querySelector("figcaption").textContent =
    `Entropy ${entropies}: ${salient} tokens selected for saliency, ${kept - salient} for coverage.`;
}
