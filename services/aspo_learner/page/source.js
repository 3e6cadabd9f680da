// Where the figures come from: requests with the reader's token, and one stream of events that heals itself.

const TOKEN = "aspo.token";
const SILENCE_MS = 30_000; // the learner says something every few seconds

export class Refused extends Error {}

export class Failed extends Error {
  constructor(status, message, hint) {
    super(hint ? `${message} (${hint})` : message);
    this.status = status;
  }
}

export const token = {
  get: () => sessionStorage.getItem(TOKEN) ?? "",
  set: (value) => sessionStorage.setItem(TOKEN, value),
  clear: () => sessionStorage.removeItem(TOKEN),
};

function headers(more) {
  const given = token.get();
  return given ? { ...more, Authorization: `Bearer ${given}` } : more;
}

async function ask(path, { signal, more = {} } = {}) {
  const answer = await fetch(path, { headers: headers(more), signal, cache: "no-store", credentials: "omit" });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  const { message = `the learner answered ${answer.status}`, hint = "" } = told.error ?? {};
  if (answer.status === 401 || answer.status === 403) throw new Refused(message);
  throw new Failed(answer.status, message, hint);
}

export async function get(path, options) {
  return (await ask(path, options)).json();
}

// Follow the learner's events for good; `on` hears of events by name, and of "state": live, lost or refused.
export function follow(on) {
  let lastId = "";
  let wait = 500;
  let wake = () => {};
  const stopped = new AbortController();
  const sooner = () => wake();
  addEventListener("online", sooner);
  document.addEventListener("visibilitychange", sooner);

  async function once() {
    const silent = new AbortController();
    const signal = AbortSignal.any([stopped.signal, silent.signal]);
    let timer = setTimeout(() => silent.abort(), SILENCE_MS);
    try {
      const answer = await ask("v1/events", { signal, more: lastId ? { "Last-Event-ID": lastId } : {} });
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (let part = await reader.read(); !part.done; part = await reader.read()) {
        clearTimeout(timer);
        timer = setTimeout(() => silent.abort(), SILENCE_MS);
        const blocks = (rest + part.value).split("\n\n");
        rest = blocks.pop();
        for (const block of blocks) hear(block);
        wait = 500;
      }
    } finally {
      clearTimeout(timer);
    }
  }

  function hear(block) {
    const event = { data: "" };
    for (const line of block.split("\n")) {
      const colon = line.indexOf(": ");
      if (colon > 0) event[line.slice(0, colon)] = line.slice(colon + 2);
    }
    if (event.id) lastId = event.id;
    if (!event.event) return;
    if (event.event === "hello") on("state", "live");
    on(event.event, JSON.parse(event.data));
  }

  async function forever() {
    while (!stopped.signal.aborted) {
      try {
        await once();
        on("state", "lost");
      } catch (error) {
        if (stopped.signal.aborted) return;
        on("state", error instanceof Refused ? "refused" : "lost", error);
        if (error instanceof Refused) return;
      }
      await new Promise((resolve) => {
        wake = resolve;
        setTimeout(resolve, wait * (0.75 + Math.random() / 2));
      });
      wait = Math.min(2 * wait, 8000);
    }
  }

  forever();
  return () => {
    stopped.abort();
    wake();
    removeEventListener("online", sooner);
    document.removeEventListener("visibilitychange", sooner);
  };
}
