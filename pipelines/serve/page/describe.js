// Settings and pictures in words.

const SAMPLERS = { ddim: "DDIM", ddpm: "DDPM", dpmpp_2m: "DPM-Solver++ (2M)", euler: "Euler", heun: "Heun" };
const SHORT = {
  eta: (value) => `η ${value === "sigma_hat" ? "σ̂" : value}`,
  guidance_scale: (value) => (value === 1 ? "" : `guidance ${value}`),
  guidance_interval: ([from, to]) => `in ${from}–${to}`,
  guidance_rescale: (value) => `rescale ${value}`,
  spacing: (value) => value,
  steps_offset: (value) => `offset ${value}`,
  final_alpha_cumprod: () => "to the first noise level",
  clip_x0: (value) => `|x₀| ≤ ${value}`,
  profile: (value) => `${value} profile`,
};

export const samplerName = (sampler) => SAMPLERS[sampler] ?? sampler;
export const plural = (count, one) => `${count} ${one}${count === 1 ? "" : "s"}`;

/** "DDIM · 50 steps · η 0 · guidance 2" */
export function inShort({ sampler, num_inference_steps, ...others }) {
  const words = Object.entries(others).map(([key, value]) => SHORT[key](value));
  return [samplerName(sampler), plural(num_inference_steps, "step"), ...words].filter(Boolean).join(" · ");
}

/** What is known of picture `index` before it is drawn: {index, seed, label}; seed null between two seeds. */
export function expected(settings, numClasses, index) {
  const { mode, seeds, labels } = settings;
  const label = labels?.length ? labels[index % labels.length] : numClasses ? index % numClasses : null;
  if (mode === "interpolate") return { index, seed: null, label };
  return { index, seed: seeds.length > 1 ? seeds[index] : seeds[0] + index, label };
}

/** "three, seed 7"; of an interpolation "three, 25 % of the way" */
export function caption(settings, { index, seed, label }, model) {
  const where = settings.mode === "interpolate" ? `${percent(settings, index)} of the way` : `seed ${seed}`;
  const named = model.classes?.length > 0;
  return [label === null ? "" : named ? className(model, label) : `class ${label}`, where].filter(Boolean).join(", ");
}

export const className = (model, label) => model.classes?.[label] ?? String(label);

/** How far frame `index` is on the way: "25 %" */
export function percent({ num_images }, index) {
  return `${num_images > 1 ? Math.round((1000 * index) / (num_images - 1)) / 10 : 0} %`;
}

/** [height, width] of its pictures */
export const shapeOf = ({ image_size }) => (Array.isArray(image_size) ? image_size : [image_size, image_size]);

/** The width at which a picture fills `room`: small ones grow by a whole factor, so that their pixels stay squares. */
export const shownWidth = (width, room) => (width < room ? width * Math.floor(room / width) : room);

export function describeModel(model) {
  const { num_classes, flow, step } = model;
  const [height, width] = shapeOf(model);
  const classes = num_classes ? plural(num_classes, "class").replace("classs", "classes") : "";
  return [`${width} × ${height} px`, classes, flow ? "flow" : "diffusion", `training step ${step}`].filter(Boolean).join(" · ");
}
