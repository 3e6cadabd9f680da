// The curves: which there are, and how one is drawn. Every chart has a table for who cannot see it.

import { html, useEffect, useLayoutEffect, useRef, useState } from "./vendor/preact.js";
import { number, percent, tick } from "./text.js";

const line = (name, label, more = {}) => ({ name, label, ...more });

export const CHARTS = [
  { title: "Reward and accuracy", unit: "mean reward", series: [
    line("reward", "sampled, T = 1"), line("accuracy", "held-out, avg@k", { stepped: true })] },
  { title: "Entropy", unit: "nats per token", series: [line("entropy", "policy")] },
  { title: "KL", unit: "nats per token", series: [
    line("approx_kl_k3", "ratio's denominator, k3"), line("mismatch_k3", "sampler, k3"),
    line("kl_reference", "initial policy")] },
  { title: "Importance ratio r", unit: "by quantile and sign", series: [
    line("ratio_p99", "99 %", { dash: [2, 3] }), line("ratio_mean_pos", "mean, A > 0"),
    line("ratio_mean_neg", "mean, A < 0"), line("ratio_p01", "1 %", { dash: [2, 3] })] },
  { title: "Clipped tokens", unit: "share, by sign of A", format: percent, series: [
    line("clip_fraction_pos", "hard, A > 0"), line("clip_fraction_neg", "hard, A < 0"),
    line("dual_clip_fraction_pos", "dual, A > 0", { dash: [5, 3] }),
    line("dual_clip_fraction_neg", "dual, A < 0", { dash: [5, 3] })] },
  { title: "Token weight", unit: "k·w, by sign of A", series: [
    line("weight_mean_pos", "A > 0"), line("weight_mean_neg", "A < 0"),
    line("ess_fraction", "effective sample share", { dash: [5, 3] })] },
  { title: "Staleness", unit: "versions", series: [
    line("staleness_mean", "mean"), line("staleness_max", "max", { dash: [2, 3] })] },
  { title: "Staleness of groups", unit: "share of the steps shown", bars: "staleness_groups", series: [] },
  { title: "Queue", unit: "in Redis", series: [
    line("queue_tasks", "tasks"), line("queue_rollouts", "rollout groups")] },
  { title: "Time of a step", unit: "seconds", series: [
    line("wait_seconds", "idle: waiting"), line("train_seconds", "training"),
    line("publish_seconds", "publishing"), line("checkpoint_seconds", "checkpoint", { dash: [2, 3] })] },
  { title: "Response length", unit: "tokens", series: [line("response_length", "mean")] },
  { title: "Gradient norm", unit: "before clipping", series: [
    line("grad_norm", "mean"), line("grad_norm_max", "largest", { dash: [2, 3] })] },
];

export const NAMES = [...new Set(CHARTS.flatMap((chart) => chart.series.map((s) => s.name).concat(chart.bars ?? [])))];
const HEIGHT = 148;
const ROWS = 40;

function colours(figure) {
  const shown = [...figure.querySelectorAll("[data-series]")].map((one) => getComputedStyle(one).color);
  const style = getComputedStyle(figure.querySelector(".axis-ink"));
  return { shown, ink: style.color, grid: style.borderTopColor, font: `11px ${style.fontFamily}` };
}

function options(chart, figure, width, onCursor, onZoom) {
  const { shown, ink, grid, font } = colours(figure);
  const axis = { stroke: ink, font, ticks: { show: false }, grid: { stroke: grid, width: 1 } };
  const label = chart.format ? (value) => `${tick(100 * value)} %` : tick;
  return {
    width, height: HEIGHT, legend: { show: false }, scales: { x: { time: false } }, padding: [8, 8, 0, 0],
    cursor: { sync: { key: "steps" }, points: { size: 5 }, drag: { x: true, y: false, setScale: false } },
    hooks: {
      setCursor: [(plot) => onCursor(plot.cursor.idx)],
      setSelect: [(plot) => {
        const { left, width: wide } = plot.select;
        if (wide > 4) onZoom(plot.posToVal(left, "x"), plot.posToVal(left + wide, "x"));
        plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
      }],
    },
    axes: [
      { ...axis, size: 24, gap: 4, space: 60, values: (_, ticks) => ticks.map((t) => (t % 1 ? "" : t)) },
      { ...axis, size: 52, gap: 6, space: 32, values: (_, ticks) => ticks.map(label) },
    ],
    series: [{}, ...chart.series.map((s, i) => ({
      stroke: shown[i], width: 1.5, dash: s.dash, spanGaps: Boolean(s.stepped),
      paths: s.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined, points: { show: undefined, size: 4 },
    }))],
  };
}

export function Chart({ chart, columns, theme, onZoom }) {
  const figure = useRef(null);
  const place = useRef(null);
  const plot = useRef(null);
  const [at, setAt] = useState(null);
  const steps = columns.step;
  const data = [steps, ...chart.series.map((s) => columns[s.name] ?? new Array(steps.length).fill(null))];
  const there = chart.series.map((s) => columns[s.name]?.some((v) => v != null) ?? false);
  const empty = !there.some(Boolean);

  useLayoutEffect(() => {
    if (empty) return undefined;
    const width = place.current.clientWidth;
    const made = new uPlot(options(chart, figure.current, width, setAt, onZoom), data, place.current);
    plot.current = made;
    const sizes = new ResizeObserver(([entry]) => {
      const wide = Math.floor(entry.contentRect.width);
      if (wide > 0 && wide !== made.width) made.setSize({ width: wide, height: HEIGHT });
    });
    sizes.observe(place.current);
    return () => {
      sizes.disconnect();
      made.destroy();
      plot.current = null;
    };
  }, [theme, empty]);
  useEffect(() => plot.current?.setData(data), [columns]);

  const format = chart.format ?? number;
  const index = at ?? steps.length - 1;
  const shown = (s) => format(at == null ? lastOf(columns[s.name]) : columns[s.name]?.[index]);
  const id = `chart-${chart.title.replace(/\W+/g, "-").toLowerCase()}`;
  return html`<figure class="chart" ref=${figure} aria-labelledby=${id}>
    <figcaption><h3 id=${id}>${chart.title}</h3> <span class="muted">${chart.unit}</span></figcaption>
    <ul class="legend">${chart.series.map((s, i) => html`<li class=${there[i] ? "" : "absent"}>
      <span class=${`key s${i + 1} ${s.dash ? "dashed" : ""}`} data-series=${s.name} aria-hidden="true"></span>
      ${s.label} <b>${shown(s)}</b></li>`)}</ul>
    <span class="axis-ink" aria-hidden="true"></span>
    ${empty ? html`<p class="none">Not measured yet.</p>`
      : html`<div class="plot" ref=${place} aria-hidden="true"></div>`}
    ${!empty && html`<${Table} chart=${chart} columns=${columns} format=${format} />`}
  </figure>`;
}

function lastOf(column) {
  return column?.findLast((value) => value != null);
}

function Table({ chart, columns, format }) {
  const [open, setOpen] = useState(false);
  const length = columns.step.length;
  const rows = open ? Array.from({ length: Math.min(ROWS, length) }, (_, i) => length - 1 - i) : [];
  return html`<details class="data" onToggle=${(event) => setOpen(event.target.open)}>
    <summary>Table<span class="vh"> of ${chart.title}</span></summary>
    ${open && html`<div class="scroll" tabindex="0" role="region" aria-label=${`${chart.title}, last points`}>
      <table><caption class="vh">${chart.title}, ${chart.unit}, the newest first</caption>
      <thead><tr><th scope="col">step</th>${chart.series.map((s) => html`<th scope="col">${s.label}</th>`)}</tr></thead>
      <tbody>${rows.map((i) => html`<tr key=${columns.step[i]}><th scope="row">${number(columns.step[i])}</th>
        ${chart.series.map((s) => html`<td>${format(columns[s.name]?.[i])}</td>`)}</tr>`)}</tbody></table></div>`}
  </details>`;
}

// How the groups of the steps shown lagged: a table whose bars repeat what it says.
export function Bars({ chart, columns }) {
  const names = Object.keys(columns).filter((name) => name.startsWith(`${chart.bars}/`));
  const place = (name) => (name.endsWith("/more") ? Infinity : Number(name.split("/")[1]));
  const counts = names.sort((a, b) => place(a) - place(b)).map((name) => [
    name.split("/")[1], columns[name].reduce((total, value) => total + (value ?? 0), 0)]);
  const total = counts.reduce((sum, [, value]) => sum + value, 0);
  return html`<figure class="chart" aria-labelledby="staleness-histogram">
    <figcaption><h3 id="staleness-histogram">${chart.title}</h3> <span class="muted">${chart.unit}</span></figcaption>
    ${total === 0 ? html`<p class="none">Not measured yet.</p>` : html`<table class="bars">
      <caption class="vh">Share of groups by versions of lag</caption>
      <thead class="vh"><tr><th scope="col">versions late</th><th scope="col">share</th><th></th></tr></thead>
      <tbody>${counts.map(([lag, value]) => html`<tr key=${lag}>
        <th scope="row">${lag === "more" ? "beyond" : lag}</th><td>${percent(value / total)}</td>
        <td class="room" aria-hidden="true"><span style=${{ width: `${(100 * value) / total}%` }}></span></td></tr>`)}
      </tbody></table>`}
  </figure>`;
}
