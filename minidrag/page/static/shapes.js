// Shapes on the canvas: points, arrows, trails, and images at the place of the image.

import { canvas, frame, onScreen, view } from "./view.js";

export const RED = "#e2202c";
export const BLUE = "#245cf0";
export const context = canvas.getContext("2d");

const halves = new WeakMap();  // an image with its halves, quarters, ...

export function reduced(image, width) {  // the smallest at least that wide: large images are slow to draw
  const widthOf = (one) => one.naturalWidth || one.width;
  const heightOf = (one) => one.naturalHeight || one.height;
  const sizes = halves.get(image) || [image];
  halves.set(image, sizes);
  for (let last = sizes.at(-1); widthOf(last) >= 2 * width && widthOf(last) > 256; last = sizes.at(-1)) {
    const half = document.createElement("canvas");
    half.width = Math.round(widthOf(last) / 2);
    half.height = Math.round(heightOf(last) / 2);
    half.getContext("2d").drawImage(last, 0, 0, half.width, half.height);
    sizes.push(half);
  }
  return sizes.filter((one) => widthOf(one) >= width).pop() || image;
}

export const sharpness = () => window.devicePixelRatio || 1;

export function drawSheet(image) {
  const [width, height] = frame();
  context.drawImage(image, view.x, view.y, width * view.scale, height * view.scale);
}

export const drawImage = (image) => drawSheet(reduced(image, frame()[0] * view.scale * sharpness()));

export function drawLine(x, y, u, v) {
  context.beginPath();
  context.moveTo(x, y);
  context.lineTo(u, v);
  context.stroke();
}

export function traceCircle(x, y, radius) {
  context.beginPath();
  context.arc(x, y, Math.max(0.5, radius), 0, 2 * Math.PI);
}

export function drawArrow(handle, target) {
  const [x, y] = onScreen(handle);
  const [u, v] = onScreen(target);
  const length = Math.hypot(u - x, v - y);
  const radius = 9;
  if (length < 2 * radius) return;
  const [ax, ay] = [(u - x) / length, (v - y) / length];
  const at = (along, aside) => [x + along * ax - aside * ay, y + along * ay + aside * ax];
  const tip = length - radius;
  const neck = tip - 9;
  context.lineCap = context.lineJoin = "round";
  for (const [color, border] of [["rgb(0 0 0 / 55%)", 3], ["#fff", 0]]) {
    context.strokeStyle = context.fillStyle = color;
    context.lineWidth = 3 + border;
    drawLine(x, y, ...at(neck, 0));
    context.beginPath();
    context.moveTo(...at(tip, 0));
    context.lineTo(...at(neck, 6));
    context.lineTo(...at(neck, -6));
    context.closePath();
    context.fill();
    context.lineWidth = border;
    if (border) context.stroke();
  }
}

export function drawPoint(at, color, number = "", selected = false) {
  const [x, y] = onScreen(at);
  if (selected) {
    traceCircle(x, y, 14);
    context.fillStyle = "rgb(255 255 255 / 55%)";
    context.fill();
  }
  traceCircle(x, y, number ? 9 : 6);
  context.fillStyle = color;
  context.fill();
  context.lineWidth = 2;
  context.strokeStyle = "#fff";
  context.stroke();
  context.fillStyle = "#fff";
  context.font = "600 11px system-ui, sans-serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(number, x, y + 0.5);
}

export function drawPair({ handle, target }, number, selected = "") {  // selected: "handle", "target"
  drawPoint(target, BLUE, number, selected === "target");
  drawPoint(handle, RED, number, selected === "handle");
}

export function drawTrail(path, target) {  // of a handle
  drawPoint(target, BLUE);
  if (!path.length) return;
  for (const [color, width] of [["#fff", 5], [RED, 2.5]]) {
    context.beginPath();
    path.forEach((at, i) => context[i ? "lineTo" : "moveTo"](...onScreen(at)));
    context.lineWidth = width;
    context.strokeStyle = color;
    context.lineJoin = context.lineCap = "round";
    context.stroke();
  }
  drawPoint(path.at(-1), RED);
}
