// SPDX-License-Identifier: Apache-2.0
// The form, the image, and the images around it.

import { Refusal, draw, key, objectives } from "./api.js";
import { Balance, around, decimals, percents, words } from "./balance.js";
import { Start } from "./start.js";

const $ = (id) => document.getElementById(id);
const form = $("form");
const png = (event) => `data:image/png;base64,${event.b64_json}`;
const percent = (s) => `${Math.round(100 * s)} %`;
const seconds = (s) => `${s.toFixed(s < 10 ? 2 : 1)} s`;

let balance;
let late; // the balance of late steps
let from; // an image to start from, and what is painted
let last; // the first timestep: ranges end there
let events; // what streams have beside the image
let work = null; // what aborts the request in flight
let timer;

async function start() {
  try {
    const service = await objectives();
    $("key").hidden = true;
    if (balance) return;
    $("model").textContent = service.model;
    document.title = `${service.model} · msdda-fast`;
    const names = service.data.map((objective) => objective.id);
    const { capabilities } = service;
    balance = new Balance($("early"), names, redraw);
    last = service.timesteps;
    $("balance").hidden = names.length < 2;
    Object.assign($("steps"), { max: service.max_steps, value: service.steps });
    $("size").replaceChildren(...service.sizes.map((size) => new Option(size.replace("x", " × "), size)));
    $("size-field").hidden = service.sizes.length < 2;
    $("guidance-field").hidden = !capabilities.guidance_scale;
    if (service.guidance_scale !== null) $("guidance_scale").placeholder = service.guidance_scale;
    $("negative-field").hidden = !capabilities.negative_prompt;
    events = { partial_images: capabilities.partial_images ? 3 : undefined, progress: capabilities.progress || undefined };
    from = new Start(names, capabilities, () => $("size").value.split("x").map(Number), changed, refuse);
    showRanges();
  } catch (error) {
    refuse(error);
  }
}

/** The body of a request, or null: the first field that is wrong says so. */
function read() {
  for (const field of form.querySelectorAll("input:not([type=checkbox]), select, textarea")) {
    if (field.validity.valid) continue;
    refuse(new Refusal(0, { message: field.validationMessage, param: field.name }));
    return null;
  }
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  return {
    prompt: $("prompt").value,
    negative_prompt: $("negative_prompt").value || undefined,
    seed: number("seed") ?? Math.floor(Math.random() * 2 ** 31),
    steps: number("steps"),
    guidance_scale: number("guidance_scale"),
    strength: number("strength") === 1 ? undefined : number("strength"),
    size: $("size").value || undefined,
    ...from.fields,
  };
}

/** What objectives have at each place and step, if they have `shares` in all. */
function mixture(shares) {
  const masks = from.masks(shares);
  if (masks) return { masks };
  const weights = decimals(balance.names, shares);
  if (!hasRanges()) return { weights };
  return { weights: { [`${last / 2}-${last}`]: weights, [`0-${last / 2}`]: late.weights } };
}

async function generate() {
  clearTimeout(timer);
  work?.abort();
  clearErrors();
  if (!balance) return start();
  const body = read();
  if (!body) return idle();
  const mine = (work = new AbortController());
  const { shares } = balance;
  const began = performance.now();
  $("result").setAttribute("aria-busy", "true");
  $("progress").removeAttribute("value"); // in line: nobody knows how long
  say("Drawing", "");
  try {
    const files = await from.files();
    const partial_images = files.image ? undefined : events.partial_images; // of texts alone
    const whole = { ...body, ...mixture(shares), ...events, partial_images };
    const result = await draw(whole, files, mine.signal, (event) => {
      Object.assign($("progress"), { max: event.steps, value: event.step });
      say("Drawing", `step ${event.step} of ${event.steps}`);
      if (event.b64_json) show(event);
    });
    const company = result.batch_size > 1 ? `in a batch of ${result.batch_size}` : "";
    const facts = [`${seconds(result.waited_s)} in the queue`, company, `seed ${result.seed}`];
    finish(result, body, shares, `Drawn in ${seconds((performance.now() - began) / 1000)}`, facts);
    if ($("around").checked) await strip(body, shares, result, mine);
  } catch (error) {
    if (mine.signal.aborted) return; // another request has taken its place
    idle();
    say("", "");
    refuse(error);
  }
}

function finish(result, body, shares, status, facts) {
  idle();
  show(result);
  from.over($("image"));
  const strength = body.strength === undefined ? "" : percent(body.strength);
  $("image").alt = `${body.prompt} (${words(balance.names, shares)}${strength && `; strength ${strength}`})`;
  say(status, facts.filter(Boolean).join(" · "));
  const parts = [result.seed, ...percents(shares), ...(strength && ["strength", parseInt(strength)])];
  const name = `${body.prompt.slice(0, 40).replace(/\W+/g, "-")}${parts.join("-")}.png`;
  Object.assign($("download"), { href: png(result), download: name, hidden: false });
}

/** Images around a point; choosing one makes it the point. */
async function strip(body, shares, middle, mine) {
  const { names } = balance;
  const points = around(names, shares);
  $("strip-part").hidden = points.length < 2;
  $("strip-hint").textContent =
    names.length === 2 ? `Same seed; ${names.join(" / ")} in percent. Choose one to continue from it.`
      : "Same seed, one step towards each objective. Choose one to continue from it.";
  const here = percents(shares).join();
  const tiles = points.map((point) => {
    const tile = document.createElement("button");
    const blank = document.createElement("span");
    blank.className = "waiting";
    Object.assign(tile, { type: "button", className: "tile", disabled: true });
    tile.setAttribute("aria-label", words(names, point.shares));
    tile.append(blank, point.caption);
    if (point.key === here) tile.setAttribute("aria-current", "true");
    return tile;
  });
  $("strip").replaceChildren(...tiles);
  const files = from.files(); // a promise: the one in the middle needs none
  await Promise.all(points.map(async (point, i) => {
    const tile = tiles[i];
    try {
      const result = point.key === here ? middle
        : await draw({ ...body, seed: middle.seed, ...mixture(point.shares) }, await files, mine.signal);
      const image = new Image();
      fit(image, png(result));
      tile.firstChild.replaceWith(image);
      tile.disabled = false;
      tile.addEventListener("click", () => choose(point.shares, body, result));
    } catch (error) {
      if (mine.signal.aborted) return;
      tile.firstChild.className = "";
      tile.title = error.message;
      tile.lastChild.textContent = error.status === 429 ? "queue full" : "no image";
    }
  }));
}

function choose(shares, body, result) {
  clearTimeout(timer);
  work?.abort();
  work = new AbortController();
  const mine = work;
  const focused = document.activeElement?.classList.contains("tile");
  balance.move(shares, false);
  finish(result, body, shares, words(balance.names, shares), [`seed ${result.seed}`]);
  strip(body, shares, result, mine);
  if (focused) $("strip").querySelector("[aria-current]")?.focus();
}

const hasRanges = () => $("ranges").checked && !$("ranges").disabled;

function showRanges() {
  if (hasRanges()) late ??= new Balance($("late"), balance.names, redraw, ", late steps");
  $("early-name").hidden = $("late-part").hidden = !$("ranges").checked;
  $("late-part").disabled = $("ranges").disabled;
}

/** After another start or other regions. */
function changed() {
  showRanges();
  redraw();
}

function showStrength() {
  const shown = percent($("strength").value);
  $("strength-shown").textContent = shown;
  $("strength").setAttribute("aria-valuetext", shown);
}

/** After the first image, follow the sliders when they rest. */
function redraw() {
  clearTimeout(timer);
  if ($("live").checked && !$("image").hidden) timer = setTimeout(generate, 350);
}

function fit(image, source) {
  image.onload = () => image.classList.toggle("small", image.naturalWidth < 128);
  image.alt = image.id ? image.alt : "";
  image.src = source;
}

function show(event) {
  $("empty").hidden = true;
  $("image").hidden = false;
  fit($("image"), png(event));
}

function idle() {
  $("result").removeAttribute("aria-busy");
}

function say(status, detail) {
  // said again only when it is something else: screen readers speak it
  if ($("status").textContent !== status) $("status").textContent = status;
  $("detail").textContent = detail;
}

function clearErrors() {
  for (const place of document.querySelectorAll(".error")) place.textContent = "";
  for (const field of document.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    if (!["weights", "strength", "negative_prompt"].includes(field.name)) field.removeAttribute("aria-describedby");
  }
}

/** Say what is wrong where it is wrong. */
function refuse(error) {
  clearErrors();
  if (!(error instanceof Refusal)) throw error;
  if (error.status === 401) {
    $("key").hidden = false;
    $("key-text").focus();
    if (key.get()) $("key").querySelector(".hint").textContent = "This key is wrong. It is kept until you close this tab.";
    return;
  }
  const name = error.param?.split(".")[0];
  const place = $(`error-${name}`) ?? $("error");
  place.textContent = error.message;
  const field = form.elements[name];
  const one = field instanceof RadioNodeList ? field[0] : field;
  if (place.id === "error" || !one) return;
  const part = one.closest("details");
  if (part) part.open = true;
  one.setAttribute("aria-invalid", "true");
  one.setAttribute("aria-describedby", place.id);
  one.focus();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
  $("frame").scrollIntoView({ block: "nearest" }); // on a phone it is below
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
$("dice").addEventListener("click", () => {
  $("seed").value = Math.floor(Math.random() * 1e6);
  redraw();
});
$("strength").addEventListener("input", () => {
  showStrength();
  redraw();
});
$("ranges").addEventListener("input", () => {
  showRanges();
  late?.move(balance.shares, false);
});
$("size").addEventListener("input", () => from.resize());
$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key-text").value.trim());
  start();
});
showStrength(); // a browser may have kept another value
start();
