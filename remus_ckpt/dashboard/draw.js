// Lines, plots, the heat map and the time line, on canvases.

import { number } from "./words.js";

export const HEAT_PARTS = 128;

let colours = {};

// Reads the colours of the style sheet, now and whenever the user's scheme changes; then calls `redraw`.
export function theme(redraw) {
  const read = () => {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["text", "quiet", "line", "panel", "one", "two", "good", "critical"]) {
      colours[name] = style.getPropertyValue(`--${name}`).trim();
    }
  };
  read();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    read();
    redraw();
  });
}

// The context of a canvas at the size at which it is shown; null while it is not shown.
function context(canvas) {
  const scale = devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (!width || !height) return null;
  const [wide, high] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== wide || canvas.height !== high) [canvas.width, canvas.height] = [wide, high];
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  return [pen, width, height];
}

// A line through values, the newest at the right edge; null is a gap.
function stroke(pen, values, kept, most, [left, top, width, height], colour, isFilled) {
  const x = (index) => left + width - ((values.length - 1 - index) / (kept - 1)) * width;
  const y = (value) => top + height - (value / most) * height;
  pen.strokeStyle = pen.fillStyle = colour;
  pen.lineWidth = 1.5;
  pen.lineJoin = "round";
  for (let start = 0; start < values.length; start++) {
    if (!number(values[start])) continue;
    let end = start;
    while (end + 1 < values.length && number(values[end + 1])) end++;
    pen.beginPath();
    pen.moveTo(x(start), y(values[start]));
    if (start === end) pen.lineTo(x(start) + 1, y(values[start]));
    for (let index = start + 1; index <= end; index++) pen.lineTo(x(index), y(values[index]));
    pen.stroke();
    if (isFilled) {
      pen.lineTo(x(end), top + height);
      pen.lineTo(x(start), top + height);
      pen.globalAlpha = 0.14;
      pen.fill();
      pen.globalAlpha = 1;
    }
    start = end;
  }
}

const largest = (values) => values.reduce((most, value) => (number(value) && value > most ? value : most), 0);

export function drawLine(canvas, values, kept) {
  const found = context(canvas);
  if (!found) return;
  const [pen, width, height] = found;
  stroke(pen, values, kept, largest(values) || 1, [0, 2, width, height - 3], colours.one, true);
}

// 1, 2 or 5 times a power of ten, not below the value; of bytes, in the unit that they are said in.
function ceiling(value, isBytes) {
  const unit = isBytes && value >= 1 ? 1024 ** Math.floor(Math.log(value) / Math.log(1024)) : 1;
  const power = unit * 10 ** Math.floor(Math.log10(value / unit));
  return [1, 2, 5, 10].find((factor) => factor * power >= value * 0.999999) * power;
}

// Draws the series, and returns the words for the newest values, or for those under the pointer.
export function drawPlot(canvas, series, { kept, every_s }, { words, labels = [""], isBytes, at }) {
  const found = context(canvas);
  const indexOf = (values) => (at === null ? values.length - 1 : values.length - 1 - Math.round((1 - at) * (kept - 1)));
  const said = series.map((values, number_) => {
    const value = values[indexOf(values)];
    return `${labels[number_]} ${number(value) ? words(value) : "–"}`.trim();
  }).join(", ");
  if (!found) return said;
  const [pen, width, height] = found;
  const most = ceiling(Math.max(...series.map(largest)) || 1, isBytes);
  const box = [0, 14, width, height - 30];
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "alphabetic";
  pen.strokeStyle = colours.line;
  pen.lineWidth = 1;
  for (const share of [0, 0.5, 1]) {
    const y = Math.round(box[1] + box[3] * share) + 0.5;
    pen.beginPath();
    pen.moveTo(0, y);
    pen.lineTo(width, y);
    pen.stroke();
  }
  series.forEach((values, index) => stroke(pen, values, kept, most, box, [colours.one, colours.two][index], !index));
  pen.fillStyle = colours.quiet;
  pen.fillText(words(most), 2, 10);
  pen.fillText(`${Math.round((kept * every_s) / 60)} min ago`, 2, height - 3);
  pen.textAlign = "right";
  pen.fillText("now", width - 2, height - 3);
  if (series.length > 1) {
    labels.forEach((label, index) => {
      pen.fillStyle = [colours.one, colours.two][index];
      pen.fillText(label, width - 2 - 30 * (labels.length - 1 - index), 10);
    });
  }
  pen.textAlign = "left";
  if (at === null) return said;
  const x = Math.round(at * width) + 0.5;
  pen.strokeStyle = colours.quiet;
  pen.beginPath();
  pen.moveTo(x, box[1]);
  pen.lineTo(x, box[1] + box[3]);
  pen.stroke();
  return `${Math.round((1 - at) * kept * every_s)} s ago: ${said}`;
}

// Columns of the last minutes, one a second; the first part of memory is at the top. Returns what is seen, in words.
const picture = document.createElement("canvas");

export function drawHeat(canvas, columns, kept, memoryBytes, memory) {
  const total = new Float64Array(HEAT_PARTS);
  for (const column of columns) {
    for (let part = 0; part < HEAT_PARTS; part++) total[part] += 2 ** (column[part] / 16) - 1;
  }
  const part = total.indexOf(Math.max(...total));
  const place = (index) => (number(memoryBytes) ? memory((memoryBytes * index) / HEAT_PARTS) : `${index}/${HEAT_PARTS}`);
  const busy = total.filter(Boolean).length;
  const said = busy
    ? `From the beginning of memory (top) to its end; brighter is more. ${busy} of ${HEAT_PARTS} parts have changed, ` +
      `mostly ${place(part)} to ${place(part + 1)}: about ${Math.round(total[part]).toLocaleString("en-US")} pages.`
    : "No page has changed in the last minutes.";
  const found = context(canvas);
  if (!found) return said;
  const [pen, width, height] = found;
  const brightest = Math.max(32, ...columns.map((column) => Math.max(...column)));
  [picture.width, picture.height] = [kept, HEAT_PARTS];
  const inner = picture.getContext("2d");
  const image = inner.createImageData(kept, HEAT_PARTS);
  columns.forEach((column, index) => {
    const x = kept - columns.length + index;
    for (let row = 0; row < HEAT_PARTS; row++) {
      const [red, green, blue] = flame(column[row] / brightest);
      image.data.set([red, green, blue, column[row] ? 255 : 0], (row * kept + x) * 4);
    }
  });
  inner.putImageData(image, 0, 0);
  pen.fillStyle = "#12061f";
  pen.fillRect(width * (1 - columns.length / kept), 0, width, height);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(picture, 0, 0, width, height);
  return said;
}

// From dark violet over orange to pale yellow; lighter throughout, so that it reads without colour too.
const FLAME = [[48, 16, 92], [120, 28, 109], [187, 55, 84], [237, 105, 37], [252, 180, 26], [252, 255, 164]];

export function flame(share) {
  const at = Math.min(Math.max(share, 0), 1) * (FLAME.length - 1);
  const low = Math.min(Math.floor(at), FLAME.length - 2);
  return FLAME[low].map((value, index) => value + (FLAME[low + 1][index] - value) * (at - low));
}

// Segments, [first, last, from, to] with times or null, and what is lost, [first, last, reason].
export function drawKept(canvas, kept, lost) {
  const found = context(canvas);
  if (!found) return;
  const [pen, width, height] = found;
  const hasTimes = kept.every((one) => number(one[2]) && number(one[3]));
  const [from, to] = hasTimes ? [2, 3] : [0, 1];
  const first = Math.min(...kept.map((one) => one[from]));
  const span = Math.max(...kept.map((one) => one[to])) - first || 1;
  const x = (value) => ((value - first) / span) * width;
  for (const one of kept) {
    pen.fillStyle = colours.good;
    pen.globalAlpha = 0.55;
    pen.fillRect(x(one[from]), 0, Math.max(x(one[to]) - x(one[from]), 2), height);
    pen.globalAlpha = 1;
    pen.fillRect(x(one[from]), 0, 1.5, height); // where a full copy begins
  }
  pen.fillStyle = colours.critical;
  for (const one of lost) {
    if (one[0] === null) continue;
    const behind = kept.find((other) => other[0] > one[0]);
    const before = kept.findLast((other) => other[1] < one[0]);
    const left = before ? x(before[to]) : 0;
    pen.fillRect(left, 0, Math.max((behind ? x(behind[from]) : width) - left, 3), height);
  }
}
