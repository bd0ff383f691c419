// Draws the image with its tokens: one figure for each view that the model has of it.

const SVG = "http://www.w3.org/2000/svg";

export function element(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent?.append(made);
  return made;
}

// What became of each token: "salient", "covering", "kept" (no stages known) or "dropped".
export function fates(told) {
  const fate = new Array(told.seen).fill("dropped");
  for (const i of told.indices) fate[i] = "kept";
  for (const group of told.groups) {
    if (group.salient === null) continue;
    for (const i of group.kept) fate[i] = "covering";
    for (const i of group.salient) fate[i] = "salient";
  }
  return fate;
}

// Saliency of each token as a share of the largest of its group, or null where nobody looked at it.
export function heat(told) {
  const values = new Array(told.seen).fill(null);
  for (const group of told.groups) {
    if (group.saliency === null) continue;
    const largest = Math.max(...group.saliency) || 1;
    group.tokens.forEach((token, i) => { values[token] = group.saliency[i] / largest; });
  }
  return values.some((value) => value !== null) ? values : null;
}

export function draw(place, told, url, name) {
  const fate = fates(told), warmth = heat(told);
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
      if (warmth) cell.style.setProperty("--heat", ((warmth[token] ?? 0) ** 0.5).toFixed(3));
    }
    const what = told.views.length === 1 ? name : number === 0 ? `${name}, whole` : `${name}, in crops at full size`;
    const caption = `${what}: ${lit} of ${to - from} tokens kept`;
    svg.setAttribute("aria-label", caption);
    const line = document.createElement("figcaption");
    line.textContent = caption;
    figure.append(line);
    place.append(figure);
  });
  return { fate, warmth };
}
