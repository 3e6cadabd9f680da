// How things are written. What strangers wrote goes through `printable`, wherever it is shown.

const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu;

// Show what could move a cursor, hide or reorder what is read; `keep` is let through.
export function printable(text, { limit = 500, keep = "" } = {}) {
  const whole = String(text ?? "");
  const cut = whole.length <= limit ? whole : `${whole.slice(0, limit)}…`;
  return cut.replace(HIDDEN, (c) => {
    if (keep.includes(c)) return c;
    const names = { "\n": "\\n", "\t": "\\t", "\r": "\\r" };
    return names[c] ?? `\\u{${c.codePointAt(0).toString(16)}}`;
  });
}

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export function count(value) {
  return value == null ? "–" : plain.format(value);
}

// About four significant digits, without a needless exponent.
export function number(value) {
  if (value == null || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  if (Number.isInteger(value)) return plain.format(value);
  return value.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : 3);
}

// The same for an axis, whose ticks are round.
export function tick(value) {
  return Math.abs(value) >= 1e6 ? value.toExponential(1) : String(Number(value.toPrecision(6)));
}

export function signed(value) {
  if (value == null) return "–";
  return `${value > 0 ? "+" : value < 0 ? "−" : ""}${number(Math.abs(value))}`;
}

export function percent(value) {
  return value == null ? "–" : `${(100 * value).toFixed(value !== 0 && Math.abs(value) < 0.1 ? 1 : 0)} %`;
}

export function bytes(value) {
  if (value == null) return "–";
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (value >= size) return `${(value / size).toFixed(value >= 100 * size ? 0 : 1)} ${unit}`;
  }
  return `${value} B`;
}

export function seconds(value) {
  if (value == null) return "–";
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 120) return `${value.toFixed(value < 10 ? 1 : 0)} s`;
  const minutes = Math.floor(value / 60);
  return minutes < 120 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// `run/epoch/step` without the run, which every version here has in common.
export function version(text) {
  return text ? printable(text).replace(/^.*\/(\d+\/\d+)$/, "$1") : "–";
}

export function stepOf(text) {
  const found = /\/(\d+)$/.exec(text ?? "");
  return found ? Number(found[1]) : null;
}
