// The HTTP interface: one function for each call, and one `Problem` for whatever may be wrong.

import { readEvents } from "./events.js";

const TOKEN = "ldm.token";
const RETRIES_MS = [300, 1000, 3000]; // a stream that breaks is followed again: the server repeats its events

/** Why something was not done, in one line. status: of the answer, 0 where there was none. */
export class Problem extends Error {
  constructor(detail, status = 0) {
    super(detail);
    this.status = status;
  }
}

export function keepToken(token) {
  sessionStorage.setItem(TOKEN, token);
}

/** {models, limits} */
export async function getModels() {
  return (await request("GET", "v1/models")).json();
}

/**
 * Draws in the background and yields {event, data}: `accepted`, then those of its stream, the last one `done` or
 * `cancelled`. When `signal` is aborted, the request is cancelled at the server. Throws Problem.
 */
export async function* draw(body, signal) {
  // Not aborted on the way: what the server has begun can be cancelled only by the id of its answer.
  const { id } = await (await request("POST", "v1/samples", { body: { ...body, background: true } })).json();
  const stop = () => cancel(id);
  if (signal.aborted) return stop();
  signal.addEventListener("abort", stop, { once: true });
  try {
    yield { event: "accepted", data: { id } };
    yield* follow(id, signal);
  } finally {
    signal.removeEventListener("abort", stop);
  }
}

async function* follow(id, signal) {
  for (let tries = 0; ; tries++) {
    try {
      const answer = await request("GET", `v1/samples/${id}/events`, { signal });
      for await (const { event, data } of readEvents(answer.body)) {
        if (event === "failed") throw new Problem(data.detail, 500);
        yield { event, data };
        if (event === "done" || event === "cancelled") return;
        tries = 0;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Problem && error.status) throw error;
    }
    if (tries === RETRIES_MS.length) throw new Problem("The connection was lost while drawing; draw again.");
    await new Promise((resolve) => setTimeout(resolve, RETRIES_MS[tries]));
    if (signal.aborted) return;
  }
}

function cancel(id) {
  // keepalive: it is sent also when the page is left. What was over already needs no cancelling.
  request("DELETE", `v1/samples/${id}`, { keepalive: true }).catch(() => {});
}

async function request(method, path, { body, signal, keepalive } = {}) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers.Authorization = `Bearer ${token}`;
  let answer;
  try {
    answer = await fetch(path, { method, headers, signal, keepalive, body: body && JSON.stringify(body), cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem("The server does not answer; is it still running?");
  }
  if (answer.ok) return answer;
  throw new Problem(await explain(answer), answer.status);
}

async function explain(answer) {
  const body = await answer.json().catch(() => ({}));
  const detail = typeof body.detail === "string" ? body.detail : `The server answers ${answer.status}.`;
  const wait = answer.headers.get("Retry-After");
  return answer.status === 429 && wait ? `${detail} (try again in ${wait} s)` : detail;
}
