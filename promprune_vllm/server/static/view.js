// Draws the image with its tokens: one figure for each view that the model has of it.

const SVG = "http://www.w3.org/2000/svg";

export function element(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent?.append(made);
  return made;
}

// What became of each token: "salient", "covering", "kept" (no stages known) or "dropped".
function fates(told) {
  const fate = new Array(told.seen).fill("dropped");
  for (const i of told.indices) fate[i] = "kept";
  for (const group of told.groups) {
    if (group.salient === null) continue;
    for (const i of group.kept) fate[i] = "covering";
    for (const i of group.salient) fate[i] = "salient";
  }
  return fate;
}

// Saliency of each token as its rank in its group, 0 to 1 (a few tokens may have nearly all of it), or null where
// nobody looked at it.
function heat(told) {
  const values = new Array(told.seen).fill(null);
  for (const group of told.groups) {
    if (group.saliency === null) continue;
    const order = group.tokens.map((_, i) => i).sort((a, b) => group.saliency[a] - group.saliency[b]);
    order.forEach((i, rank) => { values[group.tokens[i]] = rank / Math.max(1, order.length - 1); });
  }
  return values.some((value) => value !== null) ? values : null;
}

// Marks what no token looks at: a tower that sees a square cuts off the rest. Returns whether there is any.
function hatch(svg, told, boxes) {
  const [left, top] = [0, 1].map((edge) => Math.min(...boxes.map((box) => box[edge])));
  const [right, bottom] = [2, 3].map((edge) => Math.max(...boxes.map((box) => box[edge])));
  if (left <= 0.5 && top <= 0.5 && right >= told.width - 0.5 && bottom >= told.height - 0.5) return false;
  const pattern = element("pattern", { id: "hatch", width: 8, height: 8, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, svg);
  element("rect", { width: 8, height: 8, fill: "#000", "fill-opacity": 0.75 }, pattern);
  element("rect", { width: 3, height: 8, fill: "#888", "fill-opacity": 0.75 }, pattern);
  const frame = `M0 0H${told.width}V${told.height}H0Z`, hole = `M${left} ${top}V${bottom}H${right}V${top}Z`;
  element("path", { d: frame + hole, class: "unseen" }, svg);
  return true;
}

export function draw(place, told, url, name) {
  const fate = fates(told), warmth = heat(told);
  let cut = false;
  place.replaceChildren();
  told.views.forEach((from, number) => {
    const to = told.views[number + 1] ?? told.seen;
    const figure = document.createElement("figure");
    const svg = element("svg", { viewBox: `0 0 ${told.width} ${told.height}`, role: "img" }, figure);
    element("image", { href: url, width: told.width, height: told.height, preserveAspectRatio: "none" }, svg);
    let lit = 0;
    for (let token = from; token < to; token++) {
      const box = told.boxes[token];
      if (fate[token] !== "dropped") lit++;
      if (box === null) continue;
      const [left, top, right, bottom] = box;
      const cell = element("rect", {
        x: left, y: top, width: Math.max(0, right - left), height: Math.max(0, bottom - top),
        class: `cell ${fate[token]}`, "data-token": token,
      }, svg);
      if (warmth) cell.style.setProperty("--heat", (0.9 * (warmth[token] ?? 0) ** 3).toFixed(3));
    }
    if (number === 0) cut = hatch(svg, told, told.boxes.slice(from, to).filter((box) => box !== null));
    const what = told.views.length === 1 ? name : number === 0 ? `${name}, whole` : `${name}, in crops at full size`;
    const caption = `${what}: ${lit} of ${to - from} tokens kept`;
    svg.setAttribute("aria-label", caption);
    const line = document.createElement("figcaption");
    line.textContent = caption;
    figure.append(line);
    place.append(figure);
  });
  return { fate, warmth, cut };
}
