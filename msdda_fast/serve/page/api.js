// SPDX-License-Identifier: Apache-2.0
// What the page asks of the service.

/** An answer that is no image: `param` is the field that is wrong, `status` that of HTTP. */
export class Refusal extends Error {
  constructor(status, { message, param = null } = {}, retryAfter = null) {
    const wait = retryAfter === null ? "" : ` Try again in ${retryAfter} s.`;
    const text = message ?? `the server answered ${status}`;
    super(`${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}${wait}`);
    Object.assign(this, { status, param });
  }
}

export const key = {
  get: () => sessionStorage.getItem("key") ?? "",
  set: (text) => sessionStorage.setItem("key", text),
};

async function ask(path, options = {}) {
  const headers = options.body instanceof FormData ? {} : { "Content-Type": "application/json" };
  // headers are bytes, and the service reads them as UTF-8
  if (key.get()) headers.Authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(key.get()))}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, { message: "the server cannot be reached" });
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  throw new Refusal(answer.status, body.error, answer.headers.get("Retry-After"));
}

export const objectives = async () => (await ask("v1/objectives")).json();

/** What a body says, as a form with the files of `files`. */
function form(body, files) {
  const data = new FormData();
  for (const [name, value] of Object.entries(body)) {
    if (value !== undefined) data.append(name, typeof value === "string" ? value : JSON.stringify(value));
  }
  for (const [name, file] of Object.entries(files)) if (file) data.append(name, file, `${name}.png`);
  return data;
}

/**
 * Draw one image, from `files.image` if there is one. `onevent` sees what happens before it is
 * there, and the result is its event.
 */
export async function draw(body, files, signal, onevent = () => {}) {
  const whole = { ...body, stream: true };
  const answer = await ask(files.image ? "v1/images/edits" : "v1/images/generations",
    { method: "POST", body: files.image ? form(whole, files) : JSON.stringify(whole), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ;) {
    const { value, done } = await reader.read();
    if (done) throw new Refusal(0, { message: "the connection was lost" });
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((one) => one.startsWith("data: {"));
      if (!line) continue;
      const event = JSON.parse(line.slice(6));
      if (event.type === "error") throw new Refusal(0, event.error);
      if (event.type.endsWith(".completed")) return event;
      onevent(event);
    }
  }
}
