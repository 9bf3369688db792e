// An interpolation as a film: one large frame, a slider over all of them, and play.

import { asImage, byId, set } from "./dom.js";
import { percent, shapeOf, shownWidth } from "./describe.js";

const FRAME_MS = 160;
const ROOM = 320; // px, the width of the frame

export class Film {
  constructor() {
    this.slider = byId("film-slider");
    this.slider.addEventListener("input", () => this.#show());
    byId("film-play").addEventListener("click", () => this.#play(!this.timer));
  }

  /** column: of an interpolation; null: no film. frame: the one to begin with. */
  begin(column, frame = 0) {
    this.#play(false);
    this.column = column;
    byId("film").hidden = !column;
    if (!column) return;
    const { settings, model } = column;
    this.slider.max = settings.num_images - 1;
    this.slider.value = frame;
    byId("film-from").textContent = `seed ${settings.seeds[0]}`;
    byId("film-to").textContent = `seed ${settings.seed_to}`;
    const [height, width] = shapeOf(model);
    const picture = byId("film-picture");
    picture.classList.toggle("pixels", width < ROOM);
    picture.style.setProperty("--shown", `${shownWidth(width, ROOM)}px`);
    picture.style.setProperty("--shape", `${width} / ${height}`);
    picture.removeAttribute("src");
    this.#show();
  }

  /** A frame of the column has changed. */
  update(column, index) {
    if (column === this.column && index === Number(this.slider.value)) this.#show();
  }

  #show() {
    const index = Number(this.slider.value);
    const picture = this.column.pictures[index];
    const png = picture.png ?? picture.previews.at(-1)?.png;
    const where = `${percent(this.column.settings, index)} of the way`;
    byId("film-at").textContent = where;
    set(this.slider, { "aria-valuetext": where });
    if (!png) return; // the frame before it stays until there is one
    byId("film-picture").src = asImage(png);
    byId("film-picture").alt = this.column.caption(index);
    for (const [i, tile] of this.column.tiles.entries()) tile.classList.toggle("current", i === index);
  }

  #play(on) {
    clearInterval(this.timer);
    this.timer = on ? setInterval(() => this.#step(), FRAME_MS) : undefined;
    set(byId("film-play"), { "aria-pressed": String(on) });
    byId("film-play").textContent = on ? "Pause" : "Play";
    this.forward = true;
  }

  /** There and back again. */
  #step() {
    const [at, last] = [Number(this.slider.value), Number(this.slider.max)];
    if (at === last) this.forward = false;
    if (at === 0) this.forward = true;
    this.slider.value = at + (this.forward ? 1 : -1);
    this.#show();
  }
}
