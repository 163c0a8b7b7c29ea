// Preview of a drag: the object under each handle, cut out and moved; what it uncovers is filled.

import { newCanvas } from "./dom.js";
import { mask } from "./mask.js";
import { search } from "./objects.js";
import { reduced } from "./shapes.js";
import { state } from "./state.js";

const SHOWN = 1024;  // pixels along the longer side of the preview
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
  const { w, h, pen, colors, labels } = search(handles, [0, 0, width, height], mask.count > 0);
  const share = Math.min(1, SHOWN / Math.max(width, height));
  const moved = newCanvas(Math.round(width * share), Math.round(height * share));
  const cut = handles.map((_, i) => cutOut(labels, i + 1, pen, moved));
  objects = { key, cut, moved, fill: fillHoles(w, h, colors, labels) };
  return objects;
}

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
