// The list of drags, and the buttons that add and delete them.

import { $, element, icon } from "./dom.js";
import { state } from "./state.js";
import { commit } from "./undo.js";
import { canvas, center, draw, pixelAt, setMode } from "./view.js";

export function movePoint(index, which, [x, y]) {
  const [width, height] = state.size;
  const inside = (value, size) => Math.min(size - 1, Math.max(0, value));
  state.edit.drags[index][which] = [inside(x, width), inside(y, height)];
  commit();
}

export function select(index, which) {
  state.selected = { index, which };
  fillRows();
  draw();
}

function remove(index) {
  state.edit.drags.splice(index, 1);
  state.selected = null;
  state.action = null;
  commit();
}

export function drawDrags() {
  const list = $("drags");
  const { drags } = state.edit;
  $("drag-count").textContent = drags.length || "";
  // A row in which someone types stays.
  if (!list.contains(document.activeElement) || list.children.length !== drags.length) {
    list.replaceChildren(...drags.map((_, index) => buildRow(index)));
  }
  fillRows();
}

function buildRow(index) {
  const row = element("li", {}, element("b", { textContent: index + 1 }));
  for (const which of ["handle", "target"]) {
    row.append(element("span", { className: which === "target" ? "dot to" : "dot" }));
    row.append(buildInput(index, which, 0), buildInput(index, which, 1));
  }
  const values = { className: "round", title: "Delete", "aria-label": `Delete drag ${index + 1}` };
  row.append(element("button", { onclick: () => remove(index), ...values }, icon("close")));
  return row;
}

function buildInput(index, which, axis) {
  const label = `${which} ${index + 1}, ${"xy"[axis]}`;
  const input = element("input", { type: "number", step: "any", "aria-label": label });
  input.onchange = () => {
    if (input.value === "") return drawDrags();
    const point = [...state.edit.drags[index][which]];
    point[axis] = Number(input.value);
    state.selected = { index, which };
    return movePoint(index, which, point);
  };
  input.onfocus = () => select(index, which);
  return input;
}

function fillRows() {
  [...$("drags").children].forEach((row, index) => {
    const { handle, target } = state.edit.drags[index];
    row.className = state.selected && state.selected.index === index ? "selected" : "";
    row.querySelectorAll("input").forEach((input, i) => {
      if (input !== document.activeElement) input.value = [...handle, ...target][i];
    });
  });
  $("delete").disabled = !state.selected;
}

$("delete").onclick = () => {
  if (state.selected && !state.pending) remove(state.selected.index);
  state.pending = null;
  draw();
};
$("drags-clear").onclick = () => {
  state.edit.drags = [];
  state.letGo();
  commit();
};
$("add-drag").onclick = () => {
  setMode("points");
  const { drags } = state.edit;
  const [x, y] = pixelAt(center());
  const far = Math.max(1, Math.round(state.size[0] / 10));
  drags.push({ handle: [x, y], target: [Math.min(state.size[0] - 1, x + far), y] });
  state.selected = { index: drags.length - 1, which: "handle" };
  commit();
  canvas.focus();
};
state.on("change", () => {
  drawDrags();
  $("drags-clear").disabled = !state.edit.drags.length;
});
