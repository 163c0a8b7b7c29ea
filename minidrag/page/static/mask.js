// The mask: a byte per pixel, 1 where the image may change; as a canvas, and as a smaller one for the screen.

import { $, newCanvas } from "./dom.js";
import { state } from "./state.js";

const MOST = 1280;  // side of the smaller canvas: a large one is slow to draw
const full = newCanvas();
const pen = full.getContext("2d", { willReadFrequently: true });
const small = newCanvas();
const smallPen = small.getContext("2d");

export const mask = { bits: new Uint8Array(1), count: 0, version: 0, small };
let factor = 1;  // of the smaller canvas
let versions = 0;

export function pack(bits) {  // lengths of runs of equal bits, beginning with zeros
  const runs = [];
  let value = 0;
  let from = 0;
  for (let i = 0; i <= bits.length; i++) {
    if (i < bits.length && bits[i] === value) continue;
    runs.push(i - from);
    from = i;
    value ^= 1;
  }
  return runs;
}

export function unpack(runs, length) {
  const bits = new Uint8Array(length);
  let at = 0;
  runs.forEach((run, i) => {
    if (i % 2) bits.fill(1, at, at + run);
    at += run;
  });
  return bits;
}

export function setMask(bits, version = ++versions) {
  const [width, height] = state.size;
  Object.assign(full, { width, height });
  factor = Math.min(1, MOST / Math.max(width, height));
  Object.assign(small, { width: Math.ceil(width * factor), height: Math.ceil(height * factor) });
  mask.count = bits.reduce((sum, bit) => sum + bit, 0);
  mask.bits = bits;
  mask.version = version;
  paintBits();
}

export const clearMask = () => setMask(new Uint8Array(state.size[0] * state.size[1]));

export function paintBits(left = 0, top = 0, width = state.size[0], height = state.size[1]) {
  const image = new ImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  for (let y = 0; y < height; y++) {
    const from = (top + y) * state.size[0] + left;
    for (let x = 0; x < width; x++) pixels[y * width + x] = mask.bits[from + x] ? 0xffffffff : 0;
  }
  pen.putImageData(image, left, top);
  smallPen.setTransform(factor, 0, 0, factor, 0, 0);
  smallPen.clearRect(left, top, width, height);
  smallPen.drawImage(full, left, top, width, height, left, top, width, height);
}

export function paintLine(from, to, width, erase = false) {  // in pixels of the image; its bounding box
  for (const [ink, scale] of [[pen, 1], [smallPen, factor]]) {
    ink.save();
    ink.setTransform(scale, 0, 0, scale, 0, 0);
    ink.globalCompositeOperation = erase ? "destination-out" : "source-over";
    ink.strokeStyle = "#fff";
    ink.lineWidth = width;
    ink.lineCap = "round";
    ink.beginPath();
    ink.moveTo(...from);
    ink.lineTo(to[0] + 0.01, to[1]);
    ink.stroke();
    ink.restore();
  }
  const reach = width / 2 + 2;
  const low = [0, 1].map((axis) => Math.min(from[axis], to[axis]) - reach);
  const high = [0, 1].map((axis) => Math.max(from[axis], to[axis]) + reach);
  return [...low, ...high];
}

export function brushWidth() {  // in pixels of the image
  return Math.max(1, Math.round((Number($("brush-size").value) / 100) ** 2 * Math.min(...state.size)));
}

export function union(a, b) {  // of two boxes, [left, top, right, bottom]; a may be null
  return a ? b.map((value, i) => (i < 2 ? Math.min(a[i], value) : Math.max(a[i], value))) : b;
}

export function readPaint(box) {  // what was painted in a box, as bits
  const left = Math.max(0, Math.floor(box[0]));
  const top = Math.max(0, Math.floor(box[1]));
  const width = Math.min(state.size[0], Math.ceil(box[2])) - left;
  const height = Math.min(state.size[1], Math.ceil(box[3])) - top;
  if (width <= 0 || height <= 0) return;
  const { data } = pen.getImageData(left, top, width, height);
  const bits = mask.bits.slice();
  for (let y = 0; y < height; y++) {
    const to = (top + y) * state.size[0] + left;
    for (let x = 0; x < width; x++) {
      const bit = data[4 * (y * width + x) + 3] >> 7;
      mask.count += bit - bits[to + x];
      bits[to + x] = bit;
    }
  }
  mask.bits = bits;
  mask.version = ++versions;
  paintBits(left, top, width, height);
}

export function bitsOf(image) {  // white of an image, as load_mask reads it
  const [width, height] = state.size;
  if (image.naturalWidth !== width || image.naturalHeight !== height) {
    const sizes = `${image.naturalWidth}x${image.naturalHeight} pixels, the image ${width}x${height}`;
    throw new Error(`the mask is ${sizes}: make them the same size`);
  }
  const data = onBlack(image).getImageData(0, 0, width, height).data;
  const gray = (i) => (19595 * data[i] + 38470 * data[i + 1] + 7471 * data[i + 2]) >> 16;
  return Uint8Array.from({ length: width * height }, (_, i) => (gray(4 * i) >= 128 ? 1 : 0));
}

export function maskFile() {  // as PNG
  return new Promise((resolve) => onBlack(full).canvas.toBlob(resolve, "image/png"));
}

function onBlack(image) {
  const ink = newCanvas(...state.size).getContext("2d");
  ink.fillRect(0, 0, ...state.size);
  ink.drawImage(image, 0, 0);
  return ink;
}
