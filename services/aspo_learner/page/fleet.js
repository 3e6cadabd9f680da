// Who samples with what: actors, versions of the weights, and what could not be used.

import { html, useEffect, useState } from "./vendor/preact.js";
import { get } from "./source.js";
import { bytes, count, percent, printable, seconds, stepOf, version } from "./text.js";

const UNTRAINED = { stale: "too stale", duplicate: "seen twice", uninformative: "nothing to learn from" };
const MOST = 200; // rows

// Ask again when `key` has changed, but not more often than every two seconds.
function useAsked(path, key) {
  const [found, setFound] = useState({ data: null, error: null });
  useEffect(() => {
    let late = false;
    const timer = setTimeout(async () => {
      try {
        const data = await get(path);
        if (!late) setFound({ data, error: null });
      } catch (error) {
        if (!late) setFound((old) => ({ ...old, error: error.message }));
      }
    }, found.data ? 2000 : 0);
    return () => {
      late = true;
      clearTimeout(timer);
    };
  }, [path, key]);
  return found;
}

function Panel({ title, note, children }) {
  const id = `panel-${title.replace(/\W+/g, "-").toLowerCase()}`;
  return html`<section class="panel" aria-labelledby=${id}>
    <h2 id=${id}>${title}${note && html` <span class="muted">${note}</span>`}</h2>${children}</section>`;
}

// The columns named in `text` are read from the left, the others are numbers.
function Grid({ label, head, rows, text = [] }) {
  return html`<div class="scroll" tabindex="0" role="region" aria-label=${label}><table class="grid">
    <caption class="vh">${label}</caption>
    <thead><tr>${head.map((name) => html`<th scope="col" class=${text.includes(name) ? "text" : ""}>${name}</th>`)}</tr></thead>
    <tbody>${rows.map(([key, first, ...cells]) => html`<tr key=${key}><th scope="row">${first}</th>
      ${cells.map((cell, i) => html`<td class=${text.includes(head[i + 1]) ? "text" : ""}>${cell}</td>`)}</tr>`)}</tbody>
    </table></div>`;
}

function Actors({ status }) {
  const actors = status.actors ?? [];
  const newest = stepOf(status.version);
  if (!actors.length) {
    const lasting = status.without_actors_seconds;
    return html`<${Panel} title="Actors"><p class="none">${status.trouble
      ? "The learner cannot ask Redis which actors are alive."
      : `No actor is alive${lasting == null ? "" : `, for ${seconds(lasting)} now`}.`}
      ${" "}Start one with <code>aspo actor --config FILE</code>.</p></${Panel}>`;
  }
  const rows = actors.slice(0, MOST).map((actor) => {
    const runs = stepOf(actor.version);
    return [actor.id, printable(actor.id), printable(actor.state).replace(/\S+\/(\d+\/\d+)/, "$1"),
      version(actor.version), newest == null || runs == null ? "–" : count(newest - runs),
      count(actor.tokens_per_second), count(actor.groups), count(actor.groups_in_flight),
      printable(actor.weight_plan) || "–", `${count(actor.weight_syncs)} (${count(actor.weight_patches)})`,
      bytes(actor.weight_bytes), bytes(actor.weight_bytes_from_peers), seconds(actor.weight_pull_seconds),
      seconds(actor.weight_pause_seconds), count(actor.weight_retries + actor.weight_repairs),
      count(actor.reward_failures)];
  });
  const note = `${count(actors.length)} alive${actors.length > MOST ? `, the first ${MOST} shown` : ""}`;
  return html`<${Panel} title="Actors" note=${note}><${Grid} label="Actors alive" rows=${rows} text=${["state", "plan"]} head=${[
    "actor", "state", "version", "behind", "tokens/s", "groups", "in flight", "plan", "syncs (patches)", "fetched",
    "from peers", "pull", "pause", "retries", "reward failures"]} /></${Panel}>`;
}

function Weights({ status }) {
  const key = `${status.version} ${status.live} ${status.held}`;
  const { data, error } = useAsked("v1/weights", key);
  if (!data) return html`<${Panel} title="Weights"><p class="none">${error ?? "Loading…"}</p></${Panel}>`;
  const rows = [...data.versions].reverse().slice(0, MOST).map((one) => {
    const ways = Object.entries(one.transfers).map(([base, size]) => html`<div>${base === "snapshot"
      ? "snapshot" : `delta from ${version(base)}`} <span class="muted">${bytes(size)}</span></div>`);
    const trial = status.trial?.version === one.version ? `on trial with ${printable(status.trial.canary)}` : "";
    const state = one.live ? (data.held ? "live, held" : "live") : trial;
    return [one.version, html`${version(one.version)} ${state && html`<span class="tag">${state}</span>`}`, ways,
      one.changed_fraction == null ? "–" : percent(one.changed_fraction), count(one.running.length),
      printable(one.running.slice(0, 4).join(", ")) + (one.running.length > 4 ? ", …" : ""),
      html`<code>${one.state_digest.slice(0, 10)}</code>`];
  });
  const note = data.held ? "held: later versions wait for a promotion" : `live ${version(data.live)}`;
  return html`<${Panel} title="Weights" note=${note}>${rows.length
    ? html`<${Grid} label="Versions kept, the newest first" rows=${rows}
        text=${["ways to it", "actors and relays", "digest"]}
        head=${["version", "ways to it", "changed", "run by", "actors and relays", "digest"]} />`
    : html`<p class="none">No version is published yet.</p>`}</${Panel}>`;
}

function Quarantine({ status }) {
  const ended = Object.entries(status.ended ?? {});
  const unusable = ended.filter(([reason]) => !(reason in UNTRAINED));
  const total = unusable.reduce((sum, [, value]) => sum + value, 0);
  const { data, error } = useAsked("v1/quarantine", total);
  const rows = (data?.entries ?? []).map((entry) => [`${entry.at} ${entry.uid}`,
    new Date(entry.at * 1000).toLocaleTimeString(), printable(entry.actor), printable(entry.reason),
    printable(entry.uid)]);
  return html`<${Panel} title="Quarantine" note="since the learner's start">
    ${error && html`<p class="none">${error}</p>`}
    ${total === 0 ? html`<p class="none">Every rollout that came could be used.</p>` : html`
      <p>${unusable.map(([reason, value]) => html`<span class="tag warn">${printable(reason)} ${count(value)}</span> `)}</p>
      <${Grid} label="Rollouts set aside, the newest first" rows=${rows} text=${["actor", "reason", "task"]}
        head=${["at", "actor", "reason", "task"]} />
      <p class="muted">All of them: <code>aspo quarantine ls -c FILE</code></p>`}
  </${Panel}>`;
}

function Ended({ status }) {
  const metrics = status.metrics ?? {};
  const rows = [
    ["tasks", "Tasks waiting or worked on", count(metrics.queue_tasks)],
    ["groups", "Groups stored, not yet acknowledged", count(metrics.queue_rollouts)],
    ...Object.entries(UNTRAINED).map(([reason, label]) => [
      reason, `Groups not trained on: ${label}`, count(status.ended?.[reason] ?? 0)]),
    ["idle", "Learner idle", percent(status.idle_fraction)],
    ["losses", "Times that Redis had lost data", count(status.redis_losses)],
    ["trials", "Canary trials passed, withdrawn",
      `${count(status.trials?.promoted ?? 0)}, ${count(status.trials?.withdrawn ?? 0)}`],
  ];
  return html`<${Panel} title="Queue"><table class="pairs"><caption class="vh">Queue and what ended untrained</caption>
    <tbody>${rows.map(([key, label, value]) => html`<tr key=${key}><th scope="row">${label}</th><td>${value}</td></tr>`)}
    </tbody></table></${Panel}>`;
}

export function Fleet({ status }) {
  return html`<div class="stack"><${Actors} status=${status} /><${Weights} status=${status} />
    <div class="two"><${Ended} status=${status} /><${Quarantine} status=${status} /></div></div>`;
}
