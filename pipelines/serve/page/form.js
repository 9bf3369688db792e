// The form: settings in, settings out, and only the controls that the chosen model understands.

import { ClassPicker } from "./classes.js";
import { byId, element } from "./dom.js";
import { describeModel } from "./describe.js";
import { Panel } from "./panel.js";
import { Mistake, whole, wholes } from "./settings.js";

const MANY = 12; // classes above which the first drawing is not one of each
const SEEDS = 100000; // of the dice: short enough to be said aloud
const OTHER_STEPS = [10, 50]; // of a comparison that begins: the first that differs

export class Form {
  /** onSlide: a slider was moved and let go. */
  constructor(onSlide) {
    this.root = byId("form");
    this.panels = { a: new Panel("a", onSlide), b: new Panel("b", onSlide) };
    byId("panels").append(this.panels.a.root, this.panels.b.root);
    this.classes = new ClassPicker(byId("classes"));
    byId("model").addEventListener("change", () => this.#showModel());
    byId("seeds").addEventListener("input", () => this.#showMode());
    byId("dice").addEventListener("click", () => {
      byId("seeds").value = Math.floor(Math.random() * SEEDS);
      this.#showMode();
    });
    for (const radio of this.root.elements.mode) {
      radio.addEventListener("change", () => {
        if (this.mode === "compare" && !this.compared) this.#beginComparison();
        if (this.mode === "interpolate" && byId("num-images").value < 3) byId("num-images").value = this.#atMost(9);
        this.#showMode();
      });
    }
    this.root.addEventListener("keydown", (event) => this.#drawOnEnter(event));
    this.root.addEventListener("input", (event) => event.target.removeAttribute("aria-invalid"));
  }

  get mode() {
    return this.root.elements.mode.value;
  }

  get model() {
    return this.models.find((model) => model.name === byId("model").value);
  }

  setModels({ models, limits }) {
    this.models = models;
    this.limits = limits;
    byId("model").replaceChildren(...models.map(({ name }) => element("option", { value: name, textContent: name })));
    byId("model").value = (models.find((model) => model.default) ?? models[0]).name;
    byId("model-field").hidden = models.length === 1;
    byId("num-images").max = limits.max_images;
    byId("num-images").value = this.#atMost(1 < this.model.num_classes && this.model.num_classes <= MANY ? this.model.num_classes : 4);
    this.#showModel();
  }

  /** Throws Mistake. */
  read() {
    const { mode, model } = this;
    const settings = { mode, model: model.name, weights: model.weights_sha256?.slice(0, 12), labels: this.classes.get() };
    if (model.prompt) settings.prompt = byId("prompt").value.trim();
    settings.seeds = named("seeds", wholes, byId("seeds").value.trim().replace(/[\s,;]+/g, ","));
    if (mode === "interpolate") settings.seed_to = number("seed_to");
    settings.num_images = settings.seeds.length > 1 && mode !== "interpolate" ? settings.seeds.length : number("num_images");
    settings.previews = number("previews");
    settings.exact = byId("exact").checked;
    settings.a = this.panels.a.read();
    settings.b = mode === "compare" ? this.panels.b.read() : {};
    return settings;
  }

  /** Fills the form from a link. Throws Mistake for what this model or its sampler does not have. */
  write(settings) {
    const known = this.models.some((model) => model.name === settings.model);
    if (settings.model !== undefined && !known) throw new Mistake("model", settings.model, "is not served here");
    if (known) byId("model").value = settings.model;
    this.root.elements.mode.value = settings.mode;
    this.#showModel();
    byId("prompt").value = settings.prompt ?? "";
    byId("seeds").value = settings.seeds.join(", ");
    byId("seed-to").value = settings.seed_to ?? settings.seeds[0] + 1;
    byId("num-images").value = settings.num_images ?? settings.seeds.length;
    byId("previews").value = settings.previews ?? 10;
    byId("exact").checked = settings.exact ?? true;
    this.panels.a.write(settings.a);
    this.compared = settings.mode === "compare";
    if (this.compared) this.panels.b.write(settings.b);
    this.#showMode();
    const wrong = this.classes.set(settings.labels);
    if (wrong !== undefined) throw new Mistake("labels", wrong, "is no class of this model");
  }

  /** Marks the field of a detail such as "eta=2: must be…"; returns its input, where there is one. */
  mark(detail, side) {
    const key = detail.match(/^(b\.)?([a-z_0-9]+)/)?.[2];
    const own = { seed: "seeds", seeds: "seeds", seed_to: "seed-to", num_images: "num-images", previews: "previews", prompt: "prompt", model: "model" };
    const input = key in own ? byId(own[key]) : key === "labels" ? byId("classes").querySelector("input") : this.panels[side].input(key);
    if (!input) return undefined;
    input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-describedby", "error");
    input.closest("details")?.setAttribute("open", "");
    return input;
  }

  unmark() {
    for (const input of this.root.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
    for (const input of this.root.querySelectorAll("[aria-describedby=error]")) input.removeAttribute("aria-describedby");
  }

  #showModel() {
    const { model } = this;
    byId("model-hint").textContent = describeModel(model);
    document.title = `ldm · ${model.name}`;
    byId("prompt-field").hidden = !model.prompt;
    this.classes.setClasses(model.num_classes, model.classes);
    for (const panel of Object.values(this.panels)) panel.setModel(model, Math.min(model.num_train_timesteps, this.limits.max_steps));
    this.#showMode();
  }

  #showMode() {
    const { mode } = this;
    const between = mode === "interpolate";
    const list = !between && /\d[\s,;]+\d/.test(byId("seeds").value);
    this.root.dataset.mode = document.body.dataset.mode = mode;
    this.panels.b.root.hidden = mode !== "compare";
    byId("seed-to-field").hidden = !between;
    byId("seeds-label").textContent = between ? "From seed" : list ? "Seeds" : "Seed";
    byId("num-images-label").textContent = between ? "Frames" : "Pictures";
    byId("num-images").disabled = list; // one for each seed
    byId("seeds-hint").textContent = between
      ? "The frames lie on the arc between the noise of the two seeds."
      : list ? "One picture for each seed." : "Each picture has the next seed. Or give a list: 3, 14, 15.";
    this.classes.setSingle(between);
  }

  #beginComparison() {
    this.compared = true;
    const first = this.panels.a.inputs.num_inference_steps.value;
    const other = OTHER_STEPS.find((steps) => steps !== Number(first));
    try {
      this.panels.b.write({ ...this.panels.a.read(), num_inference_steps: other });
    } catch (error) {
      if (!(error instanceof Mistake)) throw error; // a half-written value of A: B keeps its own
    }
  }

  #atMost(count) {
    return Math.min(count, this.limits.max_images);
  }

  /** Browsers draw on Enter from most inputs; here from all but those where Enter has a meaning of its own. */
  #drawOnEnter(event) {
    const own = event.target.closest("button, summary, a") || (event.target.matches("textarea") && event.shiftKey);
    if (event.key !== "Enter" || own || event.isComposing) return;
    event.preventDefault();
    this.root.requestSubmit();
  }
}

/** A number input of the form by its API name. */
function number(key) {
  const input = byId(key.replace("_", "-"));
  if (input.validity.badInput || input.value === "") throw new Mistake(key, undefined, "give a number");
  return named(key, whole, input.value);
}

function named(key, read, value) {
  try {
    return read(value);
  } catch (error) {
    throw error instanceof Mistake ? new Mistake(key, error.value, error.should) : error;
  }
}
