// SPDX-License-Identifier: Apache-2.0
// An image to start from, and the regions: what is sent beside the fields of the form.

import { Refusal } from "./api.js";
import { COLORS, Painter, base64, cropped, gray, holes, png } from "./paint.js";

const $ = (id) => document.getElementById(id);
/** The layer of what is repainted; names of objectives are not empty. */
const REPAINT = "";

export class Start {
  /** `size` returns width and height; `onchange` is called when the next image would be another. */
  constructor(names, capabilities, size, onchange, refuse) {
    Object.assign(this, { names, capabilities, size, onchange, refuse, file: null, picture: null });
    this.painter = new Painter($("paint"), () => this.painted());
    $("start").hidden = !capabilities.image;
    if (capabilities.masks && names.length > 1) names.forEach((name, i) => this.addLayer(name, name, COLORS[i % (COLORS.length - 1)], "objectives"));
    this.painter.resize(...size());
    this.show();
    $("image-file").addEventListener("input", () => this.take($("image-file").files[0] ?? null));
    $("image-drop").addEventListener("click", () => {
      $("image-file").value = "";
      this.take(null);
      $("image-file").focus();
    });
    $("image_strength").addEventListener("input", () => {
      this.show();
      onchange();
    });
    $("brush").addEventListener("input", () => { this.painter.brush = Number($("brush").value); });
    $("clear").addEventListener("click", () => {
      this.painter.clear();
      this.painted();
    });
  }

  addLayer(name, text, color, group) {
    this.painter.add(name, color, group);
    const label = document.createElement("label");
    label.dataset.layer = name;
    const radio = Object.assign(document.createElement("input"), { type: "radio", name: "layer", value: name });
    radio.addEventListener("input", () => { this.painter.active = name; });
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 2 2");
    svg.ariaHidden = "true";
    const dot = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    for (const [key, value] of Object.entries({ cx: 1, cy: 1, r: 1, fill: color })) dot.setAttribute(key, value);
    svg.append(dot);
    label.append(radio, svg, text);
    $("layers").append(label);
    if (this.painter.active === null) this.choose(name);
  }

  choose(name) {
    this.painter.active = name;
    for (const radio of $("layers").querySelectorAll("input")) radio.checked = radio.value === name;
  }

  async take(file) {
    this.file = file;
    try {
      await this.crop();
    } catch {
      this.file = this.picture = null;
      this.refuse(new Refusal(0, { message: "this file is no image that the browser can read", param: "image" }));
    }
    const had = this.painter.layers.has(REPAINT);
    if (this.picture && this.capabilities.mask && !had) this.addLayer(REPAINT, "repainted", COLORS.at(-1), "edit");
    if (!this.picture && had) {
      this.painter.remove(REPAINT);
      $("layers").querySelector(`[data-layer="${REPAINT}"]`).remove();
      this.painter.active = null;
      for (const name of [...this.painter.layers.keys()].slice(0, 1)) this.choose(name);
    }
    this.show();
    this.onchange();
  }

  async crop() {
    this.picture = this.file && await cropped(this.file, ...this.size());
    this.painter.behind = this.picture;
    this.painter.show();
  }

  /** Paint over what was drawn, if nothing is started from. */
  async over(image) {
    await image.decode();
    this.painter.behind = this.picture ?? image;
    this.painter.show();
  }

  async resize() {
    this.painter.resize(...this.size());
    await this.crop();
  }

  painted() {
    this.show();
    this.onchange();
  }

  show() {
    $("redrawn").hidden = $("image-drop").hidden = !this.picture;
    const shown = `${Math.round(100 * $("image_strength").value)} %`;
    $("image_strength-shown").textContent = shown;
    $("image_strength").setAttribute("aria-valuetext", shown);
    $("regions").hidden = !this.painter.layers.size;
    const places = this.names.filter((name) => this.painter.isUsed(name));
    $("ranges").disabled = places.length > 0; // masks say all of it
    $("paint-hint").textContent = [
      this.capabilities.masks && this.names.length > 1 && "Elsewhere the balance acts, one for all steps.",
      this.painter.layers.has(REPAINT) && "Of the image, only what is repainted changes.",
    ].filter(Boolean).join(" ");
  }

  /** Fields of the body. */
  get fields() {
    return this.picture ? { image_strength: Number($("image_strength").value) } : {};
  }

  /** Where objectives act if they have `shares` where nothing is painted; null: nothing is. */
  masks(shares) {
    const places = this.names.filter((name) => this.painter.isUsed(name));
    if (!places.length) return null;
    const covers = new Map(places.map((name) => [name, this.painter.coverage(name)]));
    const [width, height] = this.size();
    const total = Float64Array.from({ length: width * height }, (_, i) =>
      [...covers.values()].reduce((sum, cover) => sum + cover[i], 0));
    // the last objective has no mask: it gets what the others leave, to the bit
    return Object.fromEntries(this.names.slice(0, -1).map((name, k) => {
      const cover = covers.get(name);
      const value = (i) => (cover ? cover[i] / Math.max(1, total[i]) : 0) + Math.max(0, 1 - total[i]) * shares[k];
      return [name, base64(gray(width, height, value))];
    }));
  }

  /** Files of the form; none, if nothing is started from. */
  async files() {
    if (!this.picture) return {};
    const mask = this.painter.isUsed(REPAINT) && this.holes();
    return { image: await png(this.picture), mask: mask && await png(mask) };
  }

  holes() {
    const cover = this.painter.coverage(REPAINT);
    return holes(...this.size(), (i) => (cover[i] > 0.5 ? 1 : 0));
  }
}
