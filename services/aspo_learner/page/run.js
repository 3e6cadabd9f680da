// What the page knows of the run: its status and curves, kept up to date by the learner's events.

import { NAMES } from "./charts.js";
import { follow, get } from "./source.js";

const POINTS = 600;
const REDRAW_AFTER = 120; // points added by events before the curves are asked for anew
const EMPTY = { step: [] };

export class Run extends EventTarget {
  state = "connecting"; // live, lost, refused
  error = "";
  heard = 0;
  status = null;
  curves = { columns: EMPTY, stride: 1, steps: 0, first: 0, last: 0 };
  loaded = false;
  range = { kind: "all" }; // or last: count; or between: first, last

  #stop = () => {};
  #added = 0;
  #drawn = false;
  #asked = 0;

  open() {
    this.#stop();
    this.state = "connecting";
    this.#stop = follow((name, data, error) => this.#hear(name, data, error));
    this.#changed();
  }

  close() {
    this.#stop();
    this.state = "refused";
    this.status = null;
    this.#changed();
  }

  show(range) {
    this.range = range;
    this.load();
  }

  async load() {
    const mine = ++this.#asked;
    const { kind } = this.range;
    const query = new URLSearchParams(NAMES.map((name) => ["name", name]));
    query.set("points", POINTS);
    if (kind === "last") query.set("first", Math.max(0, this.curves.steps - this.range.count));
    if (kind === "between") {
      query.set("first", this.range.first);
      query.set("last", this.range.last);
    }
    try {
      const found = await get(`v1/history?${query}`);
      if (mine !== this.#asked) return;
      this.curves = found;
      this.loaded = true;
      this.#added = 0;
      if (kind === "last" && found.steps - found.first > this.range.count + REDRAW_AFTER) this.load();
      this.#changed();
    } catch {
      // The stream notices by itself that the learner is gone, and asks again when it is back.
    }
  }

  #hear(name, data, error) {
    this.heard = Date.now();
    if (name === "state") {
      this.state = data;
      this.error = error?.message ?? "";
      if (data === "refused") this.status = null;
    } else if (name === "hello") {
      if (!data.resumed) this.load();
    } else if (name === "status") {
      this.status = data;
    } else if (name === "step") {
      this.#add(data);
    }
    this.#changed();
  }

  #add(metrics) {
    const { columns, steps } = this.curves;
    if (!this.loaded || metrics.step <= (columns.step.at(-1) ?? -1)) return;
    this.curves = { ...this.curves, steps: steps + 1 };
    if (this.range.kind === "between") return;
    const grown = { ...columns };
    const length = columns.step.length;
    for (const name of new Set([...Object.keys(columns), ...Object.keys(metrics).filter(isWanted)])) {
      grown[name] = [...(columns[name] ?? new Array(length).fill(null)), metrics[name] ?? null];
    }
    this.curves.columns = grown;
    this.curves.last += 1;
    if (++this.#added >= REDRAW_AFTER) this.load();
  }

  // Many events make one redraw.
  #changed() {
    if (this.#drawn) return;
    this.#drawn = true;
    setTimeout(() => {
      this.#drawn = false;
      this.dispatchEvent(new Event("change"));
    }, 50);
  }
}

function isWanted(name) {
  return NAMES.includes(name.split("/")[0]);
}
