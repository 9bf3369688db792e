// The page: form => link => requests => pictures.

import { Problem, draw, getModels, keepToken } from "./api.js";
import { plural } from "./describe.js";
import { byId, set } from "./dom.js";
import { Film } from "./film.js";
import { Form } from "./form.js";
import { Column } from "./gallery.js";
import { Mistake, fromLink, toLink, toRequest } from "./settings.js";
import { Times } from "./times.js";
import { Viewer } from "./viewer.js";

const SETTLED_MS = 250; // a slider that the arrow keys move changes many times a second
const QUARTERS = 4; // how often progress is told to a screen reader

const film = new Film();
const viewer = new Viewer();
const times = new Times();
const form = new Form(slid);
let columns = [];
let running = null; // the AbortController of the drawing on its way
let settling;

async function start() {
  byId("door").hidden = byId("trouble").hidden = true;
  try {
    form.setModels(await getModels());
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    if (error.status === 401) return askToken("");
    byId("trouble-error").textContent = error.message;
    byId("trouble").hidden = false;
    return byId("again").focus();
  }
  byId("main").hidden = false;
  openLink();
}

/** Fills the form from the page's own link and draws; without one, waits for the first drawing. */
function openLink() {
  if (location.hash.length < 2) return;
  let settings;
  try {
    settings = fromLink(location.hash);
    form.write(settings);
  } catch (error) {
    return refuse(error);
  }
  const { weights_sha256 } = form.model;
  const other = settings.weights && weights_sha256 && !weights_sha256.startsWith(settings.weights);
  drawAll({ frame: settings.picture, link: "replace" });
  byId("note").textContent = other ? "The model has other weights than when this link was made: its pictures differ." : "";
}

/** Draws what the form says; what is on its way is cancelled. link: whether Back returns to the one before. */
async function drawAll({ frame, link = "push", focus = false } = {}) {
  stop();
  clearTimeout(settling);
  clear();
  let settings;
  try {
    settings = form.read();
  } catch (error) {
    return refuse(error, { focus });
  }
  const mine = (running = new AbortController());
  byId("cancel").disabled = false;
  set(byId("result"), { "aria-busy": "true" });
  const fragment = toLink({ ...settings, picture: frame });
  if (fragment !== location.hash) history[link + "State"](null, "", fragment);

  const { model } = form;
  const made = (settings.mode === "compare" ? ["a", "b"] : ["a"]).map(
    (side) => new Column({
      settings, side, model,
      onOpen: (column, index) => viewer.open(column, index, columns),
      onChange: (column, index) => {
        film.update(column, index);
        viewer.update(column, index);
      },
    }),
  );
  let side = "a";
  try {
    // One after the other, so that the time that each takes is its own.
    for (const column of made) {
      side = column.side;
      await drawColumn(column, mine.signal, () => column === made[0] && show(made, frame));
    }
  } catch (error) {
    for (const column of made) if (!column.ended) column.end("Not drawn");
    if (running === mine) refuse(error, { side, focus });
  } finally {
    if (mine.signal.aborted) for (const column of made) if (!column.ended) column.end("Cancelled");
    if (running === mine) idle();
  }
}

async function drawColumn(column, signal, accepted) {
  const request = toRequest(column.settings, column.side);
  let quarter = 0;
  for await (const { event, data } of draw(request, signal)) {
    if (event === "accepted") {
      accepted();
      announce(`Drawing ${plural(column.pictures.length, "picture")}`);
    }
    if (event === "preview") column.showPreview(data);
    if (event === "picture") column.showPicture(data);
    if (event === "cancelled") column.end("Cancelled by the server");
    if (event === "progress") {
      column.showProgress(data);
      const reached = Math.floor((QUARTERS * data.steps_done) / (data.steps || 1));
      if (reached > quarter && reached < QUARTERS) announce(`${(100 * reached) / QUARTERS} %`);
      quarter = Math.max(quarter, reached);
    }
    if (event === "done") {
      column.finish(data.seconds);
      times.add(request, data.seconds);
      for (const { side, settings } of columns) form.panels[side].showTimes(times.rows(toRequest(settings, side)));
      announce(`Done: ${plural(column.pictures.length, "picture")} in ${data.seconds.toFixed(1)} seconds`);
    }
  }
}

/** Puts new columns in the place of the old ones, once their drawing was accepted. */
function show(made, frame) {
  viewer.close();
  for (const [i, column] of made.entries()) if (columns[i]) column.dim(columns[i]);
  columns = made;
  byId("empty").hidden = true;
  byId("columns").replaceChildren(...made.map((column) => column.root));
  film.begin(made[0].settings.mode === "interpolate" ? made[0] : null, frame);
  const result = byId("result");
  if (result.getBoundingClientRect().top > 0.6 * innerHeight) result.scrollIntoView(); // a narrow page: it is below
}

function stop() {
  running?.abort();
  if (running) announce("Cancelled");
  idle();
}

function idle() {
  running = null;
  if (document.activeElement === byId("cancel")) byId("draw").focus(); // a disabled button would lose the focus
  byId("cancel").disabled = true;
  set(byId("result"), { "aria-busy": "false" });
}

function slid() {
  if (!byId("live").checked || !columns.length) return;
  clearTimeout(settling);
  settling = setTimeout(() => drawAll({ link: "replace" }), SETTLED_MS);
}

/** One clear line at the form, its field marked. */
function refuse(error, { side = "a", focus = false } = {}) {
  if (!(error instanceof Problem || error instanceof Mistake)) throw error;
  if (error.status === 401) return askToken("The server does not take this token.");
  byId("error").textContent = error.message;
  const input = form.mark(error.message, side);
  if (focus) input?.focus();
}

function clear() {
  byId("error").textContent = byId("note").textContent = "";
  form.unmark();
}

function askToken(why) {
  byId("door").hidden = false;
  byId("door-error").textContent = sessionStorage.length ? why || "The server does not take this token." : "";
  byId("token").focus();
}

/** In a comparison, the picture of the same seed on the other side stands out. */
function showTwin({ type, target }) {
  const index = type === "mouseover" || type === "focusin" ? target.closest(".tile")?.dataset.index : undefined;
  for (const column of columns) {
    for (const tile of column.tiles) tile.classList.toggle("twin", columns.length > 1 && tile.dataset.index === index);
  }
}

function announce(text) {
  byId("announce").textContent = text;
}

byId("door").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken(byId("token").value.trim());
  byId("token").value = "";
  if (byId("main").hidden) return start();
  byId("door").hidden = true;
  drawAll();
});
byId("again").addEventListener("click", start);
byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  drawAll({ focus: true });
});
byId("cancel").addEventListener("click", stop);
byId("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the fragment holds the settings
  byId("result").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || viewer.isOpen || !running) return;
  event.preventDefault();
  stop();
});
for (const type of ["mouseover", "mouseleave", "focusin", "focusout"]) byId("columns").addEventListener(type, showTwin);
addEventListener("hashchange", openLink);
addEventListener("pagehide", () => running?.abort());
start();
