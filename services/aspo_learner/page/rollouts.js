// The browser of sample rollouts: a filter, a list, and the one that is open.

import { html, useEffect, useRef, useState } from "./vendor/preact.js";
import { get } from "./source.js";
import { count, number, printable, signed, version } from "./text.js";
import { Tokens } from "./tokens.js";

const PAGE = 100;
export const NO_FILTER = { text: "", actor: "", step: "", advantage: "any", min_reward: "", max_reward: "", order: "newest" };

function pathOf(filter, more) {
  const given = Object.entries({ ...filter, ...more }).filter(([, value]) => value !== "" && value != null);
  return `v1/rollouts?${new URLSearchParams(given)}`;
}

// The list of a filter; `more` adds a page to it, `again` begins anew.
function useListing(filter) {
  const [listing, setListing] = useState({ rows: [], matched: 0, kept: 0, until: null, state: "loading", error: "" });
  const [round, setRound] = useState(0);
  const current = useRef(null);
  const ask = async (rows, until) => {
    const mine = (current.current = {});
    setListing((old) => ({ ...old, state: rows.length ? "more" : "loading", error: "" }));
    try {
      const found = await get(pathOf(filter, { limit: PAGE, offset: rows.length, until }));
      if (current.current !== mine) return;
      const known = new Set(rows.map((row) => row.number));
      const all = [...rows, ...found.rollouts.filter((row) => !known.has(row.number))];
      setListing({ rows: all, matched: found.matched, kept: found.kept, until: found.until, state: "here", error: "" });
    } catch (error) {
      if (current.current === mine) setListing((old) => ({ ...old, state: "failed", error: error.message }));
    }
  };
  useEffect(() => {
    const timer = setTimeout(() => ask([], null), round ? 0 : 150);
    return () => clearTimeout(timer);
  }, [JSON.stringify(filter), round]);
  return { ...listing, more: () => ask(listing.rows, listing.until), again: () => setRound((n) => n + 1) };
}

function Field({ label, children, wide }) {
  return html`<label class=${wide ? "field wide" : "field"}><span>${label}</span>${children}</label>`;
}

function Filter({ filter, onFilter, actors }) {
  const set = (name) => (event) => onFilter({ ...filter, [name]: event.target.value });
  const num = (name, label, step = "any") => html`<${Field} label=${label}><input type="number" inputmode="decimal"
    step=${step} value=${filter[name]} onInput=${set(name)} /></${Field}>`;
  return html`<form class="filter" role="search" aria-label="Rollouts" onSubmit=${(event) => event.preventDefault()}>
    <${Field} label="Search" wide><input type="search" value=${filter.text} maxlength="200"
      placeholder="in completions" onInput=${set("text")} /></${Field}>
    <button type="button" onClick=${() => onFilter(NO_FILTER)}>Reset</button>
    <${Field} label="Advantage"><select value=${filter.advantage} onChange=${set("advantage")}>
      <option value="any">any</option><option value="positive">positive</option><option value="negative">negative</option>
      <option value="none">not trained on</option></select></${Field}>
    ${num("min_reward", "Reward from")}${num("max_reward", "to")}${num("step", "Step", "1")}
    <${Field} label="Actor"><select value=${filter.actor} onChange=${set("actor")}><option value="">any</option>
      ${actors.map((id) => html`<option key=${id} value=${id}>${printable(id)}</option>`)}</select></${Field}>
    <${Field} label="Order"><select value=${filter.order} onChange=${set("order")}><option value="newest">newest</option>
      <option value="difference">largest difference</option><option value="reward">highest reward</option>
      <option value="longest">longest</option></select></${Field}>
</form>`;
}

function Row({ row, open }) {
  return html`<li><a href=${`#rollouts/${row.number}`} aria-current=${open ? "true" : undefined}>
    <span class="head"><b>${number(row.reward)}</b>
      <span class=${row.advantage > 0 ? "up" : row.advantage < 0 ? "down" : "muted"}>${row.advantage == null
        ? "not trained on" : `A ${signed(row.advantage)}`}</span>
      <span class="muted">step ${count(row.step)} · ${count(row.tokens)} tokens${row.finish === "length" ? ", cut" : ""}
        ${row.difference == null ? "" : ` · |Δ| ${number(row.difference)}`}</span></span>
    <span class="excerpt" dir="ltr">${printable(row.excerpt) || html`<i class="muted">empty</i>`}</span></a></li>`;
}

function Detail({ id, mode, onMode }) {
  const [found, setFound] = useState({ rollout: null, error: "" });
  const title = useRef(null);
  useEffect(() => {
    const gone = new AbortController();
    get(`v1/rollouts/${id}`, { signal: gone.signal })
      .then((rollout) => setFound({ rollout, error: "" }))
      .catch((error) => gone.signal.aborted || setFound({ rollout: null, error: error.message }));
    return () => gone.abort();
  }, [id]);
  useEffect(() => title.current?.focus({ preventScroll: matchMedia("(min-width: 60rem)").matches }), [found.rollout?.number]);
  const { rollout, error } = found;
  if (!rollout) return html`<p class="none">${error || "Loading…"}</p>`;
  return html`<article class="detail"><h2 tabindex="-1" ref=${title}>Rollout of step ${count(rollout.step)}</h2>
    <dl class="facts">
      <div><dt>reward</dt><dd>${number(rollout.reward)}</dd></div>
      <div><dt>advantage</dt><dd>${signed(rollout.advantage)}</dd></div>
      <div><dt>tokens</dt><dd>${count(rollout.tokens)}, ${rollout.finish === "length" ? "cut" : "ended"}</dd></div>
      <div><dt>mean |Δ|</dt><dd>${number(rollout.difference)}</dd></div>
      <div><dt>sampled by</dt><dd>${rollout.versions.map(version).join(", ")}</dd></div>
      <div><dt>actor</dt><dd>${printable(rollout.actor)}</dd></div>
      <div><dt>task</dt><dd>${printable(rollout.uid)}</dd></div></dl>
    <h3>Prompt</h3><pre class="prompt" tabindex="0" dir="ltr">${printable(rollout.prompt, { limit: 20_000, keep: "\n" })}</pre>
    <h3>Completion</h3><${Tokens} rollout=${rollout} mode=${mode} onMode=${onMode} /></article>`;
}

export function Rollouts({ id, step, actors, filter, onFilter, mode, onMode }) {
  const listing = useListing(filter);
  const seen = useRef(step);
  useEffect(() => {
    if (listing.state === "here") seen.current = step;
  }, [listing.until, listing.state]);
  const nothing = listing.state === "here" && listing.rows.length === 0;
  const newer = step > seen.current && listing.state === "here";
  useEffect(() => {
    if (nothing && newer && listing.kept === 0) listing.again();
  }, [step]);
  return html`<div class=${id == null ? "browser" : "browser open"}>
    <div class="finder"><${Filter} filter=${filter} onFilter=${onFilter} actors=${actors} />
      <div class="found"><p role="status" class="muted">${listing.state === "loading" ? "Looking…"
        : `${count(listing.matched)} of ${count(listing.kept)} rollouts kept`}</p>
        ${newer && html`<button type="button" onClick=${listing.again}>Show newer</button>`}</div>
      ${listing.error && html`<p class="none error">${listing.error}
        <button type="button" onClick=${listing.again}>Try again</button></p>`}
      ${nothing && html`<p class="none">${listing.kept ? "No rollout is like that. Widen the filter."
        : "No rollout yet: a few groups of each step are kept here once it has been trained on."}</p>`}
      <ol class="list">${listing.rows.map((row) => html`<${Row} key=${row.number} row=${row} open=${row.number === id} />`)}</ol>
      ${listing.rows.length < listing.matched && html`<button type="button" class="more"
        disabled=${listing.state === "more"} onClick=${listing.more}>Show more</button>`}</div>
    <div class="reader" aria-live="off">${id == null
      ? html`<p class="none">Choose a rollout to see its tokens.</p>`
      : html`<a class="back" href="#rollouts">← All rollouts</a><${Detail} id=${id} mode=${mode} onMode=${onMode} />`}
    </div></div>`;
}
