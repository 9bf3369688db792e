// One picture, large: how it formed, its settings, its link, and the pictures beside it.

import { asImage, byId, element } from "./dom.js";
import { className, inShort, percent, shapeOf, shownWidth } from "./describe.js";

const ROOM = 448; // px, the width of a small picture

export class Viewer {
  constructor() {
    this.dialog = byId("viewer");
    this.slider = byId("viewer-slider");
    this.slider.addEventListener("input", () => this.#showStep());
    byId("viewer-close").addEventListener("click", () => this.dialog.close());
    byId("viewer-other").addEventListener("click", () => this.#flip());
    byId("viewer-before").addEventListener("click", () => this.#go(-1));
    byId("viewer-next").addEventListener("click", () => this.#go(1));
    byId("viewer-copy").addEventListener("click", () => this.#copy());
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close(); // beside it
    });
    this.dialog.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.target === this.slider) return; // there arrows go through the steps
      if (move) this.#go(move);
      if (event.key === "ArrowUp" || event.key === "ArrowDown") this.#flip();
    });
    this.dialog.addEventListener("close", () => this.column?.tiles[this.index].querySelector(".picture").focus());
  }

  get isOpen() {
    return this.dialog.open;
  }

  /** columns: all that are shown; of a comparison, one can flip between the two in place. */
  open(column, index, columns) {
    this.column = column;
    this.columns = columns;
    this.index = index;
    this.#show();
    if (!this.dialog.open) this.dialog.showModal();
  }

  /** A picture has changed. */
  update(column, index) {
    if (this.isOpen && column === this.column && index === this.index) this.#show();
  }

  close() {
    if (this.isOpen) this.dialog.close();
  }

  #show() {
    const { column, index } = this;
    const picture = column.pictures[index];
    this.frames = [...picture.previews];
    if (picture.png) this.frames.push({ steps_done: column.calls, png: picture.png });
    byId("viewer-title").textContent = column.caption(index);
    const [height, width] = shapeOf(column.model);
    byId("viewer-picture").classList.toggle("pixels", width < ROOM);
    byId("viewer-picture").style.setProperty("--shown", `${width < ROOM ? shownWidth(width, ROOM) : width}px`);
    byId("viewer-picture").style.setProperty("--shape", `${width} / ${height}`);
    byId("viewer-steps").hidden = this.frames.length < 2;
    this.slider.max = this.frames.length - 1;
    this.slider.value = this.frames.length - 1;
    this.#showStep();
    byId("viewer-settings").replaceChildren(...this.#facts().flatMap(([name, value]) => [
      element("dt", { textContent: name }),
      element("dd", { textContent: value }),
    ]));
    const ready = Boolean(picture.png);
    byId("viewer-copy").disabled = !ready;
    byId("viewer-copy").textContent = "Copy link";
    byId("viewer-download").hidden = !ready;
    if (ready) Object.assign(byId("viewer-download"), { href: asImage(picture.png), download: column.fileName(index) });
    byId("viewer-before").hidden = byId("viewer-next").hidden = column.pictures.length === 1;
    byId("viewer-badge").hidden = byId("viewer-other").hidden = this.columns.length === 1;
    byId("viewer-badge").textContent = column.side.toUpperCase();
    byId("viewer-other").textContent = `Show ${column.side === "a" ? "B" : "A"} ↕`;
  }

  #showStep() {
    const frame = this.frames[Number(this.slider.value)];
    if (!frame) return byId("viewer-picture").removeAttribute("src");
    byId("viewer-picture").src = asImage(frame.png);
    byId("viewer-picture").alt = `${this.column.caption(this.index)}, step ${frame.steps_done}`;
    byId("viewer-step").textContent = `step ${frame.steps_done}`;
    this.slider.setAttribute("aria-valuetext", `step ${frame.steps_done}`);
  }

  #facts() {
    const { settings, side, model, pictures } = this.column;
    const { seed, label } = pictures[this.index];
    const facts = [["Model", `${model.name}, training step ${model.step}`]];
    if (settings.prompt) facts.push(["Prompt", settings.prompt]);
    if (label !== null && label !== undefined) facts.push(["Class", model.classes?.length ? `${className(model, label)} (${label})` : label]);
    if (settings.mode === "interpolate") facts.push(["Seeds", `${settings.seeds[0]} → ${settings.seed_to}, ${percent(settings, this.index)}`]);
    else facts.push(["Seed", seed]);
    return [...facts, ["Settings", inShort(settings[side])]];
  }

  #go(by) {
    const count = this.column.pictures.length;
    this.open(this.column, (this.index + by + count) % count, this.columns);
  }

  #flip() {
    this.open(this.columns.find((column) => column !== this.column) ?? this.column, this.index, this.columns);
  }

  async #copy() {
    const link = new URL(this.column.link(this.index), location.href).href;
    try {
      await navigator.clipboard.writeText(link);
      byId("viewer-copy").textContent = "Copied";
    } catch {
      window.prompt("The link of this picture", link); // without https there is no clipboard
    }
  }
}
