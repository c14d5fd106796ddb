// SPDX-License-Identifier: Apache-2.0
// Weights on the simplex, and the controls that show and move them.

const $ = (id) => document.getElementById(id);
const CORNERS = [[100, 0], [0, 174], [200, 174]];

/** Whole percents of `shares` that sum to 100: the largest remainders get what rounding loses. */
export function percents(shares) {
  const whole = shares.map((share) => Math.floor(100 * share + 1e-9));
  const order = shares.map((_, i) => i).sort((a, b) => 100 * (shares[b] - shares[a]) - whole[b] + whole[a]);
  for (let left = 100 - whole.reduce((a, b) => a + b), i = 0; left > 0; left--, i++) whole[order[i]]++;
  return whole;
}

/** Objective `i` gets `share`; the others keep their proportions, or share what is left. */
export function moved(shares, i, share) {
  const rest = 1 - shares[i];
  return shares.map((old, j) =>
    j === i ? share : (1 - share) * (rest > 1e-9 ? old / rest : 1 / (shares.length - 1)));
}

/** In words, for captions and screen readers. */
export const words = (names, shares) =>
  percents(shares).map((percent, i) => `${names[i]} ${percent} %`).join(", ");

/** Shares as they are sent: decimals whose sum is 1. */
export const decimals = (names, shares) =>
  Object.fromEntries(percents(shares).map((percent, i) => [names[i], percent / 100]));

/** Points around one: along the line of two objectives, or towards each of more. */
export function around(names, shares) {
  const points = [];
  const add = (caption, to) => {
    const key = percents(to).join();
    if (!points.some((point) => point.key === key)) points.push({ key, caption, shares: to });
  };
  if (names.length === 2) {
    for (const step of [-0.3, -0.15, 0, 0.15, 0.3]) {
      const right = Math.min(1, Math.max(0, shares[1] + step));
      add(percents([1 - right, right]).join(" / "), [1 - right, right]);
    }
  } else {
    add("this", shares);
    names.forEach((name, i) => add(`+ ${name}`, shares.map((w, j) => 0.7 * w + (i === j ? 0.3 : 0))));
  }
  return points;
}

/** One slider for two objectives, one each for more, and a triangle beside three. */
export class Balance {
  /** `onmove` is called when somebody has moved it; `when` is said after the names. */
  constructor(root, names, onmove, when = "") {
    Object.assign(this, { root, names, onmove, when });
    this.shares = names.map(() => 1 / names.length);
    this.build();
    this.show();
  }

  /** What to send. */
  get weights() {
    return decimals(this.names, this.shares);
  }

  $(selector) {
    return this.root.querySelector(selector);
  }

  move(shares, told = true) {
    this.shares = shares;
    this.show();
    if (told) this.onmove();
  }

  build() {
    const { names } = this;
    this.root.append($("balance-part").content.cloneNode(true));
    const parts = names.length === 2 ? [1] : names.map((_, i) => i);
    this.sliders = parts.map((i) => {
      const slider = Object.assign(document.createElement("input"), { type: "range", min: 0, max: 100, step: 1, name: "weights" });
      slider.setAttribute("aria-label", (names.length === 2 ? `${names[0]} to ${names[1]}` : names[i]) + this.when);
      slider.setAttribute("aria-describedby", "error-weights");
      slider.addEventListener("input", () => {
        const share = slider.value / 100;
        this.move(names.length === 2 ? [1 - share, share] : moved(this.shares, i, share));
      });
      return { i, slider };
    });
    for (const { i, slider } of this.sliders) {
      // what stands at a slider is in its label and value for those who do not see it
      const line = document.createElement("div");
      line.ariaHidden = "true";
      line.className = names.length === 2 ? "ends" : "name";
      this.lines = [...(this.lines ?? []), line];
      for (const j of names.length === 2 ? [0, 1] : [i]) {
        const name = document.createElement("span");
        name.textContent = names[j];
        const value = document.createElement("b");
        value.dataset.of = j;
        if (names.length === 2) name.append(value);
        line.append(name, ...(names.length === 2 ? [] : [value]));
      }
      this.$(".sliders").append(line, slider);
    }
    if (names.length === 3) this.buildTriangle();
  }

  buildTriangle() {
    const triangle = this.$(".triangle");
    triangle.removeAttribute("hidden");
    this.names.forEach((name, i) => { this.$(`.corner-${i}`).textContent = name; });
    const take = (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(triangle.getScreenCTM().inverse());
      const raw = [1 - at.y / 174, 0, 0];
      raw[2] = (at.x - 100 * raw[0]) / 200;
      raw[1] = 1 - raw[0] - raw[2];
      this.move(onSimplex(raw));
    };
    triangle.addEventListener("pointerdown", (event) => {
      triangle.setPointerCapture(event.pointerId);
      take(event);
    });
    triangle.addEventListener("pointermove", (event) => { if (triangle.hasPointerCapture(event.pointerId)) take(event); });
  }

  show() {
    const whole = percents(this.shares);
    for (const { i, slider } of this.sliders) {
      slider.value = whole[i];
      slider.setAttribute("aria-valuetext", this.names.length === 2 ? words(this.names, this.shares) : `${whole[i]} %`);
    }
    for (const value of this.root.querySelectorAll("[data-of]")) value.textContent = `${whole[value.dataset.of]} %`;
    if (this.names.length !== 3) return;
    const [x, y] = [0, 1].map((axis) => CORNERS.reduce((sum, corner, i) => sum + corner[axis] * this.shares[i], 0));
    this.$(".point").setAttribute("cx", x);
    this.$(".point").setAttribute("cy", y);
    this.$(".spokes").setAttribute("d", CORNERS.map((corner) => `M${x} ${y} ${corner.join(" ")}`).join(""));
  }
}

/** The nearest point of the triangle whose angles are those of `raw`: what is negative becomes 0. */
function onSimplex(raw) {
  const kept = raw.map((share) => Math.max(0, share));
  const sum = kept.reduce((a, b) => a + b);
  return kept.map((share) => share / sum);
}
