// What the canvas shows: the image with its drags and mask, the preview of a running drag, or a comparison.

import { $, newCanvas } from "./dom.js";
import { brushWidth, mask } from "./mask.js";
import { movedObjects } from "./preview.js";
import {
  context, drawArrow, drawImage, drawLine, drawPair, drawPoint, drawSheet, drawTrail, RED, BLUE, sharpness,
  traceCircle,
} from "./shapes.js";
import { state } from "./state.js";
import { canvas, fit, frame, sceneOf, view } from "./view.js";

const overlay = newCanvas();  // dark outside the mask
let overlayKey = "";

function render() {
  const sharp = sharpness();
  const width = Math.round(view.width * sharp);
  const height = Math.round(view.height * sharp);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  context.setTransform(sharp, 0, 0, sharp, 0, 0);
  context.clearRect(0, 0, view.width, view.height);
  if (!state.image) return;
  if (view.fit) fit();
  $("zoom").textContent = `${Math.round(100 * view.scale * sharp)} %`;
  context.imageSmoothingEnabled = view.scale * sharp < 12;
  context.imageSmoothingQuality = "medium";
  renderShadow();
  if (state.tab === "result" && state.result) renderResult();
  else if (state.tab === "watch") renderWatch();
  else renderEdit();
}

function renderShadow() {
  context.save();
  context.shadowColor = "rgb(0 0 0 / 22%)";
  context.shadowBlur = 18;
  context.shadowOffsetY = 3;
  context.fillRect(view.x, view.y, frame()[0] * view.scale, frame()[1] * view.scale);
  context.restore();
}

function renderEdit() {
  const { drags, pending, action, edit, selected } = state;
  drawImage(state.image);
  const moving = action && ["pair", "move"].includes(action.kind) && action.moved;
  const following = pending && pending.target && !action;
  if (drags.length && (view.preview || moving || following)) movedObjects(drags).forEach(drawSheet);
  renderMask();
  if (drags.length && state.check.window) renderWindow(state.check.window);
  drags.forEach(({ handle, target }) => drawArrow(handle, target));
  const selectedOf = (index) => (selected && selected.index === index ? selected.which : "");
  edit.drags.forEach((drag, i) => drawPair(drag, i + 1, selectedOf(i)));
  if (pending) {
    if (pending.target) drawPoint(pending.target, BLUE, edit.drags.length + 1);
    drawPoint(pending.handle, RED, edit.drags.length + 1, true);
  }
  if (state.mode === "mask" && view.pointer && !view.space) renderBrush();
}

function renderBrush() {
  traceCircle(view.pointer.x, view.pointer.y, (brushWidth() / 2) * view.scale);
  for (const [width, color] of [[3, "rgb(0 0 0 / 45%)"], [1.5, "#fff"]]) {
    context.lineWidth = width;
    context.strokeStyle = color;
    context.stroke();
  }
}

function renderWindow([left, top, width, height]) {
  const { x, y, scale } = view;
  const box = [x + left * scale, y + top * scale, width * scale, height * scale].map(Math.round);
  context.lineWidth = 2;
  for (const [color, dashes] of [["rgb(0 0 0 / 60%)", []], ["#fff", [6, 6]]]) {
    context.strokeStyle = color;
    context.setLineDash(dashes);
    context.strokeRect(...box);
  }
  context.setLineDash([]);
}

function renderMask() {
  const painting = state.action && state.action.kind === "paint";
  if (!mask.count && !painting) return;
  const area = [view.x, view.y, state.size[0] * view.scale, state.size[1] * view.scale];
  const strokes = painting ? state.action.strokes : 0;
  const key = [mask.version, strokes, state.mode, sharpness(), view.width, view.height, ...area].join();
  if (key !== overlayKey) renderOverlay(area);
  overlayKey = key;
  context.save();
  context.beginPath();
  context.rect(...area);
  context.clip();
  context.drawImage(overlay, 0, 0, view.width, view.height);
  context.restore();
}

function renderOverlay([x, y, width, height]) {  // with the mask's outline
  const pen = overlay.getContext("2d");
  const stamp = (dx, dy) => pen.drawImage(mask.small, x + dx, y + dy, width, height);
  Object.assign(overlay, { width: canvas.width, height: canvas.height });
  pen.setTransform(sharpness(), 0, 0, sharpness(), 0, 0);
  pen.imageSmoothingEnabled = context.imageSmoothingEnabled;
  for (let turn = 0; turn < 8; turn++) {
    const angle = turn * Math.PI / 4;
    stamp(1.6 * Math.cos(angle), 1.6 * Math.sin(angle));
  }
  pen.globalCompositeOperation = "destination-over";
  pen.fillStyle = state.mode === "mask" ? "rgb(8 10 16 / 58%)" : "rgb(8 10 16 / 42%)";
  pen.fillRect(x, y, width, height);
  pen.globalCompositeOperation = "destination-out";
  stamp(0, 0);
}

function renderWatch() {
  const job = state.watchedJob;
  drawImage(sceneOf(job) || state.image);
  if (!job) return;
  const { preview } = state;
  if (preview.image && preview.key.startsWith(`${job.number}-`)) drawSheet(preview.image);
  job.values.drags.forEach((drag, i) => {
    if (job.paths.length) return drawTrail(job.paths[i] || [], drag.target);
    drawArrow(drag.handle, drag.target);
    return drawPair(drag, i + 1);
  });
}

function renderResult() {
  const { original, edited, raw, options, result } = state.result;
  const [width, height] = frame();
  const border = view.x + view.split * width * view.scale;
  drawImage(original);
  context.save();
  context.beginPath();
  context.rect(border, 0, view.width, view.height);
  context.clip();
  drawImage($("show-raw").checked && raw ? raw : edited);
  context.restore();
  const paths = result.paths || [];
  if ($("show-paths").checked) options.drags.forEach(({ target }, i) => drawTrail(paths[i] || [], target));
  renderSlider(border, view.y, view.y + height * view.scale);
}

function renderSlider(x, top, bottom) {
  const middle = (top + bottom) / 2;
  for (const [width, color] of [[4, "rgb(0 0 0 / 35%)"], [2, "#fff"]]) {
    context.lineWidth = width;
    context.strokeStyle = color;
    drawLine(x, top, x, bottom);
  }
  traceCircle(x, middle, 15);
  context.fillStyle = "#fff";
  context.fill();
  context.strokeStyle = "#1f2228";
  context.lineWidth = 1.8;
  for (const side of [-1, 1]) {
    context.beginPath();
    context.moveTo(x + side * 4, middle - 4);
    context.lineTo(x + side * 8, middle);
    context.lineTo(x + side * 4, middle + 4);
    context.stroke();
  }
}

state.on("draw", render);
$("show-paths").onchange = $("show-raw").onchange = render;
