// Talks only to the server that this page comes from.

export class Refused extends Error {}

async function checked(response) {
  if (response.ok) return response;
  let message = "";
  try {
    const body = await response.json();
    message = body.error?.message ?? body.error ?? body.detail ?? "";
  } catch { /* not JSON: show the status instead */ }
  if (response.status === 401) message = "The server requires an API key: enter it in the field “API key”.";
  if (response.status === 413) message ||= "The image is too large for the server.";
  throw new Refused(typeof message === "string" && message ? message : `The server answered ${response.status} ${response.statusText}.`);
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

// Streams one answer; returns the milliseconds to its first token, and the usage.
export async function chat(body, key, signal, onText) {
  const started = performance.now();
  const fields = { ...body, stream: true, stream_options: { include_usage: true }, temperature: 0 };
  const options = { method: "POST", headers: headers(key), body: JSON.stringify(fields), signal };
  const response = await checked(await request("v1/chat/completions", options));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", first = null, usage = null;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
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

// Our counters by name, each summed over its labels.
export async function metrics() {
  const text = await (await checked(await request("metrics"))).text();
  const sums = {};
  for (const line of text.split("\n")) {
    const match = /^(promprune_[a-z_]+_total)(?:\{[^}]*\})? (\S+)/.exec(line);
    if (match) sums[match[1]] = (sums[match[1]] ?? 0) + Number(match[2]);
  }
  return sums;
}
