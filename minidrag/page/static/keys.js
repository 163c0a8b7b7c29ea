// The keyboard.

import { $, announce } from "./dom.js";
import { drawDrags, movePoint } from "./drags.js";
import { state } from "./state.js";
import { latest, step } from "./undo.js";
import { canvas, draw, setCursor, setSplit, view } from "./view.js";

const BUTTONS = {
  p: "mode-points", m: "mode-mask", b: "brush", e: "eraser", v: "preview", n: "add-drag", delete: "delete",
  backspace: "delete", "+": "zoom-in", "=": "zoom-in", "-": "zoom-out", 0: "zoom-fit", "?": "help",
};
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const isText = (node) => node.matches("textarea, select, input:not([type=range]):not([type=checkbox])");

function keyDown(event) {
  if ($("help-box").open) return;
  const command = event.ctrlKey || event.metaKey;
  const key = event.key.toLowerCase();
  if (command && key === "enter") {
    event.target.blur();  // a value that is being typed counts
    press(event, "run");
  } else if (isText(event.target) && !(command && event.target.matches("select"))) {
    return;
  } else if ("[]".includes(key) && !event.metaKey && (event.altKey || !event.ctrlKey)) {
    // Some keyboards have the brackets on AltGr, which is Ctrl and Alt.
    $("brush-size").value = Number($("brush-size").value) + (key === "[" ? -4 : 4);
    draw();
  } else if (command && (key === "z" || key === "y")) {
    event.preventDefault();
    step(key === "y" || event.shiftKey ? 1 : -1);
  } else if (!command && !event.altKey) {
    plainKey(event, key);
  }
}

function plainKey(event, key) {
  if (BUTTONS[key]) press(event, BUTTONS[key]);
  else if (key === "escape") escape();
  else if (key === " " && [canvas, document.body].includes(event.target)) holdSpace(event);
  else if (event.target === canvas) canvasKey(event);
}

function press(event, button) {
  event.preventDefault();
  $(button).click();
}

function holdSpace(event) {
  event.preventDefault();
  view.space = true;
  setCursor();
}

function releaseSpace() {
  view.space = false;
  setCursor();
}

function escape() {
  const kind = state.action && state.action.kind;
  state.pending = null;
  if (kind === "move") state.edit.drags = structuredClone(latest().edit.drags);
  if (kind === "move" || kind === "pair") state.action = null;
  drawDrags();
  draw();
}

function canvasKey(event) {
  const arrow = ARROWS[event.key];
  const { selected, edit } = state;
  if (arrow && state.tab === "result") {
    setSplit(view.split + 0.02 * arrow[0]);
    event.preventDefault();
  } else if (arrow && selected) {
    const far = event.shiftKey ? 10 : 1;
    const point = edit.drags[selected.index][selected.which];
    movePoint(selected.index, selected.which, [point[0] + far * arrow[0], point[1] + far * arrow[1]]);
    event.preventDefault();
  } else if (event.key === "Tab" && edit.drags.length && state.tab === "edit") {
    tab(event, event.shiftKey ? -1 : 1);
  }
}

function tab(event, by) {  // to the next point, and after the last one out of the canvas
  const { drags } = state.edit;
  const outside = by > 0 ? { index: -1, which: "target" } : { index: drags.length, which: "handle" };
  const { index, which } = state.selected || outside;
  const next = 2 * index + (which === "target" ? 1 : 0) + by;
  const inside = next >= 0 && next < 2 * drags.length;
  state.selected = inside ? { index: next >> 1, which: next % 2 ? "target" : "handle" } : null;
  if (inside) {
    const point = drags[state.selected.index][state.selected.which];
    announce(`${state.selected.which} ${state.selected.index + 1} at ${point.join(", ")}`);
    event.preventDefault();
  }
  drawDrags();
  draw();
}

window.addEventListener("keydown", keyDown);
window.addEventListener("keyup", (event) => event.key === " " && releaseSpace());
window.addEventListener("blur", releaseSpace);
