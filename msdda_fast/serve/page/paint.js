// SPDX-License-Identifier: Apache-2.0
// Regions of an image, painted with a brush: a layer each, and of one group only one at a place.

/** Of layers, told apart without red and green. */
export const COLORS = ["#5b3df0", "#e8890c", "#00897b", "#546e7a", "#d81b60"];

/** Layers are painted with at least so many pixels, however small the image. */
const LEAST = 256;

const blank = (width, height) => Object.assign(document.createElement("canvas"), { width, height });

export class Painter {
  /** `onpaint` is called after each stroke. */
  constructor(canvas, onpaint) {
    Object.assign(this, { canvas, onpaint, layers: new Map(), active: null, brush: 0.2, behind: null });
    this.at = { x: 0.5, y: 0.5 };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.stroke(this.place(event));
    });
    canvas.addEventListener("pointermove", (event) => {
      if (canvas.hasPointerCapture(event.pointerId)) this.stroke(this.place(event), this.at);
    });
    canvas.addEventListener("pointerup", () => this.onpaint());
    canvas.addEventListener("keydown", (event) => this.key(event));
    for (const kind of ["focus", "blur"]) canvas.addEventListener(kind, () => this.show());
  }

  /** Begin anew, for images of this size in pixels. */
  resize(width, height) {
    Object.assign(this, { width, height });
    const scale = Math.max(1, Math.ceil(LEAST / Math.min(width, height)));
    Object.assign(this.canvas, { width: scale * width, height: scale * height });
    for (const layer of this.layers.values()) layer.canvas = blank(this.canvas.width, this.canvas.height);
    this.show();
  }

  add(name, color, group) {
    this.layers.set(name, { color, group, canvas: blank(this.canvas.width, this.canvas.height), used: false });
  }

  remove(name) {
    this.layers.delete(name);
    this.show();
  }

  clear() {
    for (const layer of this.layers.values()) layer.used = false;
    this.resize(this.width, this.height);
  }

  isUsed(name) {
    return this.layers.get(name)?.used ?? false;
  }

  /** How much of each pixel is painted in a layer, from 0 to 1, at the size of the image. */
  coverage(name) {
    const small = blank(this.width, this.height).getContext("2d", { willReadFrequently: true });
    small.drawImage(this.layers.get(name).canvas, 0, 0, this.width, this.height);
    const { data } = small.getImageData(0, 0, this.width, this.height);
    return Float64Array.from({ length: data.length / 4 }, (_, i) => data[4 * i + 3] / 255);
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
  }

  /** A line from one place to another, or a dot; what it covers is taken from others of its group. */
  stroke(to, from = to) {
    this.at = to;
    const { group } = this.layers.get(this.active);
    for (const [name, layer] of this.layers) {
      if (layer.group !== group) continue;
      const pen = layer.canvas.getContext("2d");
      pen.globalCompositeOperation = name === this.active ? "source-over" : "destination-out";
      Object.assign(pen, { lineCap: "round", lineWidth: this.brush * layer.canvas.width, strokeStyle: layer.color });
      pen.beginPath();
      pen.moveTo(from.x * layer.canvas.width, from.y * layer.canvas.height);
      pen.lineTo(to.x * layer.canvas.width + 0.01, to.y * layer.canvas.height);
      pen.stroke();
      if (name === this.active) layer.used = true;
    }
    this.show();
  }

  key(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step && event.key !== " ") return;
    event.preventDefault();
    if (step) {
      const inside = (value) => Math.min(1, Math.max(0, value));
      this.at = { x: inside(this.at.x + step[0] / 20), y: inside(this.at.y + step[1] / 20) };
      this.show();
    } else {
      this.stroke(this.at);
      this.onpaint();
    }
  }

  show() {
    const { width, height } = this.canvas;
    const pen = this.canvas.getContext("2d");
    pen.clearRect(0, 0, width, height);
    if (this.behind) pen.drawImage(this.behind, 0, 0, width, height);
    pen.globalAlpha = 0.6; // what is behind stays visible
    for (const { canvas } of this.layers.values()) pen.drawImage(canvas, 0, 0);
    pen.globalAlpha = 1;
    if (document.activeElement !== this.canvas) return;
    pen.beginPath(); // where the keyboard would paint
    pen.arc(this.at.x * width, this.at.y * height, (this.brush * width) / 2, 0, 2 * Math.PI);
    Object.assign(pen, { lineWidth: width / 128, strokeStyle: this.layers.get(this.active)?.color ?? "gray" });
    pen.stroke();
  }
}

/** A gray PNG with `value(i)` in [0, 1] at each pixel i; rounded down, so that sums stay below 1. */
export function gray(width, height, value) {
  const data = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    data.data.fill(Math.floor(255 * value(i) + 1e-6), 4 * i, 4 * i + 3);
    data.data[4 * i + 3] = 255;
  }
  return canvasOf(data);
}

/** A PNG that is transparent where `value(i)` is 1. */
export function holes(width, height, value) {
  const data = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) data.data[4 * i + 3] = Math.round(255 * (1 - value(i)));
  return canvasOf(data);
}

function canvasOf(data) {
  const canvas = blank(data.width, data.height);
  canvas.getContext("2d").putImageData(data, 0, 0);
  return canvas;
}

/** The middle of an image file, with the shape of images of this size. */
export async function cropped(file, width, height) {
  const image = await createImageBitmap(file);
  const scale = Math.max(width / image.width, height / image.height);
  const canvas = blank(width, height);
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(image, (width - scale * image.width) / 2, (height - scale * image.height) / 2,
    scale * image.width, scale * image.height);
  return canvas;
}

export const png = (canvas) => new Promise((done) => canvas.toBlob(done, "image/png"));

/** A PNG in base64, as bodies in JSON have it. */
export const base64 = (canvas) => canvas.toDataURL("image/png").split(",")[1];
