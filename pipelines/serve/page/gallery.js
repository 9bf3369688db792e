// One column of pictures that form: a tile for each, and how far they are.

import { asImage, copy, set } from "./dom.js";
import { caption, expected, inShort, percent, plural, shapeOf, shownWidth } from "./describe.js";
import { ofPicture, toLink } from "./settings.js";

export class Column {
  /** settings, side: of what is drawn. onOpen, onChange: called with (column, index). */
  constructor({ settings, side, model, onOpen, onChange }) {
    Object.assign(this, { settings, side, model, onChange });
    this.root = copy("column-template");
    this.root.querySelector(".title").textContent = inShort(settings[side]);
    const badge = this.root.querySelector(".badge");
    badge.hidden = settings.mode !== "compare";
    badge.textContent = side.toUpperCase();
    this.calls = settings[side].num_inference_steps; // of the denoiser for one picture; the server tells, where it is more
    this.pictures = Array.from({ length: settings.num_images }, (_, index) => ({
      ...expected(settings, model.num_classes, index),
      previews: [], // {steps_done, png}
      png: null,
    }));
    this.tiles = this.pictures.map((picture, index) => {
      const tile = copy("tile-template");
      this.#name(tile, index);
      tile.querySelector(".picture").addEventListener("click", () => onOpen(this, index));
      set(tile.querySelector(".picture"), { "aria-label": `${this.caption(index)}, not drawn yet` });
      tile.dataset.index = index;
      return tile;
    });
    this.root.querySelector(".tiles").append(...this.tiles);
    this.#fitTiles();
    this.say("Waits");
  }

  /** Shows the pictures of another column, dimmed, until its own come: a slider that is moved leaves no empty page. */
  dim(other) {
    if (other.pictures.length !== this.pictures.length || other.model !== this.model) return;
    for (const [index, picture] of other.pictures.entries()) {
      const png = picture.png ?? picture.previews.at(-1)?.png;
      if (!png) continue;
      this.tiles[index].querySelector("img").src = asImage(png);
      this.tiles[index].classList.add("before");
    }
  }

  caption(index) {
    return caption(this.settings, this.pictures[index], this.model);
  }

  /** The link that draws this picture again. */
  link(index) {
    return toLink(ofPicture(this.settings, this.side, this.pictures[index]));
  }

  fileName(index) {
    return `${this.model.name}-${this.caption(index)}.png`.replace(/[^\w.-]+/g, "-");
  }

  say(text) {
    this.root.querySelector(".state").textContent = text;
  }

  showPreview({ index, steps_done, png }) {
    const picture = this.pictures[index];
    if (picture.png || picture.previews.some((preview) => preview.steps_done >= steps_done)) return; // told again after a break
    picture.previews.push({ steps_done, png });
    this.#show(index, png, `${this.caption(index)}, step ${steps_done}`);
    this.tiles[index].style.setProperty("--done", Math.min(1, steps_done / this.calls));
  }

  showPicture({ index, seed, label, png }) {
    const picture = this.pictures[index];
    Object.assign(picture, { png, label });
    if (this.settings.mode !== "interpolate") picture.seed = seed;
    const tile = this.tiles[index];
    tile.classList.add("done");
    this.#name(tile, index);
    this.#show(index, png, this.caption(index));
    const link = tile.querySelector(".link");
    const save = tile.querySelector(".save");
    link.href = this.link(index);
    save.href = asImage(png);
    save.download = this.fileName(index);
    set(link, { title: "Link that draws this picture again", "aria-label": `Link to ${this.caption(index)}` });
    set(save, { title: "Save as PNG", "aria-label": `Save ${this.caption(index)} as PNG` });
    link.hidden = save.hidden = false;
  }

  showProgress({ steps_done, steps, images_done, num_images }) {
    this.calls = steps / num_images || 1;
    this.root.querySelector("progress").value = steps_done / steps || 0;
    if (num_images === 1) this.say(`Step ${steps_done} of ${steps}`);
    else this.say(`${Math.floor((100 * steps_done) / (steps || 1))} % · ${images_done} of ${num_images} pictures`);
  }

  /** The last word: text is how it ended. */
  end(text, { done = false } = {}) {
    this.ended = true;
    this.root.classList.add("ended");
    this.root.classList.toggle("unfinished", !done);
    this.say(text);
  }

  finish(seconds) {
    this.root.querySelector("progress").value = 1;
    this.end(`${plural(this.pictures.length, "picture")} in ${seconds.toFixed(2)} s`, { done: true });
  }

  #name(tile, index) {
    const between = this.settings.mode === "interpolate"; // of one class, which the form shows
    tile.querySelector(".what").textContent = between ? percent(this.settings, index) : this.caption(index);
  }

  #show(index, png, text) {
    const image = this.tiles[index].querySelector("img");
    image.src = asImage(png);
    this.tiles[index].classList.remove("before");
    const button = this.tiles[index].querySelector(".picture");
    button.disabled = false;
    set(button, { "aria-label": text });
    this.onChange(this, index);
  }

  #fitTiles() {
    const [height, width] = shapeOf(this.model);
    const many = this.pictures.length;
    const side = this.settings.mode === "compare" ? 0.75 : 1;
    const room = side * (many === 1 ? 448 : many <= 4 ? 240 : many <= 16 ? 176 : 128);
    const shown = many === 1 && width > room ? Math.min(width, 768) : shownWidth(width, room);
    this.root.style.setProperty("--tile", `${shown}px`);
    this.root.style.setProperty("--shape", `${width} / ${height}`);
    this.root.classList.toggle("pixels", width < room);
  }
}
