// Preview of a drag: the object under each handle, cut out and moved; what it uncovers is filled.

import { newCanvas } from "./dom.js";
import { mask } from "./mask.js";
import { reduced } from "./shapes.js";
import { state } from "./state.js";

const GRID = 160;  // cells along the longer side in which objects are searched
const SHOWN = 1024;  // pixels along the longer side of the preview
const ALIKE = 26;  // levels of 255 between two cells of one color
const LEAST = 0.03;  // of the free cells that an object found by its color has
const TURNS = 12;  // of smoothing, on each level

let objects = { key: "" };  // of the handles

export function movedObjects(drags) {  // two canvases: the filled holes, and the objects at their targets
  const { cut, fill, moved } = findObjects(drags.map((drag) => drag.handle));
  const pen = moved.getContext("2d");
  const scale = moved.width / state.size[0];
  pen.globalCompositeOperation = "source-over";
  pen.clearRect(0, 0, moved.width, moved.height);
  drags.forEach(({ handle, target }, i) => {
    pen.drawImage(cut[i], (target[0] - handle[0]) * scale, (target[1] - handle[1]) * scale);
  });
  if (mask.count) {
    pen.globalCompositeOperation = "destination-in";
    pen.drawImage(mask.small, 0, 0, moved.width, moved.height);
  }
  return [fill, moved];
}

function findObjects(handles) {
  const key = JSON.stringify([state.edit.image, mask.version, handles]);
  if (objects.key === key) return objects;
  const [width, height] = state.size;
  const shrink = Math.min(1, GRID / Math.max(width, height));
  const w = Math.max(8, Math.round(width * shrink));
  const h = Math.max(8, Math.round(height * shrink));
  const pen = newCanvas(w, h).getContext("2d", { willReadFrequently: true });
  pen.drawImage(reduced(state.image, 2 * w), 0, 0, w, h);
  const colors = pen.getImageData(0, 0, w, h).data;
  const seeds = handles.map(([x, y]) => [cellOf(x, width, w), cellOf(y, height, h)]);
  const labels = grow(w, h, colors, freeCells(w, h, seeds), seeds);
  const share = Math.min(1, SHOWN / Math.max(width, height));
  const moved = newCanvas(Math.round(width * share), Math.round(height * share));
  const cut = handles.map((_, i) => cutOut(labels, i + 1, pen, moved));
  objects = { key, cut, moved, fill: fillHoles(w, h, colors, labels) };
  return objects;
}

const cellOf = (pixel, pixels, cells) => Math.min(cells - 1, Math.floor((pixel + 0.5) / pixels * cells));

function cutOut(labels, label, pen, { width, height }) {  // the image where the cells have a label
  const { canvas } = pen;
  const stencil = new ImageData(canvas.width, canvas.height);
  labels.forEach((value, cell) => { stencil.data[4 * cell + 3] = value === label ? 255 : 0; });
  pen.putImageData(stencil, 0, 0);
  const ink = newCanvas(width, height).getContext("2d");
  ink.drawImage(canvas, 0, 0, width, height);
  ink.globalCompositeOperation = "source-in";
  ink.drawImage(reduced(state.image, width), 0, 0, width, height);
  return ink.canvas;
}

function freeCells(w, h, seeds) {  // cells that an object may have: the mask's, or those near a handle
  const [width, height] = state.size;
  const free = new Uint8Array(w * h);
  const reach = 0.3 * Math.min(w, h);
  for (let y = 0; y < h; y++) {
    for (let x = 0; x < w; x++) {
      const pixel = Math.floor((y + 0.5) / h * height) * width + Math.floor((x + 0.5) / w * width);
      const near = () => seeds.some(([sx, sy]) => Math.hypot(sx - x, sy - y) < reach);
      free[y * w + x] = (mask.count ? mask.bits[pixel] : near()) ? 1 : 0;
    }
  }
  return free;
}

// An object: free cells unlike all along the border of the free ones, as far as they connect to its handle.
// If that is next to nothing, all that is nearer to the handle than to the border.
function grow(w, h, colors, free, seeds) {
  const border = borderOf(w, h, free);
  const samples = [...border.keys()].filter((cell) => border[cell]);
  const alike = (i, j) => [0, 1, 2].every((c) => Math.abs(colors[i + c] - colors[j + c]) <= ALIKE);
  const unlike = (cell) => !samples.some((sample) => alike(4 * cell, 4 * sample));
  const inside = Uint8Array.from(free, (value, cell) => (value && !border[cell] && unlike(cell) ? 1 : 0));
  const labels = spread(w, h, seeds, [], inside);
  const area = (cells) => cells.reduce((sum, value) => sum + (value ? 1 : 0), 0);
  return area(labels) > LEAST * area(free) ? labels : spread(w, h, seeds, samples, free);
}

function borderOf(w, h, free) {  // of the free cells; where all are free, of the image
  const inner = free.includes(0);
  return free.map((value, at) => {
    const x = at % w;
    const edge = x === 0 || x === w - 1 || at < w || at >= w * (h - 1);
    const enclosed = () => free[at - 1] && free[at + 1] && free[at - w] && free[at + w];
    return value && (inner ? !edge && !enclosed() : edge) ? 1 : 0;
  });
}

// Labels of cells, 1, 2, ... for the seed nearest by way of allowed cells; 0 for those nearer to an outsider.
function spread(w, h, seeds, outsiders, allowed) {
  const labels = new Uint8Array(w * h).fill(255);
  const queue = [];
  const take = (x, y, value, always = false) => {
    const cell = y * w + x;
    if (x < 0 || y < 0 || x >= w || y >= h || labels[cell] !== 255 || !(always || allowed[cell])) return;
    labels[cell] = value;
    queue.push(cell);
  };
  seeds.forEach(([x, y], i) => {
    for (let cell = 0; cell < 9; cell++) take(x + cell % 3 - 1, y + Math.floor(cell / 3) - 1, i + 1, true);
  });
  for (const cell of outsiders) take(cell % w, Math.floor(cell / w), 0, true);
  for (let next = 0; next < queue.length; next++) {
    const x = queue[next] % w;
    const y = Math.floor(queue[next] / w);
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) take(x + dx, y + dy, labels[queue[next]]);
  }
  return labels.map((value) => (value === 255 ? 0 : value));
}

function fillHoles(w, h, colors, labels) {  // colors of the cells around, from coarse to fine
  const hole = grown(w, h, labels, 2);
  const known = (i) => (hole[i >> 2] ? 0 : i % 4 === 3 ? 1 : colors[i]);  // the fourth channel counts colors
  const levels = [{ w, h, data: Float32Array.from({ length: w * h * 4 }, (_, i) => known(i)) }];
  while (levels.at(-1).w > 1 || levels.at(-1).h > 1) levels.push(halved(levels.at(-1)));
  for (let i = levels.length - 1; i >= 0; i--) smooth(levels[i], levels[i + 1]);
  const image = new ImageData(w, h);
  const { data } = levels[0];
  for (let i = 0; i < data.length; i++) image.data[i] = i % 4 === 3 ? 255 * hole[i >> 2] : data[i];
  const sheet = newCanvas(w, h);
  sheet.getContext("2d").putImageData(image, 0, 0);
  return sheet;
}

function grown(w, h, labels, reach) {  // 1 within reach of a label
  const cells = new Uint8Array(w * h);
  labels.forEach((label, cell) => {
    if (!label) return;
    const [x, y] = [cell % w, Math.floor(cell / w)];
    for (let v = Math.max(0, y - reach); v <= Math.min(h - 1, y + reach); v++) {
      cells.fill(1, v * w + Math.max(0, x - reach), v * w + Math.min(w - 1, x + reach) + 1);
    }
  });
  return cells;
}

function halved({ w, h, data }) {  // sums of two by two cells
  const half = { w: (w + 1) >> 1, h: (h + 1) >> 1 };
  half.data = new Float32Array(half.w * half.h * 4);
  for (let y = 0; y < h; y++) {
    for (let x = 0; x < w; x++) {
      const to = 4 * ((y >> 1) * half.w + (x >> 1));
      for (let c = 0; c < 4; c++) half.data[to + c] += data[4 * (y * w + x) + c];
    }
  }
  return half;
}

function smooth({ w, h, data }, coarse) {  // fill the cells of a level without a color from the coarser one
  const empty = [];
  for (let cell = 0; cell < w * h; cell++) {
    const at = 4 * cell;
    const weight = data[at + 3];
    const from = coarse && 4 * ((Math.floor(cell / w) >> 1) * coarse.w + ((cell % w) >> 1));
    for (let c = 0; c < 3; c++) data[at + c] = weight ? data[at + c] / weight : coarse.data[from + c];
    data[at + 3] = 1;
    if (!weight) empty.push(cell);
  }
  for (let turn = 0; turn < TURNS; turn++) {
    for (const cell of empty) {
      const x = cell % w;
      const across = [x ? cell - 1 : cell, x < w - 1 ? cell + 1 : cell];
      const along = [cell >= w ? cell - w : cell, cell < w * (h - 1) ? cell + w : cell];
      const mean = (c) => [...across, ...along].reduce((sum, other) => sum + data[4 * other + c], 0) / 4;
      for (let c = 0; c < 3; c++) data[4 * cell + c] = mean(c);
    }
  }
}
