// Draws the image with its tokens: one figure for each view (the whole image, or its crops).

const SVG = "http://www.w3.org/2000/svg";

export function element(name, attributes, parent) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent?.append(node);
  return node;
}

// State of each token: "salient", "covering", "kept" (the method has no stages) or "dropped".
export function tokenStates(reply) {
  const states = new Array(reply.seen).fill("dropped");
  for (const i of reply.indices) states[i] = "kept";
  for (const group of reply.groups) {
    if (group.salient === null) continue;
    for (const i of group.kept) states[i] = "covering";
    for (const i of group.salient) states[i] = "salient";
  }
  return states;
}

// Saliency of each token as its rank in its group, 0 to 1 (a few tokens may have nearly all the saliency), or null
// if the method does not use it.
function saliencyRanks(reply) {
  const values = new Array(reply.seen).fill(null);
  for (const group of reply.groups) {
    if (group.saliency === null) continue;
    const order = group.tokens.map((_, i) => i).sort((a, b) => group.saliency[a] - group.saliency[b]);
    order.forEach((i, rank) => { values[group.tokens[i]] = rank / Math.max(1, order.length - 1); });
  }
  return values.some((value) => value !== null) ? values : null;
}

// Hatches the part of the image that no token covers: some towers crop to a square. Returns whether there is any.
function hatch(svg, reply, boxes) {
  const [left, top] = [0, 1].map((edge) => Math.min(...boxes.map((box) => box[edge])));
  const [right, bottom] = [2, 3].map((edge) => Math.max(...boxes.map((box) => box[edge])));
  if (left <= 0.5 && top <= 0.5 && right >= reply.width - 0.5 && bottom >= reply.height - 0.5) return false;
  const pattern = element("pattern", { id: "hatch", width: 8, height: 8, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, svg);
  element("rect", { width: 8, height: 8, fill: "#000", "fill-opacity": 0.75 }, pattern);
  element("rect", { width: 3, height: 8, fill: "#888", "fill-opacity": 0.75 }, pattern);
  const frame = `M0 0H${reply.width}V${reply.height}H0Z`, hole = `M${left} ${top}V${bottom}H${right}V${top}Z`;
  element("path", { d: frame + hole, class: "unseen" }, svg);
  return true;
}

// Returns whether there is a part that no token covers.
export function draw(container, reply, url, name) {
  const states = tokenStates(reply), heat = saliencyRanks(reply);
  let cropped = false;
  // Some models have the whole image first, others last; its tokens are the larger ones.
  const widths = reply.views.map((first) => reply.boxes[first][2] - reply.boxes[first][0]);
  const whole = widths.indexOf(Math.max(...widths));
  container.replaceChildren();
  reply.views.forEach((from, number) => {
    const to = reply.views[number + 1] ?? reply.seen;
    const figure = document.createElement("figure");
    const svg = element("svg", { viewBox: `0 0 ${reply.width} ${reply.height}`, role: "img" }, figure);
    element("image", { href: url, width: reply.width, height: reply.height, preserveAspectRatio: "none" }, svg);
    let kept = 0;
    for (let token = from; token < to; token++) {
      const box = reply.boxes[token];
      if (states[token] !== "dropped") kept++;
      if (box === null) continue;
      const [left, top, right, bottom] = box;
      const cell = element("rect", {
        x: left, y: top, width: Math.max(0, right - left), height: Math.max(0, bottom - top),
        class: `cell ${states[token]}`, "data-token": token,
      }, svg);
      if (heat) cell.style.setProperty("--heat", (0.9 * (heat[token] ?? 0) ** 3).toFixed(3));
    }
    if (number === 0) cropped = hatch(svg, reply, reply.boxes.slice(from, to).filter((box) => box !== null));
    const what = reply.views.length === 1 ? name : number === whole ? `${name}, whole` : `${name}, in crops at full size`;
    const caption = `${what}: ${kept} of ${to - from} tokens kept`;
    svg.setAttribute("aria-label", caption);
    const line = document.createElement("figcaption");
    line.textContent = caption;
    figure.append(line);
    container.append(figure);
  });
  return cropped;
}
