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
  const headers = { "Content-Type": "application/json" };
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

/** Draw one image; `onevent` sees what happens before it is there, and the result is its event. */
export async function draw(body, signal, onevent = () => {}) {
  const options = { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal };
  const answer = await ask("v1/images/generations", options);
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
      if (event.type === "image_generation.completed") return event;
      onevent(event);
    }
  }
}
