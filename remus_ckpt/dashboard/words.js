// Figures in words.

export const number = (value) => typeof value === "number" && Number.isFinite(value);

export const count = (value) => Math.round(value).toLocaleString("en-US");

export const percent = (value) => `${(value * 100).toFixed(1)}%`;

export function milliseconds(value) {
  return `${value < 10 ? value.toFixed(2) : value < 100 ? value.toFixed(1) : count(value)} ms`;
}

export function bytes(value) {
  let unit = "B";
  for (const bigger of ["KiB", "MiB", "GiB", "TiB"]) {
    if (value < 1024) break;
    value /= 1024;
    unit = bigger;
  }
  return unit === "B" ? `${Math.round(value)} B` : `${value.toFixed(1)} ${unit}`;
}

export const memory = bytes;

export const rate = (value) => `${bytes(value)}/s`;

export function ago(seconds) {
  if (seconds < 2) return "just now";
  if (seconds < 120) return `${Math.round(seconds)} s ago`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86400)} days ago`;
}

// seconds: Unix time. The day too, unless it is today's.
export function clock(seconds) {
  const time = new Date(seconds * 1000);
  const pad = (value) => String(value).padStart(2, "0");
  const day = `${time.getFullYear()}-${pad(time.getMonth() + 1)}-${pad(time.getDate())} `;
  const isToday = time.toDateString() === new Date().toDateString();
  return `${isToday ? "" : day}${pad(time.getHours())}:${pad(time.getMinutes())}:${pad(time.getSeconds())}`;
}
