// One rollout, token by token. Tokens are put in some at a time, so that a long one holds nothing up.

import { html, useEffect, useRef, useState } from "./vendor/preact.js";
import { count, number, percent, printable, signed, version } from "./text.js";

export const MODES = { difference: "log-prob difference", weight: "weight", version: "policy version" };
const AT_ONCE = 400;
const STEPS = [0.02, 0.1, 0.3, 1]; // of the scale, in nats
const PAGE = 100;
const VERSIONS = 6;

// Its place on the scale: n4 … n1 below zero, p1 … p4 above, z about zero.
export function bin(value) {
  const place = STEPS.filter((edge) => Math.abs(value) >= edge).length;
  return place === 0 ? "z" : `${value < 0 ? "n" : "p"}${place}`;
}

export function classesOf(rollout) {
  const versions = rollout.spans.flatMap(([name, length]) =>
    new Array(length).fill(rollout.versions.indexOf(name) % VERSIONS));
  return rollout.pieces.map((_, i) => {
    const [sampler, learner, weight] = [rollout.behavior[i], rollout.learner[i], rollout.weights[i]];
    const difference = sampler == null ? "dna env" : learner == null ? "dna" : `d${bin(learner - sampler)}`;
    const weighed = weight == null ? "wna" : weight === 0 ? "w0" : `w${bin(Math.log(Math.abs(weight)))}`;
    return `t ${difference} ${weighed} v${versions[i] ?? 0}`;
  });
}

function fill(place, rollout, signal) {
  const classes = classesOf(rollout);
  const total = rollout.pieces.length;
  const more = (from) => {
    if (signal.aborted) return;
    const block = document.createElement("span");
    block.className = "block";
    for (let i = from; i < Math.min(from + AT_ONCE, total); i++) {
      const token = document.createElement("span");
      token.className = classes[i];
      token.dataset.i = i;
      token.textContent = printable(rollout.pieces[i], { keep: "\n" }).replaceAll("\n", "⏎\n");
      block.append(token);
    }
    place.append(block);
    if (from + AT_ONCE < total) requestAnimationFrame(() => more(from + AT_ONCE));
  };
  place.replaceChildren();
  more(0);
}

function spanOf(rollout, i) {
  let end = 0;
  for (const [name, length] of rollout.spans) {
    end += length;
    if (i < end) return name;
  }
  return "";
}

function facts(rollout, i) {
  const [sampler, learner] = [rollout.behavior[i], rollout.learner[i]];
  return [["token", `${i + 1} of ${count(rollout.tokens)}`], ["text", printable(rollout.pieces[i]) || "(empty)"],
    ["sampler", sampler == null ? "environment" : number(sampler)],
    ["learner", learner == null ? "not trained on" : number(learner)],
    ["difference", learner == null ? "–" : signed(learner - sampler)],
    ["weight", rollout.weights[i] === 0 ? "0, clipped" : number(rollout.weights[i])],
    ["version", version(spanOf(rollout, i))]];
}

function Readout({ rollout, at }) {
  return html`<div class="readout" role="status">${at == null
    ? html`<p class="muted">Point at a token, or focus the text and use the arrow keys.</p>`
    : html`<dl>${facts(rollout, at).map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}
      </dl>`}</div>`;
}

function Scale({ mode, rollout }) {
  if (mode === "version") {
    return html`<ul class="scale">${rollout.versions.map((name, i) => html`<li key=${name}>
      <span class=${`t v${i % VERSIONS}`}>${version(name)}</span></li>`)}</ul>`;
  }
  const letter = mode === "difference" ? "d" : "w";
  const ends = mode === "difference" ? ["learner finds it less likely", "more likely"] : ["weighs less", "more than 1"];
  return html`<ul class="scale"><li class="muted">${ends[0]}</li>
    ${["n4", "n3", "n2", "n1", "z", "p1", "p2", "p3", "p4"].map((step) => html`<li key=${step}>
      <span class=${`t ${letter}${step}`}>${step === "z" ? "0" : `${step[0] === "n" ? "−" : "+"}${STEPS[step[1] - 1]}`}</span>
    </li>`)}<li class="muted">${ends[1]}${mode === "weight" ? " (ln)" : " (nats)"}</li>
    ${mode === "weight" && html`<li><span class="t w0">clipped</span></li>`}
    <li><span class=${`t ${letter}na`}>not trained on</span></li></ul>`;
}

function TokenTable({ rollout }) {
  const [first, setFirst] = useState(0);
  const rows = Array.from({ length: Math.min(PAGE, rollout.pieces.length - first) }, (_, i) => first + i);
  const names = facts(rollout, 0).map(([name]) => name);
  return html`<div class="scroll" tabindex="0" role="region" aria-label="Tokens"><table class="grid">
      <caption class="vh">Tokens with their log-probs and weights</caption>
      <thead><tr>${names.map((name) => html`<th scope="col">${name}</th>`)}</tr></thead>
      <tbody>${rows.map((i) => html`<tr key=${i}>${facts(rollout, i).map(([, value], n) => (n === 0
        ? html`<th scope="row">${value}</th>` : html`<td>${value}</td>`))}</tr>`)}</tbody></table></div>
    <p class="pager"><button type="button" disabled=${first === 0} onClick=${() => setFirst(first - PAGE)}>Before</button>
    <button type="button" disabled=${first + PAGE >= rollout.pieces.length} onClick=${() => setFirst(first + PAGE)}>Next</button></p>`;
}

const MOVES = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 };

export function Tokens({ rollout, mode, onMode }) {
  const place = useRef(null);
  const [at, setAt] = useState(null);
  const [asTable, setAsTable] = useState(false);
  const last = rollout.pieces.length - 1;

  useEffect(() => {
    setAt(null);
    if (asTable) return undefined;
    const stop = new AbortController();
    fill(place.current, rollout, stop.signal);
    return () => stop.abort();
  }, [rollout.number, asTable]);
  useEffect(() => {
    const token = at == null ? null : place.current?.querySelector(`[data-i="${at}"]`);
    token?.classList.add("at");
    return () => token?.classList.remove("at");
  }, [at]);

  const point = (event) => event.target.dataset?.i !== undefined && setAt(Number(event.target.dataset.i));
  const move = (event) => {
    const by = { ...MOVES, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    const next = Math.max(0, Math.min(last, at == null ? 0 : at + by));
    setAt(next);
    place.current.querySelector(`[data-i="${next}"]`)?.scrollIntoView({ block: "nearest" });
  };
  return html`<div class="tools"><fieldset class="choice"><legend>Colour by</legend>
      ${Object.entries(MODES).map(([key, label]) => html`<label key=${key}><input type="radio" name="mode" value=${key}
        checked=${mode === key} onChange=${() => onMode(key)} /><span>${label}</span></label>`)}</fieldset>
      <button type="button" aria-pressed=${asTable} onClick=${() => setAsTable(!asTable)}>Table</button></div>
    <${Scale} mode=${mode} rollout=${rollout} />
    ${asTable ? html`<${TokenTable} key=${rollout.number} rollout=${rollout} />` : html`
      <${Readout} rollout=${rollout} at=${at} />
      <div class="tokens" data-mode=${mode} ref=${place} tabindex="0" role="group" dir="ltr"
        aria-label="Completion; arrow keys go through its tokens" onPointerOver=${point} onKeyDown=${move}></div>`}
    ${rollout.pieces.length < rollout.tokens && html`<p class="muted">The first ${count(rollout.pieces.length)} of
      ${" "}${count(rollout.tokens)} tokens are shown, ${percent(rollout.pieces.length / rollout.tokens)}.</p>`}`;
}
