// How long drawings took, by their number of steps.

const KEPT = 5;

export class Times {
  #seconds = new Map(); // what else was asked for => steps => seconds

  /** request: as it was sent. Only drawings that differ in nothing but steps, seeds and classes are compared. */
  add(request, seconds) {
    const own = this.#of(request);
    own.delete(request.num_inference_steps); // so that it is the newest again
    own.set(request.num_inference_steps, seconds);
    if (own.size > KEPT) own.delete(own.keys().next().value);
  }

  /** [{steps, seconds, last}], fewest steps first */
  rows(request) {
    const own = this.#of(request);
    const newest = [...own.keys()].at(-1);
    return [...own].map(([steps, seconds]) => ({ steps, seconds, last: steps === newest })).sort((a, b) => a.steps - b.steps);
  }

  #of({ num_inference_steps, labels, seed, seeds, seed_to, prompt, ...others }) {
    const key = JSON.stringify({ ...others, num_images: others.num_images ?? seeds.length });
    if (!this.#seconds.has(key)) this.#seconds.set(key, new Map());
    return this.#seconds.get(key);
  }
}
