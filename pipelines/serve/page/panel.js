// The settings of the sampler: one panel, or two in a comparison. It shows what the model and its sampler understand.

import { copy, element, set } from "./dom.js";
import { samplerName } from "./describe.js";
import { Mistake } from "./settings.js";

const STOPS = [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100, 125, 150, 200, 250, 300, 400, 500, 750, 1000];
const DIFFUSION = ["spacing", "steps_offset", "final_alpha_cumprod"];
const OF_SAMPLER = { ddim: ["eta", "sigma_hat", "profile"], ddpm: ["sigma_hat"] };
const DEFAULTS = {
  num_inference_steps: 50,
  eta: 0,
  guidance_scale: 1,
  guidance_from: 0,
  guidance_to: 1,
  guidance_rescale: 0,
  spacing: "",
  steps_offset: 0,
  final_alpha_cumprod: "one",
  profile: "exact",
  clip_x0: "",
};

export class Panel {
  /** onSlide: a slider was moved and let go. */
  constructor(side, onSlide) {
    this.side = side;
    this.root = copy("panel-template");
    this.inputs = Object.fromEntries([...this.root.querySelectorAll("[data-key]")].map((input) => [input.dataset.key, input]));
    this.sliders = Object.fromEntries([...this.root.querySelectorAll("[data-slider]")].map((input) => [input.dataset.slider, input]));
    this.root.querySelector(".badge").textContent = side.toUpperCase();
    for (const field of this.root.querySelectorAll(".field")) {
      const label = field.querySelector("label");
      const input = field.querySelector("[data-key]");
      input.id = `${side}-${input.dataset.key}`;
      label.htmlFor = input.id;
    }
    this.root.addEventListener("change", () => this.#showUnderstood());
    for (const [key, slider] of Object.entries(this.sliders)) {
      slider.addEventListener("input", () => this.#fromSlider(key));
      slider.addEventListener("change", () => onSlide());
      this.inputs[key].addEventListener("input", () => this.#toSlider(key));
    }
  }

  setModel(model, maxSteps) {
    this.model = model;
    this.stops = STOPS.filter((steps) => steps < maxSteps);
    this.stops.push(maxSteps);
    this.sliders.num_inference_steps.max = this.stops.length - 1;
    this.inputs.num_inference_steps.max = maxSteps;
    const chosen = this.inputs.sampler.value;
    this.inputs.sampler.replaceChildren(
      ...model.samplers.map((sampler) => element("option", { value: sampler, textContent: samplerName(sampler) })),
    );
    this.inputs.sampler.value = model.samplers.includes(chosen) ? chosen : model.samplers[0];
    for (const key in this.sliders) this.#toSlider(key);
    this.#showUnderstood();
  }

  /** Only what is shown, and differs from a default that the server has too. Throws Mistake. */
  read() {
    const read = { sampler: this.inputs.sampler.value, num_inference_steps: this.#number("num_inference_steps") };
    const shown = this.#understood();
    const add = (key, value, unless) => {
      if (shown.has(key) && value !== unless) read[key] = value;
    };
    if (shown.has("eta")) read.eta = this.#number("eta");
    if (shown.has("sigma_hat") && this.inputs.sigma_hat.checked) read.eta = "sigma_hat";
    if (shown.has("guidance_scale")) read.guidance_scale = this.#number("guidance_scale");
    if (shown.has("guidance_interval")) {
      const [from, to] = [this.#number("guidance_from"), this.#number("guidance_to")];
      if (from !== 0 || to !== 1) read.guidance_interval = [from, to];
      add("guidance_rescale", this.#number("guidance_rescale"), 0);
    }
    if (shown.has("steps_offset")) add("steps_offset", this.#number("steps_offset"), 0);
    for (const key of ["spacing", "final_alpha_cumprod", "profile"]) add(key, this.inputs[key].value, DEFAULTS[key]);
    if (this.inputs.clip_x0.value || this.inputs.clip_x0.validity.badInput) read.clip_x0 = this.#number("clip_x0");
    return read;
  }

  /** The counterpart of `read`: what is missing gets its default. Throws Mistake for what cannot be shown. */
  write(settings) {
    const { sampler, eta, guidance_interval, ...others } = settings;
    if (this.model.samplers.includes(sampler)) this.inputs.sampler.value = sampler;
    this.inputs.sigma_hat.checked = eta === "sigma_hat";
    const [guidance_from, guidance_to] = guidance_interval ?? [0, 1];
    const values = { ...DEFAULTS, ...others, guidance_from, guidance_to, eta: eta === "sigma_hat" ? 0 : (eta ?? 0) };
    for (const [key, value] of Object.entries(values)) if (key in this.inputs) this.inputs[key].value = value;
    for (const key in this.sliders) this.#toSlider(key);
    this.#showUnderstood();
    const shown = { ...DEFAULTS, guidance_interval: [0, 1], ...this.read() };
    for (const [key, value] of Object.entries(settings)) {
      if (String(shown[key]) !== String(value)) throw new Mistake(key, value, "is not for this model and sampler");
    }
  }

  /** The input of an API name, to mark what is wrong. */
  input(key) {
    return this.inputs[key === "guidance_interval" ? "guidance_from" : key];
  }

  /** rows: [{steps, seconds, last}], fewest steps first. */
  showTimes(rows) {
    const longest = Math.max(...rows.map((row) => row.seconds));
    this.root.querySelector(".times").replaceChildren(
      ...rows.map(({ steps, seconds, last }) => {
        const line = element("li", { className: last ? "last" : "" });
        const bar = element("span", { className: "time-bar" });
        bar.style.setProperty("--share", seconds / longest);
        line.append(
          element("span", { className: "time-steps", textContent: `${steps} steps` }),
          bar,
          element("span", { className: "time-seconds", textContent: `${seconds.toFixed(2)} s` }),
        );
        return line;
      }),
    );
  }

  #understood() {
    const { flow, guidance } = this.model;
    const shown = new Set(["sampler", "num_inference_steps", "clip_x0"]);
    for (const key of flow ? [] : DIFFUSION) shown.add(key);
    for (const key of OF_SAMPLER[this.inputs.sampler.value] ?? []) shown.add(key);
    if (guidance) shown.add("guidance_scale");
    if (guidance && Number(this.inputs.guidance_scale.value) !== 1) {
      shown.add("guidance_interval").add("guidance_rescale"); // refused where nothing is guided
    }
    return shown;
  }

  #showUnderstood() {
    const shown = this.#understood();
    for (const field of this.root.querySelectorAll("[data-of]")) field.hidden = !shown.has(field.dataset.of);
    const larger = shown.has("eta") && this.inputs.sigma_hat.checked;
    this.inputs.eta.disabled = this.sliders.eta.disabled = larger;
  }

  #number(key) {
    const input = this.inputs[key];
    if (input.value === "" || input.validity.badInput) throw new Mistake(key, undefined, "give a number");
    return Number(input.value);
  }

  /** The steps' slider goes through `stops`, so that 1 to 50 have as much room as 50 to 1000. */
  #fromSlider(key) {
    const value = Number(this.sliders[key].value);
    this.inputs[key].value = key === "num_inference_steps" ? this.stops[value] : value;
    this.#say(key);
    this.#showUnderstood();
  }

  #toSlider(key) {
    const value = Number(this.inputs[key].value);
    const above = this.stops.findIndex((stop) => stop >= value);
    const stop = above < 0 ? this.stops.length - 1 : above;
    this.sliders[key].value = key === "num_inference_steps" ? stop : value;
    this.#say(key);
  }

  #say(key) {
    if (key === "num_inference_steps") set(this.sliders[key], { "aria-valuetext": `${this.inputs[key].value} steps` });
  }
}
