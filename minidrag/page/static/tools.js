// The pointer on the canvas: points, brush, comparison, and the view; and the buttons of the mask.

import { $, announce, attempt, element, say } from "./dom.js";
import { drawDrags, select } from "./drags.js";
import {
  brushWidth, clearMask, mask, maskFile, paintBits, paintLine, readPaint, setMask, union,
} from "./mask.js";
import { state } from "./state.js";
import { commit } from "./undo.js";
import { canvas, draw, frame, pixelAt, place, pointAt, setCursor, setSplit, view, zoom } from "./view.js";

const PEN_ERASER = 5;  // number of a pen's button
const fingers = new Map();

function placeOf(event) {
  const box = canvas.getBoundingClientRect();
  return { x: event.clientX - box.left, y: event.clientY - box.top };
}

function press(event) {
  const at = placeOf(event);
  fingers.set(event.pointerId, at);
  canvas.setPointerCapture(event.pointerId);
  canvas.focus({ preventScroll: true });
  view.pointer = at;
  if (fingers.size === 2) return startPinch();
  if (!state.image || fingers.size > 2) return undefined;
  const { button } = event;
  const panning = button === 1 || view.space;
  if (!panning && button !== 0 && button !== PEN_ERASER) return undefined;
  if (panning || state.tab === "watch") startPan(at);
  else if (state.tab === "result") startSplit(at);
  else if (state.mode === "mask") startStroke(at, state.tool === "eraser" || button === PEN_ERASER);
  else pressPoint(at, event.pointerType === "touch" ? 26 : 15);
  event.preventDefault();
  return draw();
}

function startPan(at) {
  state.action = { kind: "pan", from: at, view: { ...view } };
}

function startSplit(at) {
  state.action = { kind: "split" };
  slide(at);
}

function startStroke(at, erase) {
  state.action = { kind: "paint", last: at, erase, box: null, strokes: 0 };
  stroke(at);
}

function stroke(at) {
  const { action } = state;
  const pixel = (point) => [(point.x - view.x) / view.scale, (point.y - view.y) / view.scale];
  const box = paintLine(pixel(action.last), pixel(at), brushWidth(), action.erase);
  action.box = union(action.box, box);
  action.strokes += 1;
  action.last = at;
}

function pressPoint(at, reach) {
  const point = pointAt(at, reach);
  if (state.pending) {
    state.pending.target = pixelAt(at);
    state.action = { kind: "pair", down: at, moved: true };
  } else if (point) {
    state.action = { kind: "move", down: at, moved: false };
    select(point.index, point.which);
  } else {
    state.selected = null;
    state.pending = { handle: pixelAt(at), target: null };
    state.action = { kind: "pair", down: at, moved: false };
    drawDrags();
  }
}

function move(event) {
  const at = placeOf(event);
  const { action, pending, selected, edit } = state;
  view.pointer = event.pointerType === "touch" ? null : at;
  if (fingers.has(event.pointerId)) fingers.set(event.pointerId, at);
  if (!action) {
    if (pending && state.mode === "points") pending.target = pixelAt(at);
    setCursor();
    return draw();
  }
  if (action.down && Math.hypot(at.x - action.down.x, at.y - action.down.y) > 4) action.moved = true;
  if (action.kind === "pinch") pinch();
  if (action.kind === "pan") place(view.scale, at, action.from, action.view);
  if (action.kind === "split") slide(at);
  if (action.kind === "pair" && action.moved) pending.target = pixelAt(at);
  if (action.kind === "move" && action.moved) {
    edit.drags[selected.index][selected.which] = pixelAt(at);
    drawDrags();
  }
  if (action.kind === "paint") {
    const events = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
    (events.length ? events : [event]).map(placeOf).forEach(stroke);
  }
  return draw();
}

function release(event) {
  fingers.delete(event.pointerId);
  const { action, pending } = state;
  if (!action) return;
  state.action = null;
  if (action.kind === "pinch") return;
  if (action.kind === "paint") {
    readPaint(action.box);
    commit();
  }
  if (action.kind === "move" && action.moved) commit();
  if (action.kind === "pair" && action.moved && pending && pending.target) finishPair(pending);
  if (state.pending && !state.pending.target) announce("handle set: now its target");
  setCursor();
  draw();
}

function finishPair(pair) {
  if (pair.handle.join() === pair.target.join()) {
    pair.target = null;
    return;
  }
  const { drags } = state.edit;
  drags.push(pair);
  state.pending = null;
  state.selected = { index: drags.length - 1, which: "target" };
  commit();
}

function grip() {  // of two fingers: their center, their distance
  const [a, b] = [...fingers.values()];
  return b && { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, apart: Math.hypot(a.x - b.x, a.y - b.y) };
}

function startPinch() {
  if (state.action && state.action.kind === "paint") paintBits();  // the first finger's dot was not meant
  if (state.action && state.action.kind === "pair") state.pending = null;
  state.action = { kind: "pinch", from: grip(), view: { ...view } };
  draw();
}

function pinch() {
  const { from, view: before } = state.action;
  const to = grip();
  if (to) place(before.scale * to.apart / from.apart, to, from, before);
}

const slide = (at) => setSplit((at.x - view.x) / (frame()[0] * view.scale));

function maskDrags() {
  if (!state.edit.drags.length) return say("make a drag first");
  let box = null;
  const middle = (point) => point.map((value) => value + 0.5);
  for (const { handle, target } of state.edit.drags) {
    const length = Math.hypot(handle[0] - target[0], handle[1] - target[1]);
    const width = Math.max(0.36 * Math.min(...state.size), length);
    box = union(box, paintLine(middle(handle), middle(target), width));
  }
  readPaint(box);
  return commit();
}

async function saveMask() {
  const url = URL.createObjectURL(await maskFile());
  element("a", { href: url, download: "mask.png" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

canvas.addEventListener("pointerdown", press);
canvas.addEventListener("pointermove", move);
canvas.addEventListener("pointerup", release);
canvas.addEventListener("pointercancel", (event) => {
  if (state.action && state.action.kind === "pair") state.pending = null;
  release(event);
});
canvas.addEventListener("pointerleave", () => {
  view.pointer = null;
  draw();
});
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0016)), placeOf(event));
}, { passive: false });
$("compare").oninput = () => setSplit($("compare").value / 1000);
$("brush-size").oninput = draw;
$("mask-drags").onclick = maskDrags;
$("mask-invert").onclick = () => {
  setMask(mask.bits.map((bit) => bit ^ 1));
  commit();
};
$("mask-clear").onclick = () => {
  clearMask();
  commit();
};
$("mask-save").onclick = attempt(saveMask);
