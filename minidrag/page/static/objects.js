// The object under each handle, by its color; and the mask, extended to hold it.

import { newCanvas } from "./dom.js";
import { mask, paintLine, readPaint, union } from "./mask.js";
import { reduced } from "./shapes.js";
import { state } from "./state.js";
import { commit } from "./undo.js";
import { show } from "./view.js";

const GRID = 160;  // cells along the longer side of the region in which objects are searched
const ALIKE = 26;  // levels of 255 between two cells of one color
const LEAST = 0.03;  // of the free cells that an object found by its color has
const MARGIN = 2;  // cells of the latent by which the mask exceeds an object

// Search objects in a region of the image, [left, top, width, height]: in the mask, or else near the handles.
// Labels of its w x h cells: 1, 2, ... for the object of that drag, 0 for none.
export function search(handles, region, masked) {
  const [left, top, width, height] = region;
  const shrink = Math.min(1, GRID / Math.max(width, height));
  const w = Math.max(8, Math.round(width * shrink));
  const h = Math.max(8, Math.round(height * shrink));
  const pen = newCanvas(w, h).getContext("2d", { willReadFrequently: true });
  const image = reduced(state.image, 2 * w * state.size[0] / width);
  const factor = (image.naturalWidth || image.width) / state.size[0];
  pen.drawImage(image, ...region.map((side) => side * factor), 0, 0, w, h);
  const colors = pen.getImageData(0, 0, w, h).data;
  const seeds = handles.map(([x, y]) => [cellOf(x - left, width, w), cellOf(y - top, height, h)]);
  const free = masked ? maskCells(w, h, region) : nearCells(w, h, seeds);
  return { w, h, pen, colors, labels: grow(w, h, colors, free, seeds) };
}

const cellOf = (pixel, pixels, cells) => Math.min(cells - 1, Math.floor((pixel + 0.5) / pixels * cells));

function maskCells(w, h, [left, top, width, height]) {
  const column = (at) => left + Math.floor((at % w + 0.5) / w * width);
  const row = (at) => top + Math.floor((Math.floor(at / w) + 0.5) / h * height);
  return Uint8Array.from({ length: w * h }, (_, at) => mask.bits[row(at) * state.size[0] + column(at)]);
}

function nearCells(w, h, seeds) {
  const reach = 0.3 * Math.min(w, h);
  const near = (x, y) => seeds.some(([sx, sy]) => Math.hypot(sx - x, sy - y) < reach);
  return Uint8Array.from({ length: w * h }, (_, at) => (near(at % w, Math.floor(at / w)) ? 1 : 0));
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

// Add to the mask the objects of the drags that it cuts, where they are and at their targets. Without a
// warped start they move step by step: then it also needs their way.
export function extendMask({ cut, cell, window }) {
  const { drags, config } = state.edit;
  const region = window || [0, 0, ...state.size];
  const [left, top] = region;
  const { w, h, labels } = search(drags.map((drag) => drag.handle), region, false);
  const [width, height] = [region[2] / w, region[3] / h];  // of a cell of the search, in pixels
  const brush = 2 * MARGIN * cell + Math.hypot(width, height);
  let box = null;
  for (const number of cut) {
    const { handle, target } = drags[number - 1];
    const cells = [...labels.keys()].filter((at) => labels[at] === number);
    const middles = cells.map((at) => [(at % w + 0.5) * width, (Math.floor(at / w) + 0.5) * height]);
    const places = [[handle[0] + 0.5, handle[1] + 0.5], ...middles.map(([x, y]) => [left + x, top + y])];
    for (const [x, y] of places) {
      const moved = [x + target[0] - handle[0], y + target[1] - handle[1]];
      const ends = config.warp_start ? [[[x, y], [x, y]], [moved, moved]] : [[[x, y], moved]];
      for (const [from, to] of ends) box = union(box, paintLine(from, to, brush));
    }
  }
  readPaint(box);
  commit();
  show("edit");
}
