// Where the image is on the canvas, and which tab is open.

import { $, checkRadio } from "./dom.js";
import { state } from "./state.js";

const TABS = ["edit", "watch", "result"];
const HINTS = {
  points: "Press on an object, drag it where it should be, and release. Or click it, then click the place.",
  mask: "Paint what may change. An object inside moves as a whole; one that the mask cuts is stretched.",
  watch: "Preview of the edit at this step of the drag.",
  result: "Drag the line to compare.",
};

export const canvas = $("canvas");
export const view = {
  x: 0, y: 0, scale: 1, fit: true,  // of the image; fit: as large as the canvas allows
  width: 1, height: 1,  // of the canvas
  pointer: null, space: false, preview: false, split: 0.5,
};

let waiting = false;

export function draw() {  // before the next repaint
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    state.emit("draw");
  });
}

export function sceneOf(job) {  // image of a job; null if it is the one that is open
  const { scene, edit } = state;
  return job && scene.name === job.values.image && scene.name !== edit.image ? scene.image : null;
}

export function frame() {  // size of the image on the canvas: a result's or a job's may not be the open one
  const { tab, result } = state;
  const scene = tab === "watch" ? sceneOf(state.watchedJob) : null;
  const image = tab === "result" && result ? result.original : scene;
  return image ? [image.naturalWidth, image.naturalHeight] : state.size;
}

export const onScreen = ([x, y]) => [view.x + (x + 0.5) * view.scale, view.y + (y + 0.5) * view.scale];

export function pixelAt({ x, y }) {
  const inside = (value, most) => Math.min(most - 1, Math.max(0, Math.floor(value)));
  const [width, height] = state.size;
  return [inside((x - view.x) / view.scale, width), inside((y - view.y) / view.scale, height)];
}

export function pointAt(at, reach) {  // the nearest point within reach: {index, which}
  let nearest = null;
  state.edit.drags.forEach((drag, index) => ["handle", "target"].forEach((which) => {
    const [x, y] = onScreen(drag[which]);
    const distance = Math.hypot(x - at.x, y - at.y);
    if (distance <= reach && (!nearest || distance < nearest.distance)) nearest = { index, which, distance };
  }));
  return nearest;
}

export function fit() {
  const top = $("views").hidden ? 24 : 62;
  const side = 28;
  const bottom = state.tab !== "result" ? 56 : view.width < 760 ? 112 : 72;
  const [width, height] = frame();
  const room = view.height - top - bottom;
  view.scale = Math.min((view.width - 2 * side) / width, room / height);
  view.x = (view.width - width * view.scale) / 2;
  view.y = top + (room - height * view.scale) / 2;
}

export function place(scale, at, from = at, before = { ...view }) {  // what was at `from` comes to `at`
  view.scale = Math.min(80, Math.max(24 / Math.max(...state.size), scale));
  view.x = at.x - (from.x - before.x) * view.scale / before.scale;
  view.y = at.y - (from.y - before.y) * view.scale / before.scale;
  view.fit = false;
  draw();
}

export const zoom = (factor, at = center()) => place(view.scale * factor, at);

export const center = () => ({ x: view.width / 2, y: view.height / 2 });

export function setSplit(share) {  // border between original and edit
  view.split = Math.min(1, Math.max(0, share));
  $("compare").value = Math.round(1000 * view.split);
  draw();
}

export function setCursor() {
  const { tab, mode } = state;
  const over = () => view.pointer && pointAt(view.pointer, 15);
  const editing = () => (mode === "mask" ? "none" : over() ? "move" : "");
  canvas.className = view.space || tab === "watch" ? "grab" : tab === "result" ? "split" : editing();
}

export function show(name) {
  const tab = name === "result" && !state.result ? "edit" : name;
  const before = state.tab;
  state.tab = tab;
  if (before !== tab && (before === "edit" || tab === "edit")) view.fit = true;
  checkRadio("view-", TABS, tab);
  $("view-watch").hidden = !state.watchedJob;
  $("view-result").hidden = !state.result;
  $("views").hidden = !state.watchedJob && !state.result;
  $("compare-box").hidden = tab !== "result";
  $("result-card").hidden = tab !== "result";
  $("hint").textContent = HINTS[tab === "edit" ? state.mode : tab];
  setCursor();
  draw();
}

export function setMode(mode, tool = state.tool) {
  state.mode = mode;
  state.tool = tool;
  state.pending = null;
  checkRadio("mode-", ["points", "mask"], mode);
  checkRadio("", ["brush", "eraser"], tool);
  $("mask-tools").hidden = mode !== "mask";
  $("point-tools").hidden = mode !== "points";
  show("edit");
}

for (const name of TABS) $(`view-${name}`).onclick = () => show(name);
$("mode-points").onclick = () => setMode("points");
$("mode-mask").onclick = () => setMode("mask");
$("brush").onclick = () => setMode("mask", "brush");
$("eraser").onclick = () => setMode("mask", "eraser");
$("zoom-in").onclick = () => zoom(1.4);
$("zoom-out").onclick = () => zoom(1 / 1.4);
$("zoom-fit").onclick = () => {
  view.fit = true;
  draw();
};
$("preview").onclick = () => {
  view.preview = !view.preview;
  $("preview").setAttribute("aria-pressed", view.preview);
  draw();
};
new ResizeObserver(() => {
  view.width = $("box").clientWidth;
  view.height = $("box").clientHeight;
  draw();
}).observe($("box"));
