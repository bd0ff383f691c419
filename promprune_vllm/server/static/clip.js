// Draws a video: one frame large, and all of them small, each with the number of tokens that it keeps.

import * as view from "./view.js";

const THUMB_PX = 160;
const COLORS = { salient: "#56b4e9", covering: "#f0b429", kept: "#f0b429" };

// What the endpoint would tell of one frame, if it were an image.
function asImage(reply, number) {
  const each = reply.boxes.length, first = number * each;
  const inside = (token) => token >= first && token < first + each;
  const own = (tokens) => tokens && tokens.filter(inside).map((token) => token - first);
  const groups = reply.groups.filter((group) => group.tokens.some(inside)).map((group) => ({
    ...group, tokens: own(group.tokens), kept: own(group.kept), salient: own(group.salient),
    saliency: group.saliency && group.saliency.filter((_, at) => inside(group.tokens[at])),
  }));
  return { ...reply, seen: each, indices: reply.frames[number].kept, views: [0], groups };
}

const told = (reply, number) => `Frame ${number + 1}: ${reply.frames[number].kept.length} of ${reply.boxes.length} tokens kept`;

function thumbnail(reply, number, picture) {
  const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
  const scale = THUMB_PX / Math.max(reply.width, reply.height);
  [canvas.width, canvas.height] = [reply.width, reply.height].map((side) => Math.max(1, Math.round(side * scale)));
  const states = view.tokenStates(asImage(reply, number)), image = new Image();
  image.onload = () => {
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    reply.boxes.forEach((box, token) => {
      const [left, top, right, bottom] = box.map((edge) => Math.round(edge * scale));
      if (states[token] === "dropped") {
        pen.fillStyle = "rgb(0 0 0 / 0.72)";
        pen.fillRect(left, top, right - left, bottom - top);
      } else {
        pen.strokeStyle = COLORS[states[token]];
        pen.strokeRect(left + 0.5, top + 0.5, right - left - 1, bottom - top - 1);
      }
    });
  };
  image.src = picture;
  return canvas;
}

// Draws one frame large, and returns whether a part of it is cropped.
function drawFrame(container, reply, pictures, name, number) {
  const drawn = view.draw(container, asImage(reply, number), pictures[number], `${name}, frame ${number + 1}`);
  container.querySelectorAll("rect.cell").forEach((cell) => { cell.dataset.token = Number(cell.dataset.token) + number * reply.boxes.length; });
  return drawn;
}

// Draws everything. `strip` has a slider and a place for the thumbnails; `chosen` is called with another frame's number.
export function draw(container, strip, reply, pictures, name, number, chosen) {
  const slider = strip.querySelector("input"), list = strip.querySelector("#thumbs"), last = reply.frames.length;
  slider.max = last;
  const choose = (next, scroll) => {
    slider.value = next + 1;
    strip.querySelector("output").textContent = `${next + 1} of ${last}`;
    list.querySelectorAll("button").forEach((button, at) => button.setAttribute("aria-pressed", at === next));
    const button = list.children[next];
    if (scroll) list.scrollTop = button.offsetTop - (list.clientHeight - button.clientHeight) / 2;
    chosen(next);
    return drawFrame(container, reply, pictures, name, next);
  };
  slider.oninput = () => choose(slider.value - 1, true);
  list.replaceChildren(...reply.frames.map((frame, at) => {
    const button = document.createElement("button"), count = document.createElement("span");
    button.type = "button";
    button.setAttribute("aria-label", told(reply, at));
    count.textContent = frame.kept.length;
    button.append(thumbnail(reply, at, pictures[at]), count);
    button.addEventListener("click", () => choose(at, false));
    return button;
  }));
  return choose(Math.min(number, last - 1), true);
}
