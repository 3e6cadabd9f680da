// The page: its frame, the login, and which view is shown.

import { html, render, useEffect, useReducer, useRef, useState } from "./vendor/preact.js";
import { Bars, Chart, CHARTS } from "./charts.js";
import { Fleet } from "./fleet.js";
import { NO_FILTER, Rollouts } from "./rollouts.js";
import { Run } from "./run.js";
import { token } from "./source.js";
import { count, number, percent, printable, seconds, version } from "./text.js";

const VIEWS = { training: "Training", fleet: "Fleet", rollouts: "Rollouts" };
const THEMES = { auto: "System", light: "Light", dark: "Dark" };
const RANGES = [["All", { kind: "all" }], ["1,000", { kind: "last", count: 1000 }], ["100", { kind: "last", count: 100 }]];
const STATES = { connecting: "Connecting…", live: "Live", lost: "Reconnecting…", refused: "Signed out" };

function place() {
  const [view, id] = location.hash.slice(1).split("/");
  return { view: view in VIEWS ? view : "training", id: /^\d+$/.test(id ?? "") ? Number(id) : null };
}

function usePlace() {
  const [now, setNow] = useState(place());
  useEffect(() => {
    const moved = () => setNow(place());
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);
  return now;
}

function useTheme() {
  const [theme, setTheme] = useState(localStorage.getItem("aspo.theme") ?? "auto");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const [dark, setDark] = useState(system.matches);
  useEffect(() => {
    const changed = () => setDark(system.matches);
    system.addEventListener("change", changed);
    return () => system.removeEventListener("change", changed);
  }, []);
  document.documentElement.dataset.theme = theme;
  const choose = (name) => {
    localStorage.setItem("aspo.theme", name);
    setTheme(name);
  };
  return [theme, choose, theme === "auto" ? dark : theme === "dark"];
}

function Login({ run }) {
  const field = useRef(null);
  useEffect(() => field.current.focus(), []);
  const enter = (event) => {
    event.preventDefault();
    token.set(field.current.value.trim());
    run.open();
  };
  return html`<main class="shell" id="content"><form class="login" onSubmit=${enter}>
    <h1>Sign in</h1>
    <p>This learner shows its figures to holders of a reader token.</p>
    ${token.get() && run.error && html`<p class="error" role="alert">That token was refused: ${run.error}.</p>`}
    <label class="field wide"><span>Reader token</span><input type="password" ref=${field} required
      autocomplete="current-password" spellcheck="false" /></label>
    <button type="submit">Sign in</button>
    <p class="muted">It is kept in this tab alone, until the tab is closed.</p></form></main>`;
}

function Bar({ run, view, theme, choose }) {
  const { status, state } = run;
  return html`<header class="bar"><a class="skip" href="#content" onClick=${(event) => {
      event.preventDefault();
      document.getElementById("content").focus();
    }}>Skip to content</a>
    <span class="brand">ASPO</span>
    ${status && html`<h1>${printable(status.run)}</h1><span class="tag">${printable(status.phase)}</span>`}
    ${status && html`<span class="progress"><progress aria-label="Steps done" max=${status.steps || 1}
      value=${status.step}></progress><span>${count(status.step)} / ${count(status.steps)}</span></span>`}
    <span class="push"></span>
    <span class=${`link ${state}`} role="status"><i aria-hidden="true"></i>${STATES[state]}</span>
    <label class="theme"><span class="vh">Colours</span><select value=${theme}
      onChange=${(event) => choose(event.target.value)}>${Object.entries(THEMES).map(([key, label]) => html`
        <option key=${key} value=${key}>${label}</option>`)}</select></label>
    ${token.get() && state !== "refused" && html`<button type="button" onClick=${() => {
      token.clear();
      run.close();
    }}>Sign out</button>`}
    ${state !== "refused" && html`<nav aria-label="Views">${Object.entries(VIEWS).map(([key, label]) => html`
      <a key=${key} href=${`#${key}`} aria-current=${view === key ? "page" : undefined}>${label}</a>`)}</nav>`}
  </header>`;
}

function Figures({ status }) {
  const m = status.metrics;
  const rate = status.actors.reduce((total, actor) => total + actor.tokens_per_second, 0);
  const cells = [
    ["reward", number(m.reward), "last batch"],
    ["accuracy", number(status.accuracy_after ?? status.accuracy), `held-out; was ${number(status.accuracy_before)}`],
    ["entropy", number(m.entropy), "nats per token"],
    ["KL", number(m.approx_kl_k3), "nats per token, k3"],
    ["clipped, A > 0", percent(m.clip_fraction_pos), `A < 0: ${percent(m.clip_fraction_neg)}`],
    ["staleness", number(m.staleness_mean), `versions, at most ${number(m.staleness_max)}`],
    ["learner idle", percent(status.idle_fraction), `last wait ${seconds(m.wait_seconds)}`],
    ["sampling", `${count(rate)}`, `tokens/s, ${count(status.actors.length)} actor${status.actors.length === 1 ? "" : "s"}`],
    ["live", version(status.live), status.held ? "held" : status.trial ? "one on trial" : `newest ${version(status.version)}`],
    ["running for", seconds(status.uptime_seconds), `${count(status.tokens)} tokens`],
  ];
  return html`<section aria-label="Latest figures"><dl class="figures">${cells.map(([name, value, note]) => html`
    <div key=${name}><dt>${name}</dt><dd>${value}</dd><dd class="muted">${note}</dd></div>`)}</dl></section>`;
}

function Ranges({ run }) {
  const { range, curves } = run;
  const zoomed = range.kind === "between";
  return html`<div class="ranges"><h2>Curves</h2>
    <div class="choice" role="group" aria-label="Steps shown">${RANGES.map(([label, one]) => html`<button type="button"
      key=${label} aria-pressed=${range.kind === one.kind && range.count === one.count}
      onClick=${() => run.show(one)}>${label === "All" ? "All" : `Last ${label}`}</button>`)}
      ${zoomed && html`<button type="button" aria-pressed="true" onClick=${() => run.show({ kind: "all" })}>
        Steps ${count(range.first + 1)}–${count(range.last)} ✕</button>`}</div>
    <p class="muted">${curves.stride > 1 ? `Each point is the mean of ${curves.stride} steps. ` : ""}Drag over a curve to
      look closer.</p></div>`;
}

function Training({ run, dark }) {
  const { status, curves, loaded } = run;
  const zoom = (from, to) => {
    const { columns, first, stride } = run.curves;
    const index = (step) => columns.step.findIndex((one) => one >= step);
    const [a, b] = [index(from), index(to)];
    if (a < 0) return;
    const last = b < 0 ? run.curves.last : first + (b + 1) * stride;
    run.show({ kind: "between", first: first + a * stride, last: Math.max(last, first + a * stride + 2) });
  };
  if (loaded && curves.columns.step.length === 0) {
    return html`<${Figures} status=${status} /><section class="welcome"><h2>No step has been trained yet</h2>
      <p>The learner is <b>${printable(status.phase)}</b>. The curves begin with the first batch.</p>
      ${status.actors.length === 0 && html`<p>No actor is alive. Start one with <code>aspo actor --config FILE</code>.</p>`}
    </section>`;
  }
  const theme = dark ? "dark" : "light";
  return html`<${Figures} status=${status} /><section aria-label="Curves"><${Ranges} run=${run} />
    <div class="charts">${CHARTS.map((chart) => html`<${chart.bars ? Bars : Chart} key=${chart.title} chart=${chart}
      columns=${curves.columns} theme=${theme} onZoom=${zoom} />`)}</div></section>`;
}

function Unreachable({ run }) {
  return html`<main class="shell" id="content" tabindex="-1"><section class="welcome"><h1>${run.state === "lost"
    ? "The learner does not answer" : "Connecting to the learner…"}</h1>
    ${run.state === "lost" && html`<p>It may be starting, or have ended. This page tries again by itself.</p>
      ${run.error && html`<p class="muted">${run.error}</p>`}`}</section></main>`;
}

function App({ run }) {
  const [, again] = useReducer((n) => n + 1, 0);
  const { view, id } = usePlace();
  const [theme, choose, dark] = useTheme();
  const [filter, setFilter] = useState(NO_FILTER);
  const [mode, setMode] = useState("difference");
  useEffect(() => {
    run.addEventListener("change", again);
    run.open();
    return () => run.removeEventListener("change", again);
  }, []);
  const { status, state } = run;
  useEffect(() => {
    document.title = status ? `${printable(status.run)}: ${VIEWS[view]} – ASPO` : "ASPO";
  }, [status?.run, view]);

  const bar = html`<${Bar} run=${run} view=${view} theme=${theme} choose=${choose} />`;
  if (state === "refused") return html`${bar}<${Login} run=${run} />`;
  if (!status) return html`${bar}<${Unreachable} run=${run} />`;
  const actors = [...new Set(status.actors.map((actor) => actor.id))];
  return html`${bar}
    ${state === "lost" && html`<p class="note warn" role="alert">The learner does not answer; these are its last words.
      This page tries again by itself.</p>`}
    ${status.trouble && html`<p class="note warn" role="alert">${printable(status.trouble)}</p>`}
    <main class="shell" id="content" tabindex="-1">
      ${view === "training" && html`<${Training} run=${run} dark=${dark} />`}
      ${view === "fleet" && html`<${Fleet} status=${status} />`}
      ${view === "rollouts" && html`<${Rollouts} id=${id} step=${status.step} actors=${actors} filter=${filter}
        onFilter=${setFilter} mode=${mode} onMode=${setMode} />`}
    </main>`;
}

const app = document.getElementById("app");
app.replaceChildren();
render(html`<${App} run=${new Run()} />`, app);
