// The page draws what /events says. For the list it keeps the last minutes of two figures of each name, and for the one
// name that is open, all figures. Anything from a name, a primary or a log line is inserted as text, never as HTML.

import { drawHeat, drawKept, drawLine, drawPlot, HEAT_PARTS, theme } from "./draw.js";
import { ago, bytes, clock, count, memory, milliseconds, number, percent, rate } from "./words.js";

const by = (id) => document.getElementById(id);
const sources = new Map(); // number → {label, report, health, at}
const rows = new Map(); // key → row of the list
let hello = null; // what the server is, and the columns of its figures
let open = null; // the name whose detail is shown: {source, name, figures, heat, changed, history}
let lostAt = null; // since when the server does not answer

const PLOTS = [
  ["Pause", ["pause_ms", "pause_p99_ms"], milliseconds, ["p50", "p99"]],
  ["Commit latency", ["commit_ms", "commit_p99_ms"], milliseconds, ["p50", "p99"]],
  ["Dirty pages of a checkpoint", ["dirty_pages"], count],
  ["Ratio, encoded to raw", ["ratio"], percent],
  ["Lag, checkpoints not committed", ["lag"], count],
  ["On the wire", ["wire_bytes_s"], rate, undefined, true],
];

// What is shown of a name: [key, title, value, in words]. The primary's own word comes before the backup's.
const FACTS = [
  ["epoch", "Committed epoch", (f) => f.epoch, count],
  ["last_commit_at", "Last commit", (f) => f.last_commit_at, (v) => ago(Date.now() / 1000 - v)],
  ["lag_checkpoints", "Lag", (f) => f.primary.lag_checkpoints, (v) => `${count(v)} checkpoints`],
  ["pause_ms.p50", "Pause, p50", (f) => f.primary.pause_ms?.p50, milliseconds],
  ["pause_ms.p99", "Pause, p99", (f) => f.primary.pause_ms?.p99, milliseconds],
  ["commit_latency_ms.p50", "Commit, p50", (f) => commitOf(f)?.p50, milliseconds],
  ["commit_latency_ms.p99", "Commit, p99", (f) => commitOf(f)?.p99, milliseconds],
  ["dirty_pages", "Dirty pages", (f) => f.primary.dirty_pages, count],
  ["ratio", "Ratio", (f) => f.ratio, percent],
  ["raw_bytes", "Pages, raw", (f) => f.raw_bytes, bytes],
  ["encoded_bytes", "Encoded", (f) => f.encoded_bytes, bytes],
  ["wire_bytes", "On the wire", (f) => f.wire_bytes, bytes],
  ["memory_bytes", "Memory", (f) => f.memory_bytes, bytes],
  ["term", "Term", (f) => f.term, count],
  ["reconnects", "Reconnects", (f) => f.primary.reconnects, count],
  ["tracking", "Changed pages found by", (f) => f.primary.tracking, String],
  ["peer", "Primary", (f) => f.peer, String],
  ["takeover", "Takeover command", (f) => f.takeover, String],
  ["fence", "Fence command", (f) => f.fence, String],
  ["image", "Memory handed out", (f) => f.image, String],
  ["vm", "Guest", (f) => f.vm, String],
];

const commitOf = (found) => found.primary.commit_latency_ms ?? found.commit_latency_ms;

function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// The list

const keyOf = (source, name) => `${source}/${name}`;

function makeRow(source, name) {
  const key = keyOf(source, name);
  const link = make("a", { href: `#${encodeURI(key)}` }, name);
  const place = make("span", { class: "place" });
  const state = make("span", { class: "state" });
  const cell = (label, ...more) =>
    make("td", { role: "cell", class: "number", "data-label": label }, make("span"), ...more);
  const spark = () => make("canvas", { "aria-hidden": "true", class: "wide" });
  const row = {
    source, name, link, place, state, isSeen: true, isGone: false, health: null,
    cells: {
      epoch: cell("epoch"), lag: cell("lag"), pause: cell("pause"),
      commit: cell("commit", spark()), wire: cell("wire", spark()),
    },
    figures: { commit_ms: [], wire_bytes_s: [] },
  };
  row.tr = make("tr", { role: "row", "data-key": key },
    make("td", { role: "cell" }, link, place, state), ...Object.values(row.cells));
  row.tr.row = row;
  watching.observe(row.tr);
  rows.set(key, row);
  return row;
}

const watching = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    entry.target.row.isSeen = entry.isIntersecting;
    if (entry.isIntersecting) drawRow(entry.target.row);
  }
});

function drawRow(row) {
  if (!row.isSeen || document.hidden) return;
  drawLine(row.cells.commit.querySelector("canvas"), row.figures.commit_ms, hello.kept);
  drawLine(row.cells.wire.querySelector("canvas"), row.figures.wire_bytes_s, hello.kept);
}

function setCell(cell, value, words) {
  put(cell.firstChild, number(value) ? words(value) : "–");
  if (number(value)) cell.dataset.value = value;
  else delete cell.dataset.value;
}

function setHealth(element, health) {
  const level = `level${health.level}`;
  for (const other of ["level0", "level1", "level2", "level3"]) element.classList.toggle(other, other === level);
}

function push(list, value) {
  list.push(number(value) ? value : null);
  if (list.length > hello.kept) list.splice(0, list.length - hello.kept);
}

function figure(figures, column) {
  return figures ? figures[hello.columns.indexOf(column)] : null;
}

function take(message) {
  const source = { ...sources.get(message.source), label: message.label, at: message.at, health: message.health };
  if (message.report) source.report = message.report;
  source.isSilent = !message.report;
  sources.set(message.source, source);
  const names = source.report?.names ?? {};
  let isNew = false;
  for (const [name, found] of Object.entries(names)) {
    let row = rows.get(keyOf(message.source, name));
    if (!row) {
      row = makeRow(message.source, name);
      isNew = true;
    }
    const health = source.isSilent ? message.health : found.health;
    if (row.health?.level !== health.level) isNew = true;
    row.health = health;
    const figures = message.figures?.[name];
    for (const [column, list] of Object.entries(row.figures)) push(list, figure(figures, column));
    put(row.place, sources.size > 1 ? source.label : "");
    put(row.state, health.state);
    setHealth(row.state, health);
    row.tr.classList.toggle("stale", source.isSilent);
    setCell(row.cells.epoch, found.epoch, count);
    setCell(row.cells.lag, found.primary.lag_checkpoints, count);
    setCell(row.cells.pause, found.primary.pause_ms?.p50, milliseconds);
    setCell(row.cells.commit, commitOf(found)?.p50, milliseconds);
    setCell(row.cells.wire, figure(figures, "wire_bytes_s"), rate);
    drawRow(row);
    if (open && open.source === message.source && open.name === name) {
      takeOpen(found, figures);
      showOpen();
    }
  }
  for (const [key, row] of rows) {
    if (row.source === message.source && !(row.name in names)) {
      watching.unobserve(row.tr);
      row.tr.remove();
      rows.delete(key);
    }
  }
  if (isNew) sort();
  summarize();
}

function sort() {
  const wanted = [...rows.values()].sort((a, b) =>
    b.health.level - a.health.level || (a.name < b.name ? -1 : a.name > b.name ? 1 : a.source - b.source));
  const focused = document.activeElement;
  wanted.forEach((row, index) => {
    const there = by("rows").children[index];
    if (there !== row.tr) by("rows").insertBefore(row.tr, there ?? null);
  });
  if (focused !== document.activeElement && focused?.isConnected) focused.focus();
  filter();
}

function filter() {
  const wanted = by("find").value.trim().toLowerCase();
  for (const row of rows.values()) {
    row.tr.hidden = !`${row.name} ${row.health?.state}`.toLowerCase().includes(wanted);
  }
}

function summarize() {
  const states = new Map();
  for (const row of rows.values()) {
    const { state, level } = row.health;
    states.set(state, { level, many: (states.get(state)?.many ?? 0) + 1 });
  }
  const parts = [...states].sort((a, b) => b[1].level - a[1].level).map(([state, { many }]) => `${many} ${state}`);
  put(by("overall"), parts.length ? parts.join(", ") : "no names");
  document.title = `${states.size && [...states.values()].some(({ level }) => level > 1) ? "! " : ""}remus-ckpt`;
  // What concerns a backup rather than one of its names.
  const notices = [];
  for (const { label, health, report, isSilent } of sources.values()) {
    const said = Object.values(report?.names ?? {}).map((found) => found.health.state);
    if (isSilent || !said.includes(health.state)) notices.push([label, health]);
  }
  const list = by("notices");
  const text = JSON.stringify(notices.filter(([, health]) => health.level));
  if (list.dataset.text === text) return;
  list.dataset.text = text;
  list.replaceChildren(...notices.filter(([, health]) => health.level).map(([label, health]) => {
    const item = make("li", { class: "state" }, `${label ? `${label}: ` : ""}${health.words}. ${health.next}`);
    setHealth(item, health);
    return item;
  }));
}

// The detail of one name

function takeOpen(found, figures) {
  hello.columns.forEach((column) => push(open.figures[column], figure(figures, column)));
  const changed = found.changed_by_part;
  const column = new Uint8Array(HEAT_PARTS);
  if (open.changed && changed) {
    // As the server's: sixteenths of a doubling (board.py).
    changed.forEach((value, part) => {
      column[part] = Math.min(255, Math.round(16 * Math.log2(1 + Math.max(value - open.changed[part], 0))));
    });
  }
  if (changed) open.changed = changed;
  open.heat.push(column);
  if (open.heat.length > hello.kept) open.heat.splice(0, open.heat.length - hello.kept);
}

function showOpen() {
  const source = sources.get(open.source);
  const found = source?.report?.names[open.name];
  if (!found) return;
  const health = source.isSilent ? source.health : found.health;
  put(by("words"), health.words);
  setHealth(by("words"), health);
  put(by("next"), health.next ? `What to do: ${health.next}` : "");
  by("take-over").hidden = !(hello.may_fail_over && found.role === "standby" && number(found.epoch));
  by("detail").classList.toggle("stale", source.isSilent || lostAt !== null);
  for (const [key, title, valueOf, words] of FACTS) {
    let item = by("facts").querySelector(`[data-key="${key}"]`);
    const value = valueOf(found);
    const isThere = words === String ? typeof value === "string" && value !== "" : number(value);
    if (!item) {
      item = make("dd", { "data-key": key });
      by("facts").append(make("div", {}, make("dt", {}, title), item));
    }
    item.parentElement.hidden = !isThere;
    put(item, isThere ? words(value) : "");
    if (isThere) item.dataset.value = value;
    else delete item.dataset.value;
  }
  if (document.hidden) return;
  for (const plot of open.plots) {
    const words = drawPlot(plot.canvas, plot.columns.map((column) => open.figures[column]), hello, plot);
    put(plot.value, words);
    plot.canvas.setAttribute("aria-label", `${plot.title}: ${words}`);
  }
  put(by("heat-words"), drawHeat(by("heat"), open.heat, hello.kept, found.memory_bytes, memory));
}

// An answer of the server; with `error` in it if there is none.
async function fetchJson(path, options) {
  try {
    // Not relative to the page: if its address has the password in it, a relative address cannot be fetched.
    const answer = await fetch(new URL(path, location.href), options);
    return await answer.json().catch(() => ({ error: `the server answers ${answer.status}` }));
  } catch (error) {
    return { error: String(error) };
  }
}

async function openName(source, name) {
  const mine = { source, name, figures: {}, heat: [], changed: null, history: null, plots: [] };
  const query = `source=${source}&name=${encodeURIComponent(name)}`;
  const past = await fetchJson(`past?${query}`);
  hello.columns.forEach((column, index) => (mine.figures[column] = past.figures?.[index] ?? []));
  const heat = Uint8Array.from(atob(past.heat ?? ""), (letter) => letter.charCodeAt(0));
  for (let at = 0; at < heat.length; at += HEAT_PARTS) mine.heat.push(heat.subarray(at, at + HEAT_PARTS));
  if (location.hash.slice(1) !== encodeURI(keyOf(source, name))) return;
  const isSame = open?.source === source && open?.name === name;
  open = mine;
  document.body.classList.add("opened");
  by("detail").hidden = false;
  put(by("detail-name"), name);
  by("facts").replaceChildren();
  by("plots").replaceChildren();
  for (const [title, columns, words, labels, isBytes] of PLOTS) {
    const canvas = make("canvas", { role: "img" });
    const value = make("span", { class: "value" });
    by("plots").append(make("figure", {}, make("figcaption", {}, make("span", {}, title), value), canvas));
    const plot = { title, columns, words, labels, isBytes, canvas, value, at: null };
    canvas.addEventListener("pointermove", (event) => {
      plot.at = event.offsetX / canvas.clientWidth;
      showOpen();
    });
    canvas.addEventListener("pointerleave", () => {
      plot.at = null;
      showOpen();
    });
    mine.plots.push(plot);
  }
  for (const row of rows.values()) row.tr.classList.toggle("open", row.source === source && row.name === name);
  showOpen();
  if (!isSame) by("detail-name").focus();
  await refresh();
}

async function refresh() {
  const mine = open;
  if (!mine || lostAt !== null || document.hidden) return;
  const found = await fetchJson(`detail?source=${mine.source}&name=${encodeURIComponent(mine.name)}`);
  if (open !== mine) return;
  mine.history = found.history ?? { error: found.error ?? "nothing is known of it" };
  showHistory();
  by("events").replaceChildren(...(found.events ?? []).map((event) => make("li", {},
    make("time", { datetime: new Date(event.at * 1000).toISOString() }, clock(event.at)),
    make("span", { class: `level${event.level}` }, event.text))));
  if (!found.events?.length) by("events").replaceChildren(make("li", {}, "none yet"));
}

function showHistory() {
  const { error, kept = [], lost = [] } = open.history;
  by("history").hidden = Boolean(error) || !kept.length;
  by("no-history").hidden = !by("history").hidden;
  put(by("no-history"), error ?? "No checkpoint is kept yet.");
  if (by("history").hidden) return;
  drawKept(by("kept"), kept, lost);
  const first = Math.min(...kept.map((one) => one[0]));
  const last = Math.max(...kept.map((one) => one[1]));
  const pick = by("pick");
  const wasLast = pick.value === pick.max || pick.dataset.key !== keyOf(open.source, open.name);
  pick.dataset.key = keyOf(open.source, open.name);
  [pick.min, pick.max] = [first, last];
  if (wasLast) pick.value = last;
  put(by("oldest"), kept[0][2] === null ? count(first) : clock(kept[0][2]));
  put(by("newest"), kept.at(-1)[3] === null ? count(last) : clock(kept.at(-1)[3]));
  showPicked();
  const items = spans(kept).map(([from, to, at, until]) => make("li", {},
    `${from === to ? `checkpoint ${count(from)}` : `checkpoints ${count(from)} to ${count(to)}`}` +
      (at === null || until === null ? "" : `, taken ${clock(at)} to ${clock(until)}`)));
  items.push(...lost.map(([from, to, reason]) => make("li", { class: "lost" },
    `lost: ${from === null ? "" : `checkpoints ${count(from)} to ${count(to)}: `}${reason}`)));
  by("ranges").replaceChildren(...items);
}

// Segments that follow one another without a gap, as one.
function spans(kept) {
  const found = [];
  for (const [from, to, at, until] of [...kept].sort((a, b) => a[0] - b[0])) {
    const before = found.at(-1);
    if (before && from <= before[1] + 1) {
      if (to > before[1]) [before[1], before[3]] = [to, until];
    } else found.push([from, to, at, until]);
  }
  return found;
}

function showPicked() {
  const { kept, where } = open.history;
  const wanted = Number(by("pick").value);
  const found = kept.filter((one) => one[0] <= wanted).reduce((a, b) => (Math.min(b[1], wanted) >= Math.min(a[1], wanted) ? b : a));
  const epoch = Math.min(found[1], wanted);
  const [from, to, at, until] = found;
  const time = at === null || until === null ? null : to === from ? at : at + ((until - at) * (epoch - from)) / (to - from);
  const words = `Checkpoint ${count(epoch)}${time === null ? "" : `, taken about ${clock(time)}`}`;
  by("pick").setAttribute("aria-valuetext", words);
  by("picked").replaceChildren(`${words}: `, make("code", {}, `remus-ckpt restore ${where} --at ${epoch} -o memory.img`));
}

function closeName() {
  open = null;
  document.body.classList.remove("opened");
  by("detail").hidden = true;
  for (const row of rows.values()) row.tr.classList.remove("open");
}

function route() {
  if (!hello) return;
  const before = open;
  const [source, name] = decodeURI(location.hash.slice(1)).split("/", 2);
  if (name && sources.has(Number(source))) openName(Number(source), name);
  else {
    closeName();
    if (before) rows.get(keyOf(before.source, before.name))?.link.focus();
  }
}

// Failover by hand

by("take-over").addEventListener("click", () => {
  const found = sources.get(open.source).report.names[open.name];
  put(by("confirm-title"), `Fail over ${open.name}?`);
  put(by("confirm-words"), `The backup is promoted and continues from epoch ${count(found.epoch)}, the newest ` +
    "committed one. From then on it refuses the old primary. This cannot be undone.");
  put(by("confirm-fault"), "");
  by("fence-choice").hidden = found.fence === null || found.fence === undefined;
  for (const choice of document.querySelectorAll("[name=how]")) choice.checked = false;
  by("confirm-go").disabled = true;
  by("confirm").showModal();
});

for (const choice of document.querySelectorAll("[name=how]")) {
  choice.addEventListener("change", () => (by("confirm-go").disabled = false));
}

by("confirm-go").addEventListener("click", async () => {
  const fence = document.querySelector("[name=how]:checked").value === "fence";
  by("confirm-go").disabled = true;
  put(by("confirm-fault"), "");
  const done = await fetchJson("failover", {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Remus-Ckpt": "failover" },
    body: JSON.stringify({ source: open.source, name: open.name, fence }),
  });
  by("confirm-go").disabled = false;
  if (done.error) put(by("confirm-fault"), done.error);
  else by("confirm").close();
});

// The server

async function fetchPast() {
  const past = await fetchJson("past");
  for (const [key, figures] of Object.entries(past.names ?? {})) {
    const row = rows.get(key);
    if (row) for (const [column, list] of Object.entries(figures)) row.figures[column] = list;
  }
}

function connect() {
  const events = new EventSource("events");
  events.addEventListener("hello", async (event) => {
    hello = JSON.parse(event.data);
    by("faults").replaceChildren();
    lostAt = null;
  });
  events.addEventListener("whole", async () => {
    // All sources have been reported once.
    await fetchPast();
    for (const row of rows.values()) drawRow(row);
    route();
  });
  events.addEventListener("message", (event) => take(JSON.parse(event.data)));
  events.addEventListener("error", () => {
    if (lostAt === null) {
      lostAt = Date.now() / 1000;
      const words = `This page's server has not answered since ${clock(lostAt)}. The figures are from before; ` +
        "the page keeps trying.";
      by("faults").replaceChildren(make("p", {}, words));
      for (const row of rows.values()) row.tr.classList.add("stale");
      by("detail").classList.add("stale");
    }
    if (events.readyState === EventSource.CLOSED) {
      events.close();
      setTimeout(connect, 2000);
    }
  });
}

addEventListener("hashchange", route);
addEventListener("resize", () => {
  for (const row of rows.values()) drawRow(row);
  if (open) showOpen();
  if (open?.history) showHistory();
});
addEventListener("keydown", (event) => {
  if (by("confirm").open) return;
  if (event.key === "/" && event.target !== by("find")) {
    event.preventDefault();
    by("find").focus();
  } else if (event.key === "Escape" && open) location.hash = "";
  else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && event.target.closest?.("#rows")) {
    event.preventDefault();
    const links = [...by("rows").querySelectorAll("tr:not([hidden]) a")];
    links[links.indexOf(event.target) + (event.key === "ArrowDown" ? 1 : -1)]?.focus();
  }
});
by("find").addEventListener("input", filter);
by("pick").addEventListener("input", showPicked);
document.addEventListener("visibilitychange", () => {
  for (const row of rows.values()) drawRow(row);
  if (open) showOpen();
});
theme(() => {
  for (const row of rows.values()) drawRow(row);
  if (open) showOpen();
  if (open?.history) showHistory();
});
setInterval(refresh, 5000);
connect();
