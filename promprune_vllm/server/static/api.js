// Talks to the server that this page comes from, and to nobody else.

export class Refused extends Error {}

async function checked(response) {
  if (response.ok) return response;
  let said = "";
  try {
    const body = await response.json();
    said = body.error?.message ?? body.error ?? body.detail ?? "";
  } catch { /* no JSON: the status has to do */ }
  if (response.status === 401) said = "The server asks for its API key: write it into the field “API key”.";
  if (response.status === 413) said ||= "The image is too large for the server.";
  throw new Refused(typeof said === "string" && said ? said : `The server answered ${response.status} ${response.statusText}.`);
}

async function request(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached. Is it still running?");
  }
}

const headers = (key) => ({ "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) });

export async function state(key) {
  return (await checked(await request("v1/visual_tokens", { headers: headers(key) }))).json();
}

export async function inspect(body, key, signal) {
  const options = { method: "POST", headers: headers(key), body: JSON.stringify(body), signal };
  return (await checked(await request("v1/visual_tokens/inspect", options))).json();
}

// Streams one answer; returns milliseconds to its first token and the prompt's tokens.
export async function chat(body, key, signal, onText) {
  const started = performance.now();
  const asked = { ...body, stream: true, stream_options: { include_usage: true }, temperature: 0 };
  const options = { method: "POST", headers: headers(key), body: JSON.stringify(asked), signal };
  const response = await checked(await request("v1/chat/completions", options));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "", first = null, usage = null;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const lines = (waiting + value).split("\n");
    waiting = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Refused(event.error.message ?? "The server ended the answer with an error.");
      usage = event.usage ?? usage;
      const text = event.choices?.[0]?.delta?.content;
      if (text) {
        first ??= performance.now() - started;
        onText(text);
      }
    }
  }
  return { first, usage };
}

// Sums of our counters over all their labels, by name.
export async function metrics() {
  const text = await (await checked(await request("metrics"))).text();
  const sums = {};
  for (const line of text.split("\n")) {
    const found = /^(promprune_[a-z_]+_total)(?:\{[^}]*\})? (\S+)/.exec(line);
    if (found) sums[found[1]] = (sums[found[1]] ?? 0) + Number(found[2]);
  }
  return sums;
}
