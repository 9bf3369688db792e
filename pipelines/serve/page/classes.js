// Which classes to draw: a few as buttons, many as a list with a filter. None chosen: all in turn.

import { element, set } from "./dom.js";

const FEW = 24;
const SHOWN = 200; // options in the list at a time; the filter narrows it

export class ClassPicker {
  constructor(field) {
    this.field = field;
    this.chosen = []; // numbers, in the order of choice
    this.names = [];
    this.single = false;
  }

  /** names: [] where classes have numbers only. count 0: the model has no classes. */
  setClasses(count, names) {
    this.names = Array.from({ length: count }, (_, i) => names?.[i] ?? String(i));
    this.chosen = [];
    this.field.hidden = !count;
    this.field.replaceChildren(this.field.querySelector("legend"));
    if (!count) return;
    this.hint = element("p", { className: "hint" });
    if (count <= FEW) this.#buildButtons();
    else this.#buildList();
    this.field.append(this.hint);
    this.#show();
  }

  get() {
    return [...this.chosen];
  }

  /** Returns the first number that is no class; undefined where all are. */
  set(numbers) {
    this.chosen = numbers.filter((number) => number < this.names.length);
    this.#show();
    return numbers.find((number) => number >= this.names.length);
  }

  /** single: an interpolation is of one class. */
  setSingle(single) {
    this.single = single;
    if (single && this.names.length) this.chosen = this.chosen.length ? this.chosen.slice(0, 1) : [0];
    this.#show();
  }

  name(number) {
    return number === null || number === undefined ? "" : (this.names[number] ?? String(number));
  }

  #toggle(number, on = !this.chosen.includes(number)) {
    const others = this.single ? [] : this.chosen.filter((other) => other !== number);
    this.chosen = on || this.single ? [...others, number] : others;
    this.#show();
  }

  #show() {
    if (!this.names.length) return;
    this.hint.textContent = this.single ? "One class." : this.chosen.length ? "" : "None chosen: all in turn.";
    this.showChosen();
  }

  #buildButtons() {
    const box = element("div", { className: "chips" });
    const inputs = this.names.map((name, number) => {
      const input = element("input", { type: "checkbox", name: "class", value: number });
      input.addEventListener("change", () => this.#toggle(number, input.checked));
      const label = element("label", { className: "chip" });
      label.append(input, element("span", { textContent: name }));
      box.append(label);
      return input;
    });
    this.field.append(box);
    this.showChosen = () => {
      for (const [number, input] of inputs.entries()) {
        input.type = this.single ? "radio" : "checkbox";
        input.checked = this.chosen.includes(number);
      }
    };
  }

  /** A combobox over an open list box: arrows move, Enter chooses, all while the focus stays in the filter. */
  #buildList() {
    const chips = element("div", { className: "chips" });
    const filter = element("input", { type: "search", placeholder: `Filter ${this.names.length} classes`, spellcheck: false });
    const list = element("ul", { id: "class-list", className: "options" });
    set(list, { role: "listbox", "aria-label": "Classes", "aria-multiselectable": "true" });
    set(filter, { role: "combobox", "aria-label": "Filter the classes", "aria-expanded": "true", "aria-controls": list.id });
    const more = element("p", { className: "hint" });
    this.field.append(chips, filter, list, more);
    let active = -1;

    const options = () => [...list.children];
    const activate = (position) => {
      active = position;
      for (const [i, option] of options().entries()) option.classList.toggle("active", i === position);
      const option = options()[position];
      set(filter, { "aria-activedescendant": option?.id ?? "" });
      option?.scrollIntoView({ block: "nearest" });
    };
    const show = () => {
      const wanted = filter.value.trim().toLowerCase();
      const found = [...this.names.keys()].filter((n) => String(n) === wanted || this.names[n].toLowerCase().includes(wanted));
      list.replaceChildren(...found.slice(0, SHOWN).map((number) => this.#option(number)));
      more.textContent = found.length > SHOWN ? `${found.length - SHOWN} more; type to narrow.` : found.length ? "" : "No class has this name.";
      activate(-1);
    };

    filter.addEventListener("input", show);
    filter.addEventListener("keydown", (event) => {
      const last = list.children.length - 1;
      const moves = { ArrowDown: Math.min(active + 1, last), ArrowUp: Math.max(active - 1, -1) };
      if (event.key in moves) {
        event.preventDefault();
        activate(moves[event.key]);
      } else if (event.key === "Enter" && active >= 0) {
        event.preventDefault();
        event.stopPropagation(); // it chooses here; without a line of the list in focus, it draws
        this.#toggle(Number(options()[active].dataset.number));
      }
    });
    list.addEventListener("mousedown", (event) => event.preventDefault()); // the focus stays in the filter
    list.addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) this.#toggle(Number(option.dataset.number));
    });
    this.showChosen = () => {
      set(list, { "aria-multiselectable": String(!this.single) });
      for (const option of options()) set(option, { "aria-selected": String(this.chosen.includes(Number(option.dataset.number))) });
      chips.replaceChildren(...this.chosen.map((number) => this.#removable(number, filter)));
    };
    show();
  }

  #option(number) {
    const option = element("li", { id: `class-${number}`, textContent: this.names[number] });
    option.dataset.number = number;
    set(option, { role: "option", "aria-selected": String(this.chosen.includes(number)) });
    option.append(element("small", { textContent: number }));
    return option;
  }

  #removable(number, filter) {
    const chip = element("button", { type: "button", className: "chip chosen", textContent: `${this.name(number)} ×` });
    set(chip, { "aria-label": `Remove ${this.name(number)}` });
    chip.disabled = this.single;
    chip.addEventListener("click", () => {
      this.#toggle(number, false);
      filter.focus();
    });
    return chip;
  }
}
