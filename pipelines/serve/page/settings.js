// The settings of a drawing, the link that holds them, and the requests that they make. No DOM here.
//
// {mode, model, weights, labels, prompt, seeds, seed_to, num_images, previews, exact, picture, a, b}: a and b are the
// settings of the sampler, b of a comparison alone. Names are those of the API; what is undefined is left out.

const text = (value) => value;
const number = (value) => check(value, value.trim() !== "" && Number.isFinite(Number(value)), Number(value), "give a number");
export const whole = (value) => check(value, /^\d{1,16}$/.test(value), Number(value), "give a whole number");
const numbers = (value) => value.split(",").map(number);
export const wholes = (value) => value.split(",").map(whole);
const yes = (value) => value === "1";

const SHARED = {
  mode: text,
  model: text,
  weights: text,
  labels: wholes,
  prompt: text,
  seeds: wholes,
  seed_to: whole,
  num_images: whole,
  previews: whole,
  exact: yes,
  picture: whole,
};
export const SAMPLER = {
  sampler: text,
  num_inference_steps: whole,
  eta: (value) => (value === "sigma_hat" ? value : number(value)),
  guidance_scale: number,
  guidance_interval: numbers,
  guidance_rescale: number,
  spacing: text,
  steps_offset: whole,
  final_alpha_cumprod: text,
  clip_x0: number,
  profile: text,
};
const SECOND = "b."; // before the names of the second settings

/** A value that is not what it should be; key: whose. value: undefined where the browser itself could not read it. */
export class Mistake extends Error {
  constructor(key, value, should) {
    super(value === undefined ? `${key}: ${should}` : `${key}=${value}: ${should}`);
    Object.assign(this, { value, should });
  }
}

function check(value, right, read, should) {
  if (!right) throw new Mistake("", value, should);
  return read;
}

/** Settings => the fragment of a link. A fragment stays with the browser: no prompt is written into a server's log. */
export function toLink(settings) {
  const link = new URLSearchParams();
  const add = (name, value) => {
    if (value === undefined || value === "" || (Array.isArray(value) && !value.length)) return;
    link.set(name, typeof value === "boolean" ? Number(value) : String(value));
  };
  for (const key in SHARED) add(key, settings[key]);
  for (const key in SAMPLER) add(key, settings.a[key]);
  if (settings.mode === "compare") for (const key in SAMPLER) add(SECOND + key, settings.b[key]);
  return "#" + link.toString().replaceAll("%2C", ",");
}

/** The fragment of a link => settings. Throws Mistake. */
export function fromLink(fragment) {
  const settings = { mode: "draw", labels: [], seeds: [0], a: {}, b: {} };
  for (const [name, value] of new URLSearchParams(fragment.replace(/^#/, ""))) {
    const second = name.startsWith(SECOND);
    const key = second ? name.slice(SECOND.length) : name;
    const [readers, into] = key in SAMPLER ? [SAMPLER, second ? settings.b : settings.a] : [SHARED, settings];
    if (!Object.hasOwn(readers, key) || (second && readers === SHARED)) throw new Mistake(name, value, "this link has an unknown setting");
    try {
      into[key] = readers[key](value);
    } catch (error) {
      throw error instanceof Mistake ? new Mistake(name, error.value, error.should) : error;
    }
  }
  if (!["draw", "compare", "interpolate"].includes(settings.mode)) {
    throw new Mistake("mode", settings.mode, "give draw, compare or interpolate");
  }
  return settings;
}

/** The request of one side of the settings. */
export function toRequest(settings, side) {
  const { mode, model, labels, prompt, seeds, seed_to, num_images, previews, exact } = settings;
  const body = { model, ...settings[side], previews, exact };
  if (labels?.length) body.labels = labels;
  if (prompt) body.prompt = prompt;
  if (mode === "interpolate") return { ...body, seed: seeds[0], seed_to, num_images };
  return seeds.length > 1 ? { ...body, seeds } : { ...body, seed: seeds[0], num_images };
}

/** The settings that draw one of its pictures alone; of an interpolation, all of them again, with that one chosen. */
export function ofPicture(settings, side, { index, seed, label }) {
  if (settings.mode === "interpolate") return { ...settings, picture: index };
  const labels = label === null || label === undefined ? [] : [label];
  return { ...settings, mode: "draw", labels, seeds: [seed], num_images: 1, a: settings[side] };
}
