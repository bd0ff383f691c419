import * as api from "./api.js";
import * as clip from "./clip.js";
import * as curve from "./curve.js";
import * as view from "./view.js";

const get = (id) => document.getElementById(id);
const MAX_BYTES = 32 * 2 ** 20;
const SETTLE_MS = 150, STRIP_MS = 2000, ANSWER_TOKENS = 128;
const medium = { kind: "image", url: null, name: "", pictures: null, frame: 0 };  // a video's pictures, of its frames
let server = null, pendingInspection = null, pendingChat = null;

function showError(sentence) {
  get("error").textContent = sentence;
  get("error").hidden = !sentence;
}

async function guarded(work) {
  try {
    return await work();
  } catch (error) {
    if (error.name === "AbortError") return undefined;
    if (error instanceof api.Refused) showError(error.message);
    else { showError(`Internal error in this page: ${error.message}.`); console.error(error); }
    return undefined;
  }
}

const key = () => get("key").value.trim();
const budget = () => Number(get("budget").value);
const method = () => get("method").value;
const again = () => ({ visual_token_escalate: Number(get("below").value) || false });
const sent = () => ({ [medium.kind]: medium.url, text: get("question").value || null });
const takes = (kind) => server?.allowed_methods.some((each) => each.prunes.includes(kind));
const wanted = () => ({ visual_token_budget: budget(), ...(method() ? { visual_token_method: method() } : {}) });

// ---- the image or video ----------------------------------------------------------------------------------------

async function take(files) {
  showError("");
  if (files.length > 1) return showError(`One ${takes("video") ? "file" : "image"} at a time, please: these are ${files.length}.`);
  const [file] = files;
  if (!file) return undefined;
  if (file.size > MAX_BYTES) {
    return showError(`${file.name} has ${(file.size / 2 ** 20).toFixed(0)} MB; this page sends at most ${MAX_BYTES / 2 ** 20} MB.`);
  }
  // Before the API key is typed, nobody knows what the server takes.
  const kind = (takes("video") || !server) && file.type.startsWith("video/") ? "video" : "image";
  try {
    if (kind === "image") (await createImageBitmap(file)).close();  // not every browser can read what the server can of videos
  } catch {
    return showError(`${file.name || "This"} is not an image that the browser can read${takes("video") ? ", and not a video" : ""}.`);
  }
  const url = await new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.readAsDataURL(file);
  });
  Object.assign(medium, { kind, url, name: file.name || kind, pictures: null, frame: 0 });
  offerMethods();
  get("send").disabled = !server;
  for (const id of ["answer-full", "answer-pruned", "time-full", "time-pruned"]) get(id).textContent = "";
  get("sureness").hidden = true;
  return inspect();
}

async function takeSample(name) {
  await guarded(async () => {
    const response = await fetch(`promprune/samples/${name}.jpg`);
    const blob = await response.blob();
    return take([new File([blob], `${name}.jpg`, { type: blob.type })]);
  });
}

// ---- what is kept ----------------------------------------------------------------------------------------------

async function inspect() {
  if (!medium.url) return;
  pendingInspection?.abort();
  pendingInspection = new AbortController();
  const { signal } = pendingInspection;
  get("picture").setAttribute("aria-busy", "true");
  const pictures = medium.kind === "video" && !medium.pictures;
  const body = { ...sent(), ...(pictures ? {} : { pictures: false }), answer: false, ...wanted() };
  const reply = await guarded(() => api.inspect(body, key(), signal));
  if (signal.aborted) return;
  get("picture").setAttribute("aria-busy", "false");
  if (reply === undefined) return;
  showError("");
  show(reply);
}

function show(reply) {
  for (const id of ["budget", "budget-number"]) get(id).max = reply.seen;
  const cropped = drawn(reply);
  get("legend").hidden = false;
  // Of a video, in any frame: some keep nothing, and another one may be chosen.
  const stages = reply.groups.some((group) => group.salient !== null);
  const heat = reply.groups.some((group) => group.saliency !== null);
  get("legend-salient").hidden = !stages;
  get("legend-covering").textContent = stages ? "covering" : "kept";
  get("legend-unseen").hidden = !cropped;
  get("heat").disabled = !heat;
  get("heat-row").title = heat ? "" : "This method does not use saliency.";
  curve.draw(get("curve"), reply);
  const bytes = (n) => (n >= 2 ** 20 ? `${(n / 2 ** 20).toFixed(1)} MiB` : `${(n / 1024).toFixed(0)} KiB`);
  const rows = [
    ["seen", reply.seen], ["kept", reply.kept],
    ["saved", `${reply.seen - reply.kept} (${(100 * (1 - reply.kept / reply.seen)).toFixed(1)}%)`],
    ["KV cache saved", reply.kv_cache ? `${bytes(reply.kv_cache.saved)} of ${bytes(reply.kv_cache.seen)}` : "unknown"],
    ["method", reply.method?.name ?? "none (all kept)"],
    ["selection", reply.selection_ms === null ? "–" : `${reply.selection_ms.toFixed(1)} ms`],
    ...(reply.frames ? [["frames", `${reply.frames.length} × ${reply.boxes.length} tokens`]] : []),
    [reply.frames ? "frame" : "image", `${reply.width} × ${reply.height} px`],
  ];
  get("counts").replaceChildren(...rows.flatMap(([name, value]) => {
    const term = document.createElement("dt"), data = document.createElement("dd");
    term.textContent = name; data.textContent = value; data.dataset.name = name;
    return [term, data];
  }));
  get("title-pruned").textContent = `${reply.kept} of ${reply.seen} tokens`;
}

// Draws the image or video, and returns whether a part of it is cropped.
function drawn(reply) {
  get("frames").hidden = !reply.frames;
  if (!reply.frames) return view.draw(get("views"), reply, medium.url, medium.name);
  medium.pictures ??= reply.frames.map((frame) => frame.picture);
  const chosen = (frame) => { medium.frame = frame; };
  return clip.draw(get("views"), get("frames"), reply, medium.pictures, medium.name, medium.frame, chosen);
}

// ---- answers ---------------------------------------------------------------------------------------------------

async function ask() {
  pendingChat?.abort();
  pendingChat = new AbortController();
  const { signal } = pendingChat;
  showError("");
  get("note").hidden = false;
  get("sureness").hidden = true;
  get("send").disabled = true;
  const part = { type: `${medium.kind}_url`, [`${medium.kind}_url`]: { url: medium.url } };
  const content = [part, { type: "text", text: get("question").value }];
  for (const [side, fields] of [["full", { visual_token_budget: "full" }], ["pruned", { ...wanted(), visual_token_escalate: false }]]) {
    get(`answer-${side}`).textContent = "";
    get(`time-${side}`).textContent = "…";
    const body = {
      model: server.model, max_tokens: ANSWER_TOKENS, cache_salt: crypto.getRandomValues(new Uint32Array(4)).join(""),
      messages: [{ role: "user", content }], ...fields,
    };
    const done = await guarded(() => api.chat(body, key(), signal, (text) => { get(`answer-${side}`).textContent += text; }));
    get(`time-${side}`).textContent = done?.first
      ? `first token after ${done.first.toFixed(0)} ms, ${done.usage?.prompt_tokens ?? "?"} prompt tokens` : "no answer";
    if (!done) break;
  }
  await showSureness(signal);
  get("send").disabled = false;
}

// Says in one paragraph how sure the model is of its answer with these tokens, and whether a client gets another.
async function showSureness(signal) {
  const body = { ...sent(), pictures: false, ...wanted(), ...again() };
  const reply = signal.aborted ? undefined : await guarded(() => api.inspect(body, key(), signal));
  if (!reply?.answer || signal.aborted) return;
  get("sureness").textContent = sureness(reply.answer, reply.seen);
  get("sureness").hidden = false;
}

function sureness(answer, seen) {
  const first = answer.first ?? answer;
  const quoted = (tried) => tried.text.trim().replace(/\.$/, "") || "nothing";
  // Rounded down, so that what is below the threshold also looks so.
  const share = (tried) => (Math.floor(1000 * tried.confidence) / 1000).toString();
  const said = `Answer with ${first.kept === seen ? "all" : first.kept} tokens: ${quoted(first)}.`;
  if (first.confidence === null) return `${said} This server does not tell how sure the model is.`;
  const sure = `${said} Confidence ${share(first)}`;
  if (answer.below === null) return `${sure}.`;
  if (answer.first) {
    const all = answer.kept === seen ? `all ${seen}` : answer.kept;
    return `${sure}, below ${answer.below}: asked again with ${all} tokens: ${quoted(answer)}.`;
  }
  if (first.confidence >= answer.below) return `${sure}, at least ${answer.below}: not asked again.`;
  return `${sure}, below ${answer.below}, but there is no second try with more tokens.`;
}

// ---- the strip -------------------------------------------------------------------------------------------------

let before = null;

async function strip() {
  const sums = await api.metrics().catch(() => null);
  if (!sums) return;
  const now = performance.now(), requests = sums.promprune_requests_total ?? 0;
  const seen = sums.promprune_visual_tokens_seen_total ?? 0, kept = sums.promprune_visual_tokens_kept_total ?? 0;
  get("strip-saved").textContent = (seen - kept).toLocaleString("en");
  get("strip-share").textContent = seen ? `${((100 * kept) / seen).toFixed(1)}%` : "–";
  if (before) get("strip-rate").textContent = ((1000 * (requests - before.requests)) / (now - before.now)).toFixed(1);
  before = { now, requests };
}

// ---- start -----------------------------------------------------------------------------------------------------

async function start() {
  server = (await guarded(() => api.state(key()))) ?? server;
  if (!server) return;
  get("model").textContent = `· ${server.model} (${server.family ?? server.architecture})`;
  if (!server.prunable) return showError(`This server cannot prune: ${server.reason}.`);
  showError("");
  get("file").accept = takes("video") ? "image/*,video/*" : "image/*";
  get("choose").textContent = takes("video") ? "Choose an image or a video" : "Choose an image";
  offerMethods();
  get("below").value = server.escalation.on ? server.escalation.below : "";
  get("below-row").hidden = server.escalation.reason !== null;
  get("send").disabled = !medium.url;
  return inspect();  // what was chosen before the server answered, or what another API key may see
}

// Some methods compare the frames of a video, and prune no images.
function offerMethods() {
  const before = method(), known = server?.allowed_methods ?? [];
  const offered = known.filter(({ prunes }) => prunes.includes(medium.kind)).map(({ name }) => name);
  get("method").replaceChildren(...offered.map((name) => new Option(name)));
  if (offered.includes(before)) get("method").value = before;
  get("method-row").hidden = offered.length < 2;
}

function listen() {
  let timer = 0;
  const soon = () => { clearTimeout(timer); timer = setTimeout(inspect, SETTLE_MS); };
  get("budget").addEventListener("input", () => { get("budget-number").value = budget(); soon(); });
  get("budget-number").addEventListener("input", () => {
    const value = Math.round(Number(get("budget-number").value));
    if (value >= 1) { get("budget").value = value; soon(); }
  });
  get("method").addEventListener("change", inspect);
  get("heat").addEventListener("change", () => get("views").classList.toggle("heat", get("heat").checked));
  get("key").addEventListener("change", start);
  get("file").addEventListener("change", () => guarded(() => take([...get("file").files])));
  get("ask").addEventListener("submit", (event) => { event.preventDefault(); if (server && medium.url) ask(); });
  get("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); get("ask").requestSubmit(get("send")); }
  });
  document.addEventListener("paste", (event) => { if (event.clipboardData.files.length) guarded(() => take([...event.clipboardData.files])); });
  const drop = get("drop");
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.toggle("over", kind === "dragover"); });
  }
  document.addEventListener("drop", (event) => guarded(() => take([...event.dataTransfer.files])));
  for (const name of ["astronaut", "coffee", "chelsea", "rocket"]) {
    const button = document.createElement("button"), picture = document.createElement("img");
    button.type = "button";
    picture.src = `promprune/samples/${name}.jpg`;
    picture.alt = `Sample: ${name}`;
    button.append(picture);
    button.addEventListener("click", () => takeSample(name));
    get("samples").append(button);
  }
}

listen();
await start();
await strip();
setInterval(() => { if (!document.hidden) strip(); }, STRIP_MS);
