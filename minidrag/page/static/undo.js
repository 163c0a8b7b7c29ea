// Undo: snapshots of the edit and its mask.

import { loadNamed } from "./api.js";
import { $, attempt } from "./dom.js";
import { mask, pack, setMask, unpack } from "./mask.js";
import { state } from "./state.js";
import { draw, show, view } from "./view.js";

const MOST = 300;  // steps that can be undone
let past = [];
let now = -1;

export const latest = () => past[now];

function snapshot() {
  const { size } = state;
  const before = latest();
  const same = before && before.version === mask.version && before.size.join() === size.join();
  const edit = structuredClone(state.edit);
  return { edit, size: [...size], version: mask.version, mask: same ? before.mask : pack(mask.bits) };
}

export function commit() {  // one step of undo, if anything changed
  const next = snapshot();
  const before = latest();
  const same = before && before.version === next.version;
  if (same && JSON.stringify(before.edit) === JSON.stringify(next.edit)) return;
  past = [...past.slice(Math.max(0, now - MOST), now + 1), next];
  now = past.length - 1;
  state.emit("change");
}

export function amend() {  // the settings' defaults are no step of undo
  if (latest()) latest().edit = structuredClone(state.edit);
  state.emit("change");
}

async function restore(step) {
  if (step.edit.image !== state.edit.image) {
    state.image = await loadNamed(step.edit.image);
    state.size = step.size;
    view.fit = true;
  }
  state.edit = structuredClone(step.edit);
  setMask(unpack(step.mask, state.size[0] * state.size[1]), step.version);
  state.pending = null;
  state.action = null;  // a held point may be of another step
  if (state.selected && !state.edit.drags[state.selected.index]) state.selected = null;
  state.emit("change");
}

const stepNow = attempt(async (by) => {
  if (state.pending) {
    state.pending = null;
    state.action = null;
    return draw();
  }
  if (!past[now + by]) return undefined;
  now += by;
  show("edit");
  try {
    return await restore(latest());
  } catch (error) {
    now -= by;
    throw error;
  }
});

let stepping = Promise.resolve();

export function step(by) {  // one after the other: a step may wait for an image
  stepping = stepping.then(() => stepNow(by));
}

$("undo").onclick = () => step(-1);
$("redo").onclick = () => step(1);
state.on("change", () => {
  $("undo").disabled = now <= 0;
  $("redo").disabled = now >= past.length - 1;
  draw();
});
