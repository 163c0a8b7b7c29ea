// The page of minidrag: a picture with drags and a mask, sent as the options of run.json.
// Points are pixels: 0,0 is the center of the upper left one. A mask is a byte per pixel, 1 where it may change.

const $ = (id) => document.getElementById(id);
const canvas = $("canvas"), context = canvas.getContext("2d");
const RED = "#e2202c", BLUE = "#245cf0";
const STAGES = ["LoRA", "inversion", "drag", "denoising", "animation"];
const NAMES = { "edited.png": "edit", "process.gif": "animation", "comparison.png": "comparison", "run.json": "run.json", "lora.safetensors": "LoRA", "generated.png": "generated" };
const TRACES = ["#e2202c", "#245cf0", "#1c9a5b", "#c07a00", "#9a3fd0", "#0a93a8"];

let settings = null;  // of the server: fields, presets, models, what the command line fixed
let edit = { image: "", drags: [], prompt: "", negative: "", guidance: 7.5, made: "", model: "tiny", config: {}, seed: 0 };
let picture = null;  // the image, drawable
let size = [1, 1];
let mask = { bits: new Uint8Array(1), marked: 0, version: 0, canvas: document.createElement("canvas"), small: document.createElement("canvas"), factor: 1, path: null, sent: 0 };
mask.pen = mask.canvas.getContext("2d", { willReadFrequently: true });
mask.smallPen = mask.small.getContext("2d");  // for the screen: a large mask is slow to draw
let past = [], now = -1;  // snapshots for undo
let view = { x: 0, y: 0, scale: 1, fit: true };
let mode = "points", tool = "brush", showing = "edit";
let half = null, selected = null, action = null, pointer = null, space = false, previewing = false;
let result = null;  // a run that is shown: {name, options, result, files, original, edited, raw}
let watched = null;  // number of the job that this tab waits for
const sent = new Map();  // jobs of this tab, and what the edit was when each was sent
const offered = new Map();  // those that ended while the person was at something else
let scene = { image: "", shown: null };  // the picture of the job that is watched, if another one is open
let state = { model: "", jobs: [], ahead: null };
let foreseen = { key: "", image: null };
let start = null, lastPrepared = "", split = 0.5;

// ---- asking the server

async function api(path, values) {
  const request = values === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(values) };
  let response;
  try {
    response = await fetch(path, request);
  } catch {
    throw Object.assign(new Error("the program does not answer: is it still running?"), { away: true });
  }
  const answer = await response.json().catch(() => ({ error: "the answer cannot be read" }));
  if (!response.ok) throw Object.assign(new Error(answer.error || `error ${response.status}`), { away: response.status === 403, status: response.status });
  return answer;
}

const query = (path, values) => path + "?" + new URLSearchParams(values);

function loadImage(source) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("the picture cannot be shown"));
    image.src = source;
  });
}

function later(wait, work) {
  let timer;
  return () => { clearTimeout(timer); timer = setTimeout(() => work().catch((error) => !error.away && say(error.message)), wait); };
}

let toastTimer;
function say(sentence) {
  $("toast").textContent = sentence[0].toUpperCase() + sentence.slice(1);
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { $("toast").hidden = true; }, 7000);
}

const attempt = (work) => async (...given) => { try { await work(...given); } catch (error) { say(error.message); } };
const announce = (sentence) => { $("live").textContent = sentence; };

// ---- the edit, and undo

function pack(bits) {  // runs of equal bytes, beginning with zeros
  const runs = [];
  let value = 0, from = 0;
  for (let i = 0; i <= bits.length; i++) {
    if (i === bits.length || bits[i] !== value) { runs.push(i - from); from = i; value ^= 1; }
  }
  return runs;
}

function unpack(runs, length) {
  const bits = new Uint8Array(length);
  let at = 0;
  runs.forEach((run, i) => { if (i % 2) bits.fill(1, at, at + run); at += run; });
  return bits;
}

function snapshot() {
  const before = past[now];
  const same = before && before.version === mask.version && before.size.join() === size.join();
  return { edit: structuredClone(edit), size: [...size], version: mask.version, mask: same ? before.mask : pack(mask.bits) };
}

function commit() {  // one step of undo, if anything changed
  const next = snapshot(), before = past[now];
  if (before && before.version === next.version && JSON.stringify(before.edit) === JSON.stringify(next.edit)) return;
  past = [...past.slice(Math.max(0, now - 300), now + 1), next];
  now = past.length - 1;
  changed();
}

async function restore(to) {
  if (to.edit.image !== edit.image) {
    picture = await loadImage(query("/picture", { image: to.edit.image }));
    size = to.size;
    view.fit = true;
  }
  action = null;  // a point in the hand may be of another state
  edit = structuredClone(to.edit);
  setMask(unpack(to.mask, size[0] * size[1]), to.version);
  half = null;
  if (selected && !edit.drags[selected.index]) selected = null;
  fillForm();
  changed();
}

let stepping = Promise.resolve();  // steps of undo in turn: one may wait for a picture
const step = (by) => { stepping = stepping.then(() => stepNow(by)); };
const stepNow = attempt(async (by) => {
  if (half) { half = action = null; return draw(); }
  if (!past[now + by]) return;
  now += by;
  show("edit");
  try { await restore(past[now]); } catch (error) { now -= by; throw error; }
});

function changed() {
  drawDrags();
  markPreset();
  $("undo").disabled = now <= 0;
  $("redo").disabled = now >= past.length - 1;
  $("run").disabled = $("drags-clear").disabled = !edit.drags.length;
  draw();
  keepDraft();
  check();
  prepare();
}

// ---- the picture and the mask

function setMask(bits, version) {
  mask.canvas.width = size[0];
  mask.canvas.height = size[1];
  mask.factor = Math.min(1, 1280 / Math.max(...size));
  mask.small.width = Math.ceil(size[0] * mask.factor);
  mask.small.height = Math.ceil(size[1] * mask.factor);
  mask.marked = 0;
  for (let i = 0; i < bits.length; i++) mask.marked += bits[i];
  mask.bits = bits;
  mask.version = version ?? newVersion();
  paintMask(0, 0, ...size);
}

const newVersion = () => Math.max(mask.version, ...past.map((one) => one.version), 0) + 1;

function paintMask(left, top, wide, high) {  // a rectangle of it as it will be used
  const image = new ImageData(wide, high), pixels = new Uint32Array(image.data.buffer);
  for (let y = 0; y < high; y++) {
    const from = (top + y) * size[0] + left;
    for (let x = 0; x < wide; x++) pixels[y * wide + x] = mask.bits[from + x] ? 0xffffffff : 0;
  }
  mask.pen.putImageData(image, left, top);
  mask.smallPen.setTransform(mask.factor, 0, 0, mask.factor, 0, 0);
  mask.smallPen.clearRect(left, top, wide, high);
  mask.smallPen.drawImage(mask.canvas, left, top, wide, high, left, top, wide, high);
  objects = null;
}

function readMask([left, top, right, bottom]) {  // what was painted there, as bits
  left = Math.max(0, Math.floor(left));
  top = Math.max(0, Math.floor(top));
  const wide = Math.min(size[0], Math.ceil(right)) - left, high = Math.min(size[1], Math.ceil(bottom)) - top;
  if (wide <= 0 || high <= 0) return;
  const { data } = mask.pen.getImageData(left, top, wide, high), bits = mask.bits.slice();
  for (let y = 0; y < high; y++) {
    const to = (top + y) * size[0] + left;
    for (let x = 0; x < wide; x++) {
      const bit = data[4 * (y * wide + x) + 3] >> 7;
      mask.marked += bit - bits[to + x];
      bits[to + x] = bit;
    }
  }
  mask.bits = bits;
  mask.version = newVersion();
  paintMask(left, top, wide, high);
  commit();
}

function paintLine(from, to, wide, erase = false) {  // in pixels of the picture; returns the rectangle it is in
  for (const [pen, factor] of [[mask.pen, 1], [mask.smallPen, mask.factor]]) {
    pen.setTransform(factor, 0, 0, factor, 0, 0);
    pen.globalCompositeOperation = erase ? "destination-out" : "source-over";
    pen.strokeStyle = "#fff";
    pen.lineWidth = wide;
    pen.lineCap = "round";
    pen.beginPath();
    pen.moveTo(...from);
    pen.lineTo(to[0] + 0.01, to[1]);
    pen.stroke();
    pen.globalCompositeOperation = "source-over";
  }
  mask.pen.setTransform(1, 0, 0, 1, 0, 0);
  const reach = wide / 2 + 2;
  return [Math.min(from[0], to[0]) - reach, Math.min(from[1], to[1]) - reach, Math.max(from[0], to[0]) + reach, Math.max(from[1], to[1]) + reach];
}

const joined = (a, b) => (a ? [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[2], b[2]), Math.max(a[3], b[3])] : b);

async function bitsOf(image) {  // white of an image, as load_mask sees it
  if (image.naturalWidth !== size[0] || image.naturalHeight !== size[1]) {
    throw new Error(`the mask is ${image.naturalWidth}x${image.naturalHeight} pixels, the picture ${size.join("x")}: make them the same size`);
  }
  const sheet = document.createElement("canvas");
  [sheet.width, sheet.height] = size;
  const pen = sheet.getContext("2d");
  pen.fillRect(0, 0, ...size);
  pen.drawImage(image, 0, 0);
  const { data } = pen.getImageData(0, 0, ...size);
  const gray = (i) => (19595 * data[i] + 38470 * data[i + 1] + 7471 * data[i + 2]) >> 16;
  return Uint8Array.from({ length: size[0] * size[1] }, (_, i) => (gray(4 * i) >= 128 ? 1 : 0));
}

async function loadMask(file) {  // by way of the server, which reads it as the command does
  const { mask: path } = await api("/mask", { data: await base64(file) });
  if (!path) throw new Error("the mask is all black: paint white what may change");
  setMask(await bitsOf(await loadImage(query("/picture", { image: path }))));
  commit();
}

async function isMask(file) {  // true for an image of the picture's size that is black and white
  const url = URL.createObjectURL(file);
  try {
    const image = await loadImage(url), sheet = document.createElement("canvas"), pen = sheet.getContext("2d");
    if (image.naturalWidth !== size[0] || image.naturalHeight !== size[1]) return false;
    [sheet.width, sheet.height] = size;
    pen.drawImage(image, 0, 0);
    return pen.getImageData(0, 0, ...size).data.every((value, i) => i % 4 === 3 || value < 16 || value > 239);
  } catch { return false; } finally { URL.revokeObjectURL(url); }
}

async function maskFile() {  // the mask as PNG, in base64
  const sheet = document.createElement("canvas");
  [sheet.width, sheet.height] = size;
  const pen = sheet.getContext("2d");
  pen.fillRect(0, 0, ...size);
  pen.drawImage(mask.canvas, 0, 0);
  return new Promise((resolve) => sheet.toBlob(resolve, "image/png"));
}

async function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("the file cannot be read"));
    reader.readAsDataURL(blob);
  });
}

async function sendMask() {  // so that the server has the mask under mask.path
  const version = mask.version;
  if (mask.sent === version) return;
  const path = mask.marked ? (await api("/mask", { data: await base64(await maskFile()) })).mask : null;
  if (mask.version === version) { mask.path = path; mask.sent = version; }
}

async function options() {
  await sendMask();
  const { image, drags, prompt, model, config, seed } = edit;
  return { image, drags, mask: mask.path, prompt, model, config, seed, ...settings.fixed };
}

// What a generated picture depends on. As long as it is the same, a drag starts from the picture's own latent:
// the options then name no image, and the server makes it again.
const recipe = () => JSON.stringify([edit.prompt, edit.negative, edit.guidance, edit.model, edit.seed, edit.config.steps, edit.config.size]);

async function wanted() {
  const asked = await options();
  return edit.made === recipe() ? { ...asked, image: null, negative: edit.negative, guidance: edit.guidance } : asked;
}

const generate = attempt(async () => {
  if (!edit.prompt.trim()) throw new Error("say in the prompt what the picture shall show");
  const { negative, guidance } = edit, asked = { ...(await options()), image: null, mask: null, drags: [], negative, guidance };
  await submit(asked);
  await poll();
});

async function submit(asked) {
  const { number } = await api("/submit", asked);
  sent.set(number, standing());
  const waits = watchedJob();
  if (waits) say("added to the queue");
  else watched = number;
  return !waits;
}

const standing = () => JSON.stringify([edit, mask.version]);

async function openOptions(given) {  // in the form of run.json, with pictures that the server has
  const image = await loadImage(query("/picture", { image: given.image }));
  picture = image;
  size = [image.naturalWidth, image.naturalHeight];
  const base = settings ? settings.presets.default : {};
  edit = {
    image: given.image,
    drags: (given.drags || []).map(({ handle, target }) => ({ handle: [...handle], target: [...target] })),
    prompt: given.prompt || "",
    negative: given.negative || "",
    guidance: given.guidance ?? 7.5,
    made: "",
    model: !settings || settings.models.includes(given.model) ? given.model : edit.model,
    config: { ...base, ...given.config },
    seed: given.seed || 0,
  };
  setMask(new Uint8Array(size[0] * size[1]));
  if (given.mask) setMask(await bitsOf(await loadImage(query("/picture", { image: given.mask }))));
  if (given.made) edit.made = recipe();
  if (given.lora) say(`that run used the LoRA ${String(given.lora).split(/[\\/]/).pop()}: here one is trained on the picture instead`);
  half = selected = action = null;
  view.fit = true;
  $("brush-size").value = Math.round(100 * Math.sqrt(0.12));
  fillForm();
  commit();
}

async function upload(file) {
  if (file.size > 48 * 2 ** 20) throw new Error("the file has more than 48 MB: send a smaller one");
  say("opening the picture");
  const { image } = await api("/picture", { data: await base64(file) });
  $("toast").hidden = true;
  return image;
}

async function openFiles(files) {
  const list = [...files], json = list.find((file) => file.name.endsWith(".json") || file.type === "application/json");
  const images = list.filter((file) => file !== json);
  if (!json && !images.length) return;
  show("edit");
  if (!json && mode === "mask" && await isMask(images[0])) return loadMask(images[0]);
  if (!json) return openOptions({ image: await upload(images[0]), model: edit.model, config: edit.config, seed: edit.seed });
  let values;
  try { values = JSON.parse(await json.text()); } catch { throw new Error(`${json.name} cannot be read as JSON`); }
  const found = await api("/match", values);
  for (const name of ["image", "mask"]) {
    const base = String(values[name] || values.picture || "").split(/[\\/]/).pop();
    const file = values[name] && images.find((one) => one.name === base);
    if (file) found[name] = name === "image" ? await upload(file) : (await api("/mask", { data: await base64(file) })).mask;
    if (values[name] && !found[name]) throw new Error(`the run's ${name} ${base} is not here: drop it together with ${json.name}`);
  }
  if (!found.image) throw new Error(`${json.name} names no image that is here: drop it together with ${json.name}`);
  await openOptions({ ...values, ...found });
}

// ---- preview: the object under a handle, cut out and moved; what it uncovers is filled from around it

let objects = null;  // of the handles: {key, cut: [canvas], fill: canvas}
const GRID = 160;

function findObjects(handles) {
  const key = JSON.stringify([edit.image, mask.version, handles]);
  if (objects && objects.key === key) return objects;
  const shrink = Math.min(1, GRID / Math.max(...size)), w = Math.max(8, Math.round(size[0] * shrink)), h = Math.max(8, Math.round(size[1] * shrink));
  const sheet = document.createElement("canvas");
  [sheet.width, sheet.height] = [w, h];
  const pen = sheet.getContext("2d", { willReadFrequently: true });
  pen.drawImage(reduced(picture, 2 * w), 0, 0, w, h);
  const colors = pen.getImageData(0, 0, w, h).data;
  const seeds = handles.map(([x, y]) => [Math.min(w - 1, Math.floor((x + 0.5) / size[0] * w)), Math.min(h - 1, Math.floor((y + 0.5) / size[1] * h))]);
  const free = freeCells(w, h, seeds), labels = grow(w, h, colors, free, seeds);
  const fill = fillHoles(w, h, colors, labels);
  const big = Math.min(1, 1024 / Math.max(...size)), bw = Math.round(size[0] * big), bh = Math.round(size[1] * big);
  const cut = handles.map((_, i) => {
    const stamp = new ImageData(w, h);
    labels.forEach((label, cell) => { if (label === i + 1) stamp.data[4 * cell + 3] = 255; });
    pen.putImageData(stamp, 0, 0);
    const piece = document.createElement("canvas");
    [piece.width, piece.height] = [bw, bh];
    const ink = piece.getContext("2d");
    ink.drawImage(sheet, 0, 0, bw, bh);
    ink.globalCompositeOperation = "source-in";
    ink.drawImage(reduced(picture, bw), 0, 0, bw, bh);
    return piece;
  });
  const moved = document.createElement("canvas");
  [moved.width, moved.height] = [bw, bh];
  objects = { key, cut, fill, moved };
  return objects;
}

function freeCells(w, h, seeds) {  // cells that an object may have: the mask's, or those near a handle
  const free = new Uint8Array(w * h), reach = 0.3 * Math.min(w, h);
  for (let y = 0; y < h; y++) {
    for (let x = 0; x < w; x++) {
      const px = Math.floor((x + 0.5) / w * size[0]), py = Math.floor((y + 0.5) / h * size[1]);
      const near = () => seeds.some(([sx, sy]) => Math.hypot(sx - x, sy - y) < reach);
      free[y * w + x] = (mask.marked ? mask.bits[py * size[0] + px] : near()) ? 1 : 0;
    }
  }
  return free;
}

function grow(w, h, colors, free, seeds) {
  // An object: free cells that are unlike those along the border of the free ones, as far as they connect to its
  // handle. If that is next to nothing, all that is nearer to the handle than to the border.
  const inner = free.includes(0), border = new Uint8Array(w * h), samples = [];
  for (let y = 0; y < h; y++) {
    for (let x = 0; x < w; x++) {
      const edge = x === 0 || y === 0 || x === w - 1 || y === h - 1, at = y * w + x;
      border[at] = free[at] && (inner ? !edge && !(free[at - 1] && free[at + 1] && free[at - w] && free[at + w]) : edge) ? 1 : 0;
      if (border[at]) samples.push(4 * at);
    }
  }
  const unlike = (cell) => {
    const i = 4 * cell;
    return samples.every((j) => Math.abs(colors[i] - colors[j]) > 26 || Math.abs(colors[i + 1] - colors[j + 1]) > 26 || Math.abs(colors[i + 2] - colors[j + 2]) > 26);
  };
  const may = Uint8Array.from(free, (value, cell) => (value && !border[cell] && unlike(cell) ? 1 : 0));
  const found = spread(w, h, seeds, [], may);
  if (found.reduce((sum, label) => sum + (label ? 1 : 0), 0) > 0.03 * free.reduce((sum, value) => sum + value, 0)) return found;
  return spread(w, h, seeds, samples.map((i) => i / 4), free);
}

function spread(w, h, seeds, others, may) {  // labels 1, 2, ... of the seed that is nearest by way of cells that may be taken
  const label = new Uint8Array(w * h).fill(255), list = [];
  const take = (x, y, value, always) => {
    const cell = y * w + x;
    if (x < 0 || y < 0 || x >= w || y >= h || label[cell] !== 255 || !(always || may[cell])) return;
    label[cell] = value;
    list.push(cell);
  };
  seeds.forEach(([x, y], i) => { for (let dy = -1; dy <= 1; dy++) for (let dx = -1; dx <= 1; dx++) take(x + dx, y + dy, i + 1, true); });
  for (const cell of others) take(cell % w, Math.floor(cell / w), 0, true);
  for (let next = 0; next < list.length; next++) {
    const x = list[next] % w, y = Math.floor(list[next] / w);
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) take(x + dx, y + dy, label[list[next]], false);
  }
  return label.map((value) => (value === 255 ? 0 : value));
}

function fillHoles(w, h, colors, labels) {  // colors of the cells around, from coarse to fine
  const hole = new Uint8Array(w * h);
  for (let y = 0; y < h; y++) {
    for (let x = 0; x < w; x++) {
      for (let dy = -2; dy <= 2; dy++) for (let dx = -2; dx <= 2; dx++) if (labels[Math.min(h - 1, Math.max(0, y + dy)) * w + Math.min(w - 1, Math.max(0, x + dx))]) hole[y * w + x] = 1;
    }
  }
  let level = { w, h, data: Float32Array.from({ length: w * h * 4 }, (_, i) => (hole[i >> 2] ? 0 : i % 4 === 3 ? 1 : colors[i])) };
  const levels = [level];
  while (level.w > 1 || level.h > 1) {
    const small = { w: (level.w + 1) >> 1, h: (level.h + 1) >> 1 };
    small.data = new Float32Array(small.w * small.h * 4);
    for (let y = 0; y < level.h; y++) for (let x = 0; x < level.w; x++) {
      const from = 4 * (y * level.w + x), to = 4 * ((y >> 1) * small.w + (x >> 1));
      for (let c = 0; c < 4; c++) small.data[to + c] += level.data[from + c];
    }
    levels.push((level = small));
  }
  for (let i = levels.length - 1; i >= 0; i--) smooth(levels[i], levels[i + 1]);
  const sheet = document.createElement("canvas"), image = new ImageData(w, h);
  [sheet.width, sheet.height] = [w, h];
  for (let i = 0; i < w * h * 4; i++) image.data[i] = i % 4 === 3 ? 255 * hole[i >> 2] : levels[0].data[i];
  sheet.getContext("2d").putImageData(image, 0, 0);
  return sheet;
}

function smooth({ w, h, data }, coarse) {  // fill the cells of a level that have no color from the coarser one
  const empty = [];
  for (let cell = 0; cell < w * h; cell++) {
    const at = 4 * cell, weight = data[at + 3], from = coarse && 4 * ((Math.floor(cell / w) >> 1) * coarse.w + ((cell % w) >> 1));
    for (let c = 0; c < 3; c++) data[at + c] = weight ? data[at + c] / weight : coarse.data[from + c];
    data[at + 3] = 1;
    if (!weight) empty.push(cell);
  }
  for (let turn = 0; turn < 12; turn++) {
    for (const cell of empty) {
      const x = cell % w, around = [x ? cell - 1 : cell, x < w - 1 ? cell + 1 : cell, cell >= w ? cell - w : cell, cell < w * (h - 1) ? cell + w : cell];
      for (let c = 0; c < 3; c++) data[4 * cell + c] = around.reduce((sum, other) => sum + data[4 * other + c], 0) / 4;
    }
  }
}

function drawPreview(drags) {
  const { cut, fill, moved } = findObjects(drags.map((drag) => drag.handle)), pen = moved.getContext("2d");
  const big = moved.width / size[0];
  pen.globalCompositeOperation = "source-over";
  pen.clearRect(0, 0, moved.width, moved.height);
  drags.forEach(({ handle, target }, i) => pen.drawImage(cut[i], (target[0] - handle[0]) * big, (target[1] - handle[1]) * big));
  if (mask.marked) {
    pen.globalCompositeOperation = "destination-in";
    pen.drawImage(mask.small, 0, 0, moved.width, moved.height);
  }
  place(fill);
  place(moved);
}

// ---- drawing

let width = 1, height = 1, waiting = false;
let overlayKey = "";
const overlay = document.createElement("canvas");

function draw() {
  if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; render(); }); }
}

const halves = new WeakMap();  // an image and its halves, quarters, ...

function reduced(image, wide) {  // the smallest of them that is at least so wide: large images are slow to draw
  const list = halves.get(image) || [image], widthOf = (one) => one.naturalWidth || one.width, heightOf = (one) => one.naturalHeight || one.height;
  halves.set(image, list);
  for (let last = list[list.length - 1]; widthOf(last) >= 2 * wide && widthOf(last) > 256; last = list[list.length - 1]) {
    const half = document.createElement("canvas");
    [half.width, half.height] = [Math.round(widthOf(last) / 2), Math.round(heightOf(last) / 2)];
    half.getContext("2d").drawImage(last, 0, 0, half.width, half.height);
    list.push(half);
  }
  return list.filter((one) => widthOf(one) >= wide).pop() || image;
}

function placeImage(image) { place(reduced(image, frame()[0] * view.scale * (window.devicePixelRatio || 1))); }

function place(image) { context.drawImage(image, view.x, view.y, frame()[0] * view.scale, frame()[1] * view.scale); }

function frame() {  // size of what is shown: a result and a job may be of another picture than the one that is open
  const shown = showing === "result" && result ? result.original : showing === "watch" ? sceneOf(watchedJob()) : null;
  return shown ? [shown.naturalWidth, shown.naturalHeight] : size;
}

function sceneOf(job) {  // null: the picture that is open
  return job && scene.image === job.values.image && job.values.image !== edit.image ? scene.shown : null;
}

const onScreen = ([x, y]) => [view.x + (x + 0.5) * view.scale, view.y + (y + 0.5) * view.scale];

function fit() {
  const room = [$("views").hidden ? 24 : 62, 28, showing !== "result" ? 56 : width < 760 ? 112 : 72];  // top, sides, bottom
  const [wide, high] = frame();
  view.scale = Math.min((width - 2 * room[1]) / wide, (height - room[0] - room[2]) / high);
  view.x = (width - wide * view.scale) / 2;
  view.y = room[0] + (height - room[0] - room[2] - high * view.scale) / 2;
}

function render() {
  const sharp = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * sharp) || canvas.height !== Math.round(height * sharp)) {
    canvas.width = Math.round(width * sharp);
    canvas.height = Math.round(height * sharp);
  }
  context.setTransform(sharp, 0, 0, sharp, 0, 0);
  context.clearRect(0, 0, width, height);
  if (!picture) return;
  if (view.fit) fit();
  $("zoom").textContent = `${Math.round(100 * view.scale * sharp)} %`;
  context.imageSmoothingEnabled = view.scale * sharp < 12;
  context.imageSmoothingQuality = "medium";
  context.save();
  context.shadowColor = "rgb(0 0 0 / 22%)";
  context.shadowBlur = 18;
  context.shadowOffsetY = 3;
  context.fillRect(view.x, view.y, frame()[0] * view.scale, frame()[1] * view.scale);
  context.restore();
  if (showing === "result" && result) renderResult();
  else if (showing === "watch") renderWatch();
  else renderEdit();
}

function renderEdit() {
  placeImage(picture);
  const drags = current();
  const dragged = action && ["pair", "move"].includes(action.kind) && action.moved;
  const ghost = half && half.target && !action;
  if (drags.length && (previewing || dragged || ghost)) drawPreview(drags);
  renderMask();
  drags.forEach((drag, i) => drawArrow(onScreen(drag.handle), onScreen(drag.target)));
  edit.drags.forEach((drag, i) => {
    drawPoint(drag.target, BLUE, i + 1, selected && selected.index === i && selected.which === "target");
    drawPoint(drag.handle, RED, i + 1, selected && selected.index === i && selected.which === "handle");
  });
  if (half) {
    if (half.target) drawPoint(half.target, BLUE, edit.drags.length + 1, false);
    drawPoint(half.handle, RED, edit.drags.length + 1, true);
  }
  if (mode === "mask" && pointer && !space) {
    circle(pointer.x, pointer.y, (brushWidth() / 2) * view.scale);
    context.lineWidth = 3;
    context.strokeStyle = "rgb(0 0 0 / 45%)";
    context.stroke();
    context.lineWidth = 1.5;
    context.strokeStyle = "#fff";
    context.stroke();
  }
}

const current = () => (half && half.target ? [...edit.drags, half] : edit.drags);

function renderMask() {
  const painting = action && action.kind === "paint";
  if (!mask.marked && !painting) return;
  const sharp = window.devicePixelRatio || 1, pen = overlay.getContext("2d");
  const area = [view.x, view.y, size[0] * view.scale, size[1] * view.scale];
  const key = [mask.version, painting ? action.strokes : 0, mode, sharp, width, height, ...area].join();
  if (key !== overlayKey) {
    overlayKey = key;
    overlay.width = canvas.width;
    overlay.height = canvas.height;
    pen.setTransform(sharp, 0, 0, sharp, 0, 0);
    pen.imageSmoothingEnabled = context.imageSmoothingEnabled;
    const stamp = (dx, dy) => pen.drawImage(mask.small, area[0] + dx, area[1] + dy, area[2], area[3]);
    for (let turn = 0; turn < 8; turn++) stamp(1.6 * Math.cos(turn * Math.PI / 4), 1.6 * Math.sin(turn * Math.PI / 4));
    pen.globalCompositeOperation = "destination-over";
    pen.fillStyle = mode === "mask" ? "rgb(8 10 16 / 58%)" : "rgb(8 10 16 / 42%)";
    pen.fillRect(...area);
    pen.globalCompositeOperation = "destination-out";
    stamp(0, 0);
  }
  context.save();
  context.beginPath();
  context.rect(...area);
  context.clip();
  context.drawImage(overlay, 0, 0, width, height);
  context.restore();
}

function renderWatch() {
  const job = watchedJob();
  placeImage(sceneOf(job) || picture);
  if (!job) return;
  if (foreseen.image && foreseen.key.startsWith(`${job.number}-`)) place(foreseen.image);
  const { drags } = job.values;
  drags.forEach((drag, i) => drawTrail(job.paths[i] || [], drag));
  if (!job.paths.length) drags.forEach((drag, i) => { drawArrow(onScreen(drag.handle), onScreen(drag.target)); drawPoint(drag.target, BLUE, i + 1); drawPoint(drag.handle, RED, i + 1); });
}

function drawTrail(path, drag) {
  drawPoint(drag.target, BLUE);
  if (!path.length) return;
  for (const [color, thick] of [["#fff", 5], [RED, 2.5]]) {
    context.beginPath();
    path.forEach((at, i) => context[i ? "lineTo" : "moveTo"](...onScreen(at)));
    context.lineWidth = thick;
    context.strokeStyle = color;
    context.lineJoin = context.lineCap = "round";
    context.stroke();
  }
  drawPoint(path[path.length - 1], RED);
}

function renderResult() {
  const edited = $("show-raw").checked && result.raw ? result.raw : result.edited;
  const [wide, high] = frame(), border = view.x + split * wide * view.scale;
  placeImage(result.original);
  context.save();
  context.beginPath();
  context.rect(border, 0, width, height);
  context.clip();
  placeImage(edited);
  context.restore();
  if ($("show-paths").checked) result.options.drags.forEach((drag, i) => drawTrail((result.result.paths || [])[i] || [], drag));
  const top = view.y, bottom = view.y + high * view.scale, middle = (top + bottom) / 2;
  context.lineWidth = 4;
  context.strokeStyle = "rgb(0 0 0 / 35%)";
  line(border, top, border, bottom);
  context.lineWidth = 2;
  context.strokeStyle = "#fff";
  line(border, top, border, bottom);
  circle(border, middle, 15);
  context.fillStyle = "#fff";
  context.fill();
  context.strokeStyle = "#1f2228";
  context.lineWidth = 1.8;
  for (const side of [-1, 1]) {
    context.beginPath();
    context.moveTo(border + side * 4, middle - 4);
    context.lineTo(border + side * 8, middle);
    context.lineTo(border + side * 4, middle + 4);
    context.stroke();
  }
}

function line(x, y, u, v) { context.beginPath(); context.moveTo(x, y); context.lineTo(u, v); context.stroke(); }
function circle(x, y, radius) { context.beginPath(); context.arc(x, y, Math.max(0.5, radius), 0, 2 * Math.PI); }

function drawArrow([x, y], [u, v]) {
  const length = Math.hypot(u - x, v - y), radius = 9;
  if (length < 2 * radius) return;
  const [ax, ay] = [(u - x) / length, (v - y) / length];
  const at = (ahead, aside) => [x + ahead * ax - aside * ay, y + ahead * ay + aside * ax];
  const tip = length - radius, neck = tip - 9;
  context.lineCap = context.lineJoin = "round";
  for (const [color, more] of [["rgb(0 0 0 / 55%)", 3], ["#fff", 0]]) {
    context.strokeStyle = context.fillStyle = color;
    context.lineWidth = 3 + more;
    line(x, y, ...at(neck, 0));
    context.beginPath();
    context.moveTo(...at(tip, 0));
    context.lineTo(...at(neck, 6));
    context.lineTo(...at(neck, -6));
    context.closePath();
    context.fill();
    if (more) { context.lineWidth = more; context.stroke(); }
  }
}

function drawPoint(at, color, number, chosen) {
  const [x, y] = onScreen(at);
  if (chosen) { circle(x, y, 14); context.fillStyle = "rgb(255 255 255 / 55%)"; context.fill(); }
  circle(x, y, number ? 9 : 6);
  context.fillStyle = color;
  context.fill();
  context.lineWidth = 2;
  context.strokeStyle = "#fff";
  context.stroke();
  if (!number) return;
  context.fillStyle = "#fff";
  context.font = "600 11px system-ui, sans-serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(number, x, y + 0.5);
}

// ---- pointer

const near = (event) => (event.pointerType === "touch" ? 26 : 15);

function whereIs(event) {
  const box = canvas.getBoundingClientRect();
  return { x: event.clientX - box.left, y: event.clientY - box.top };
}

function pixelAt({ x, y }) {
  const inside = (value, most) => Math.min(most - 1, Math.max(0, Math.floor(value)));
  return [inside((x - view.x) / view.scale, size[0]), inside((y - view.y) / view.scale, size[1])];
}

function hit(at, reach) {
  let best = null;
  edit.drags.forEach((drag, index) => ["handle", "target"].forEach((which) => {
    const [x, y] = onScreen(drag[which]), distance = Math.hypot(x - at.x, y - at.y);
    if (distance <= reach && (!best || distance < best.distance)) best = { index, which, distance };
  }));
  return best;
}

const brushWidth = () => Math.max(1, Math.round((Number($("brush-size").value) / 100) ** 2 * Math.min(...size)));

function stroke(from, to) {
  const at = (point) => [(point.x - view.x) / view.scale, (point.y - view.y) / view.scale];
  action.dirty = joined(action.dirty, paintLine(at(from), at(to), brushWidth(), action.erase));
  action.strokes = (action.strokes || 0) + 1;
}

const fingers = new Map();

canvas.addEventListener("pointerdown", (event) => {
  const at = whereIs(event);
  fingers.set(event.pointerId, at);
  canvas.setPointerCapture(event.pointerId);
  canvas.focus({ preventScroll: true });
  pointer = at;
  if (fingers.size === 2) return pinch();
  if (!picture || fingers.size > 2) return;
  if (event.button === 1 || space) action = { kind: "pan", from: at, x: view.x, y: view.y };
  else if (event.button !== 0 && event.button !== 5) return;
  else if (showing === "result") { action = { kind: "split" }; slide(at); }
  else if (showing === "watch") action = { kind: "pan", from: at, x: view.x, y: view.y };
  else if (mode === "mask") { action = { kind: "paint", last: at, erase: tool === "eraser" || event.button === 5 }; stroke(at, at); }
  else pressPoint(at, near(event));
  event.preventDefault();
  draw();
});

function pressPoint(at, reach) {
  const found = hit(at, reach);
  if (half) {
    half.target = pixelAt(at);
    action = { kind: "pair", down: at, moved: true };
  } else if (found) {
    selected = { index: found.index, which: found.which };
    action = { kind: "move", down: at, moved: false };
    drawDrags();
  } else {
    selected = null;
    half = { handle: pixelAt(at), target: null };
    action = { kind: "pair", down: at, moved: false };
    drawDrags();
  }
}

canvas.addEventListener("pointermove", (event) => {
  const at = whereIs(event);
  pointer = event.pointerType === "touch" ? null : at;
  if (fingers.has(event.pointerId)) fingers.set(event.pointerId, at);
  if (action && action.kind === "pinch") return movePinch();
  if (!action) { if (half && mode === "points") half.target = pixelAt(at); cursor(); return draw(); }
  if (action.down && Math.hypot(at.x - action.down.x, at.y - action.down.y) > 4) action.moved = true;
  if (action.kind === "pan") { view.fit = false; view.x = action.x + at.x - action.from.x; view.y = action.y + at.y - action.from.y; }
  if (action.kind === "split") slide(at);
  if (action.kind === "pair" && action.moved) half.target = pixelAt(at);
  if (action.kind === "move" && action.moved) { edit.drags[selected.index][selected.which] = pixelAt(at); drawDrags(); }
  if (action.kind === "paint") {
    const path = event.getCoalescedEvents ? event.getCoalescedEvents().map(whereIs) : [];
    for (const point of path.length ? path : [at]) { stroke(action.last, point); action.last = point; }
  }
  draw();
});

function release(event) {
  fingers.delete(event.pointerId);
  if (!action) return;
  const done = action;
  action = null;
  if (done.kind === "pinch") return;
  if (done.kind === "paint") readMask(done.dirty);
  if (done.kind === "move" && done.moved) commit();
  if (done.kind === "pair" && half && half.target && done.moved) finishPair();
  if (half && !half.target) announce("handle set: now its target");
  cursor();
  draw();
}

canvas.addEventListener("pointerup", release);
canvas.addEventListener("pointercancel", (event) => { if (action && action.kind === "pair") half = null; release(event); });
canvas.addEventListener("pointerleave", () => { pointer = null; draw(); });

function finishPair() {
  if (half.handle.join() === half.target.join()) { half.target = null; return; }
  edit.drags.push(half);
  half = null;
  selected = { index: edit.drags.length - 1, which: "target" };
  commit();
}

function pinch() {
  if (action && action.kind === "paint") paintMask(0, 0, ...size);  // the first finger's dot was not meant
  if (action && action.kind === "pair") half = null;
  const [a, b] = [...fingers.values()];
  action = { kind: "pinch", apart: Math.hypot(a.x - b.x, a.y - b.y), x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, view: { ...view } };
  draw();
}

function movePinch() {
  const [a, b] = [...fingers.values()];
  if (!b) return;
  const factor = Math.hypot(a.x - b.x, a.y - b.y) / action.apart, before = action.view;
  view.fit = false;
  view.scale = limited(before.scale * factor);
  view.x = (a.x + b.x) / 2 - (action.x - before.x) * view.scale / before.scale;
  view.y = (a.y + b.y) / 2 - (action.y - before.y) * view.scale / before.scale;
  draw();
}

const limited = (scale) => Math.min(80, Math.max(24 / Math.max(...size), scale));

function zoom(factor, at = { x: width / 2, y: height / 2 }) {
  const scale = limited(view.scale * factor);
  view.x = at.x - (at.x - view.x) * scale / view.scale;
  view.y = at.y - (at.y - view.y) * scale / view.scale;
  view.scale = scale;
  view.fit = false;
  draw();
}

canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0016)), whereIs(event));
}, { passive: false });

function slide(at) {
  split = Math.min(1, Math.max(0, (at.x - view.x) / (frame()[0] * view.scale)));
  $("compare").value = Math.round(1000 * split);
}

function cursor() {
  const over = mode === "points" && showing === "edit" && pointer && hit(pointer, 15);
  canvas.className = space ? "grab" : showing === "result" ? "split" : showing === "watch" ? "grab" : mode === "mask" ? "none" : over ? "move" : "";
}

// ---- keys

function typing(target) { return target.matches("textarea, select, input:not([type=range]):not([type=checkbox])"); }

window.addEventListener("keydown", (event) => {
  if ($("help-box").open) return;
  const command = event.ctrlKey || event.metaKey, key = event.key.toLowerCase();
  if (command && key === "enter") { event.preventDefault(); event.target.blur(); return $("run").click(); }  // what is typed counts
  if (typing(event.target) && !(command && event.target.matches("select"))) return;
  if ((key === "[" || key === "]") && !event.metaKey && (event.altKey || !event.ctrlKey)) {  // on some keyboards with AltGr, which is Ctrl and Alt
    $("brush-size").value = Number($("brush-size").value) + (key === "[" ? -4 : 4);
    return draw();
  }
  if (command && (key === "z" || key === "y")) { event.preventDefault(); return step(key === "y" || event.shiftKey ? 1 : -1); }
  if (command || event.altKey) return;
  const keys = { p: "mode-points", m: "mode-mask", b: "brush", e: "eraser", v: "preview", n: "add-drag", delete: "delete", backspace: "delete", "+": "zoom-in", "=": "zoom-in", "-": "zoom-out", 0: "zoom-fit", "?": "help" };
  if (keys[key]) { if (key === "b" || key === "e") setMode("mask"); event.preventDefault(); return $(keys[key]).click(); }
  if (key === "escape") {
    half = null;
    if (action && action.kind === "move") { edit.drags = structuredClone(past[now].edit.drags); drawDrags(); }
    if (action && ["pair", "move"].includes(action.kind)) action = null;
    draw();
  }
  if (key === " " && (event.target === canvas || event.target === document.body)) { space = true; cursor(); event.preventDefault(); }
  if (event.target === canvas) keyOnCanvas(event);
});
window.addEventListener("keyup", (event) => { if (event.key === " ") { space = false; cursor(); } });
window.addEventListener("blur", () => { space = false; });

function keyOnCanvas(event) {
  const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (ways[event.key] && showing === "result") { split = Math.min(1, Math.max(0, split + 0.02 * ways[event.key][0])); $("compare").value = 1000 * split; draw(); event.preventDefault(); }
  else if (ways[event.key] && selected) {
    const [x, y] = edit.drags[selected.index][selected.which], far = event.shiftKey ? 10 : 1;
    movePoint(selected.index, selected.which, [x + far * ways[event.key][0], y + far * ways[event.key][1]]);
    event.preventDefault();
  } else if (event.key === "Tab" && edit.drags.length && showing === "edit") {
    const at = selected ? 2 * selected.index + (selected.which === "target" ? 1 : 0) : event.shiftKey ? 2 * edit.drags.length : -1;
    const next = at + (event.shiftKey ? -1 : 1);
    if (next < 0 || next >= 2 * edit.drags.length) { selected = null; drawDrags(); return draw(); }
    selected = { index: next >> 1, which: next % 2 ? "target" : "handle" };
    announce(`${selected.which} ${selected.index + 1} at ${edit.drags[selected.index][selected.which].join(", ")}`);
    event.preventDefault();
    drawDrags();
    draw();
  }
}

function movePoint(index, which, [x, y]) {
  edit.drags[index][which] = [Math.min(size[0] - 1, Math.max(0, x)), Math.min(size[1] - 1, Math.max(0, y))];
  commit();
}

// ---- form

function setMode(to) {
  mode = to;
  half = null;
  show("edit");
  for (const name of ["points", "mask"]) $(`mode-${name}`).setAttribute("aria-checked", name === mode);
  for (const name of ["brush", "eraser"]) $(name).setAttribute("aria-checked", name === tool);
  $("mask-tools").hidden = mode !== "mask";
  $("point-tools").hidden = mode !== "points";
  cursor();
  draw();
}

const HINTS = {
  points: "Press on something, drag it to where it should be, let go. Or click it, then click where it should go.",
  mask: "Paint what may change. An object inside the mask moves as a whole; one that the mask cuts is stretched.",
  watch: "What the model foresees at this step of the drag.",
  result: "Drag the line to compare.",
};

function show(to) {
  if (to === "result" && !result) to = "edit";
  const before = showing;
  showing = to;
  if (before !== to && (before === "edit" || to === "edit")) view.fit = true;
  for (const name of ["edit", "watch", "result"]) $(`view-${name}`).setAttribute("aria-checked", name === showing);
  $("view-watch").hidden = !watchedJob();
  $("view-result").hidden = !result;
  $("views").hidden = !watchedJob() && !result;
  $("compare-box").hidden = showing !== "result";
  $("result-card").hidden = showing !== "result";
  $("hint").textContent = HINTS[showing === "edit" ? mode : showing];
  cursor();
  draw();
}

function element(name, values = {}, ...inside) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(values)) key in made ? (made[key] = value) : made.setAttribute(key, value);
  made.append(...inside);
  return made;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "icon");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

function drawDrags() {
  const list = $("drags");
  $("drag-count").textContent = edit.drags.length || "";
  $("delete").disabled = !selected;
  if (list.contains(document.activeElement) && list.children.length === edit.drags.length) {
    return [...list.children].forEach((row, index) => fillRow(row, index));
  }
  list.replaceChildren(...edit.drags.map((drag, index) => {
    const row = element("li", {}, element("b", { textContent: index + 1 }));
    for (const which of ["handle", "target"]) {
      row.append(element("span", { className: which === "target" ? "dot to" : "dot" }));
      for (const axis of [0, 1]) {
        const input = element("input", { type: "number", step: "any", "aria-label": `${which} ${index + 1}, ${"xy"[axis]}` });
        input.onchange = () => {
          const to = [...edit.drags[index][which]];
          if (input.value === "") return drawDrags();
          to[axis] = Number(input.value);
          selected = { index, which };
          movePoint(index, which, to);
        };
        input.onfocus = () => { selected = { index, which }; fillRows(); draw(); };
        row.append(input);
      }
    }
    const drop = element("button", { className: "round", "aria-label": `Delete drag ${index + 1}`, title: "Delete" }, icon("close"));
    drop.onclick = () => remove(index);
    row.append(drop);
    fillRow(row, index);
    return row;
  }));
}

function fillRows() { [...$("drags").children].forEach(fillRow); $("delete").disabled = !selected; }

function fillRow(row, index) {
  const { handle, target } = edit.drags[index], values = [...handle, ...target];
  row.className = selected && selected.index === index ? "selected" : "";
  row.querySelectorAll("input").forEach((input, i) => { if (input !== document.activeElement) input.value = values[i]; });
}

function remove(index) {
  edit.drags.splice(index, 1);
  selected = action = null;
  commit();
}

function fillForm() {
  $("prompt").value = edit.prompt;
  $("model").value = edit.model;
  $("seed").value = edit.seed;
  $("negative").value = edit.negative;
  $("guidance").value = edit.guidance;
  $("size").textContent = size.join(" \u00d7 ");
  for (const input of document.querySelectorAll("[data-setting]")) {
    const value = edit.config[input.dataset.setting];
    if (input.type === "checkbox") input.checked = value;
    else input.value = value ?? "";
  }
  noteModel();
}

function noteModel() {
  const notes = { tiny: start && !edit.image.includes("tiny/demo") ? "The small model knows only rendered scenes: for a photo, choose sd15." : "", sd15: state.model === "sd15" ? "" : "Stable Diffusion 1.5 is downloaded on first use: 4.3 GB, half of that in half precision." };
  $("model-note").textContent = notes[edit.model] || "";
  $("model-note").hidden = !notes[edit.model];
}

function buildForm() {
  $("model").replaceChildren(...settings.models.map((name) => element("option", { value: name, textContent: name })));
  $("presets").replaceChildren(...Object.keys(settings.presets).map((name) => {
    const card = element("button", { role: "radio", "data-preset": name }, element("strong", {}, name, element("em")), element("small", { textContent: settings.abouts[name] }));
    card.onclick = () => { edit.config = { ...settings.presets[name] }; fillForm(); commit(); };
    return card;
  }));
  const groups = { "LoRA, trained on the picture": [], Edit: [] };
  for (const field of settings.fields) groups[field.name.startsWith("lora_") ? "LoRA, trained on the picture" : "Edit"].push(buildField(field));
  $("settings").replaceChildren(...Object.entries(groups).flatMap(([name, rows]) => [element("h3", { textContent: name }), ...rows]));
}

function buildField({ name, help, kind, least, most, choices, optional }) {
  const input = choices
    ? element("select", {}, ...choices.map((value) => element("option", { value, textContent: value })))
    : element("input", { type: kind === "bool" ? "checkbox" : "number" });
  input.dataset.setting = name;
  if (input.type === "number") Object.assign(input, { min: least ?? "", max: most ?? "", step: kind === "int" ? 1 : "any", placeholder: optional ? "auto" : "" });
  input.onchange = () => {
    let value = kind === "bool" ? input.checked : input.value;
    if (input.type === "number") {
      if (!input.checkValidity() || (value === "" && !optional)) { say(`${words(name)}: ${input.validationMessage || "a number, please"}`); return fillForm(); }
      value = value === "" ? null : Number(value);
    }
    edit.config[name] = value;
    commit();
  };
  return element("label", { className: "field" }, element("span", { textContent: words(name) }), input, element("small", { textContent: help }));
}

const words = (name) => name.replaceAll("_", " ").replace("lora", "LoRA");

function markPreset() {
  if (!settings) return;
  const changes = (preset) => Object.keys(preset).filter((name) => preset[name] !== edit.config[name]);
  const counts = Object.entries(settings.presets).map(([name, preset]) => [name, changes(preset)]);
  const [closest, differing] = counts.reduce((best, one) => (one[1].length < best[1].length ? one : best));
  for (const card of $("presets").children) {
    const chosen = card.dataset.preset === closest;
    card.setAttribute("aria-checked", chosen);
    if (chosen) $("reset").onclick = () => card.click();
  }
  for (const input of document.querySelectorAll("[data-setting]")) input.closest(".field").classList.toggle("changed", differing.includes(input.dataset.setting));
  $("changed").textContent = differing.length ? `${differing.length} of its settings changed: ${differing.slice(0, 3).map(words).join(", ")}${differing.length > 3 ? " ..." : ""}` : "";
  $("changes").hidden = !differing.length;
}

const duration = (seconds) => (seconds < 100 ? `${Math.max(1, Math.round(seconds))} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`);

// ---- what the server says about an edit before it runs

const check = later(350, async () => {
  if (!settings || !edit.image) return;
  const asked = await options(), text = JSON.stringify(asked), found = await api("/check", asked);
  if (text !== JSON.stringify(await options())) return;
  const problem = edit.drags.length ? found.error : null;
  $("error").textContent = problem || "";
  $("error").hidden = !problem;
  $("notes").replaceChildren(...(edit.drags.length ? found.notes : ["make a drag first"]).map((note) => element("li", { textContent: note })));
  for (const card of $("presets").children) {
    const seconds = found.seconds[card.dataset.preset];
    const time = card.getAttribute("aria-checked") === "true" ? found.seconds.now : seconds;
    card.querySelector("em").textContent = time ? `\u2264 ${duration(time)}` : "";
    card.title = time ? "at most, by the last run on this machine" : "not run on this machine yet, so its time is not known";
  }
  ready = found.ready ? loraKey() : ready;
  showLora();
});

let ready = "";
const loraKey = () => JSON.stringify([edit.image, edit.prompt, edit.model, edit.seed, edit.config.size, ...Object.keys(edit.config).filter((name) => name.startsWith("lora_")).map((name) => edit.config[name])]);

const prepare = later(1500, async () => {
  if (!settings || !edit.image || !$("ahead").checked || !edit.config.lora_steps) return;
  const key = loraKey();
  if (key === lastPrepared || key === ready) return;
  lastPrepared = key;
  const { mask: _, ...asked } = await options();
  await api("/prepare", { ...asked, mask: null });
  poll();
});

function showLora() {
  const chip = $("lora-state"), ahead = state.ahead, key = loraKey();
  let text = "", kind = "";
  if (!edit.config.lora_steps) text = "";
  else if (ready === key) [text, kind] = ["ready for this picture", "good"];
  else if (ahead && ahead.kind === "learn" && lastPrepared === key) {
    if (ahead.state === "done") { ready = key; [text, kind] = ["ready for this picture", "good"]; check(); }
    if (ahead.state === "waiting") [text, kind] = ["will learn this picture", "busy"];
    if (ahead.state === "running") [text, kind] = [ahead.stage === "LoRA" ? `learning this picture, ${ahead.done} of ${ahead.total}` : "learning this picture", "busy"];
    if (ahead.state === "failed") [text, kind] = [ahead.message, "bad"];
    if (ahead.state === "stopped" && !state.jobs.some(active)) { lastPrepared = ""; prepare(); }
  }
  chip.textContent = text;
  chip.className = `chip ${kind}`;
}

// ---- jobs

const active = (job) => ["waiting", "running"].includes(job.state);
const watchedJob = () => state.jobs.find((job) => job.number === watched && active(job));
let pollTimer, polling = false;

async function poll() {
  clearTimeout(pollTimer);
  if (polling) return;
  polling = true;
  try {
    const before = state;
    state = await api("/state");
    if (!$("banner").hidden && $("banner").dataset.away) $("banner").hidden = true;
    await follow(before);
  } catch (error) {
    if (error.away) { $("banner").textContent = error.status === 403 ? "The program was started anew: open the address that it printed." : "The program does not answer. What you made is kept; start it again and reload."; $("banner").dataset.away = "1"; $("banner").hidden = false; }
    else say(error.message);
  }
  polling = false;
  const busy = state.jobs.some(active) || !state.model || (state.ahead && active(state.ahead));
  clearTimeout(pollTimer);
  pollTimer = setTimeout(poll, document.hidden ? 3000 : busy ? 400 : 1500);
}

async function follow(before) {
  if (state.model !== before.model) { check(); noteModel(); }
  const running = state.jobs.find((job) => job.state === "running");
  const wait = state.ahead && state.ahead.state === "failed" && state.ahead.kind === "load" ? state.ahead.message : "";
  const other = state.model && state.model !== edit.model;
  $("model-state").textContent = wait || (!state.model ? "loading the model" : other ? `${state.model} is loaded` : state.model);
  $("model-state").className = `chip ${wait ? "bad" : !state.model ? "busy" : "good"}`;
  showLora();
  if (watched === null && running) watched = running.number;  // after a reload, or of another tab
  for (const job of state.jobs) {
    const was = before.jobs.find((one) => one.number === job.number);
    if (!active(job) && (sent.has(job.number) || (was && active(was)))) await finished(job);  // it may have failed at once
  }
  showJobs();
  await lookAhead();
  const job = watchedJob();
  if (showing === "watch" && !job) show("edit");
  if (!$("view-watch").hidden !== Boolean(job)) show(showing);
  if (showing === "watch") draw();
}

async function lookAhead() {
  const job = watchedJob(), key = job && job.pictures ? `${job.number}-${job.pictures}` : "";
  if (job && job.values.image && job.values.image !== edit.image && job.values.image !== scene.image) {
    scene = { image: job.values.image, shown: await loadImage(query("/picture", { image: job.values.image })).catch(() => null) };
    if (showing === "watch") view.fit = true;
  }
  if (!key || key === foreseen.key || document.hidden) return;
  try {
    const image = await loadImage(query("/preview", { job: job.number, key }));
    foreseen = { key, image: job.values.mask && job.values.config.keep_background ? await within(image, job.values.mask) : image };
  } catch { /* the next one will do */ }
}

async function within(image, path) {  // what the edit will keep of a picture: the part in the mask
  const stencil = await loadImage(query("/picture", { image: path, v: 1 })), sheet = document.createElement("canvas"), pen = sheet.getContext("2d");
  [sheet.width, sheet.height] = [stencil.naturalWidth, stencil.naturalHeight];
  pen.drawImage(stencil, 0, 0);
  const sight = pen.getImageData(0, 0, sheet.width, sheet.height);
  for (let i = 0; i < sight.data.length; i += 4) sight.data[i + 3] = sight.data[i];
  pen.putImageData(sight, 0, 0);
  pen.globalCompositeOperation = "source-in";
  pen.drawImage(image, 0, 0, sheet.width, sheet.height);
  return sheet;
}

async function finished(job) {
  await drawHistory().catch(() => {});
  const seen = job.number === watched, untouched = await isUntouched(job);
  if (job.state === "failed") {
    say("the edit failed: below Run it says why");
    offered.set(job.number, job);
  }
  if (!seen && !sent.has(job.number)) return;
  sent.delete(job.number);
  if (seen) watched = null;
  announce(`the edit is ${job.state}`);
  if (job.run && untouched && !half && !action && showing !== "result") await open(job);
  else if (job.run) {
    offered.set(job.number, job);
    say(`edit ${job.number} is ${job.state}: Show, below Run, opens it`);
  } else if (job.state === "stopped") say(job.message);
  check();
}

async function isUntouched(job) {  // true if the edit is still what was sent; after a reload, if it equals that
  if (sent.has(job.number)) return sent.get(job.number) === standing();
  return Boolean(settings) && JSON.stringify(await wanted()) === JSON.stringify(job.values);
}

async function open(job) {  // what came of a job; the picture that is open stays, unless one was generated
  const made = `${start.runs}/${job.run}/generated.png`;
  if (job.values.drags.length) return openRun(job.run, job);
  await openOptions({ ...job.values, image: made, made: true });
  show("edit");
}

function showJobs() {
  const job = watchedJob(), stages = ["model", "sampling", ...STAGES];
  $("progress-card").hidden = !job;
  $("stop").disabled = Boolean(job && job.stopping);
  $("stop").textContent = job && job.stopping ? "Stopping" : "Stop";
  $("run").textContent = state.jobs.some(active) ? "Add to the queue" : "Run";
  if (job) {
    const learning = job.state === "waiting" && state.ahead && state.ahead.state === "running" && !state.jobs.some((one) => one.state === "running");
    const at = learning ? state.ahead : job;
    $("progress-title").textContent = job.state === "waiting" && !learning ? "Waiting for its turn" : `${at.stage || "starting"}${at.total ? `, ${at.done} of ${at.total}` : ""}`;
    $("progress-left").textContent = at.left !== null ? `about ${duration(at.left)} left` : "";
    if (at.total) $("progress").value = at.done / at.total;
    else if (at.state === "running") $("progress").removeAttribute("value");
    else $("progress").value = 0;
    const index = stages.indexOf(at.stage);
    $("stages").replaceChildren(...STAGES.map((name) => element("li", { textContent: name, className: stages.indexOf(name) < index ? "past" : name === at.stage ? "now" : "" })));
    drawPlot(job);
  }
  showQueue(state.jobs.filter((one) => one !== job && (active(one) || one.state === "interrupted" || offered.has(one.number))));
}

const rows = new Map();  // of the queue, made anew only for other buttons: else a click or the focus would be lost

function showQueue(jobs) {
  const before = [...rows.keys()], keys = jobs.map((job) => [job.number, job.state, offered.has(job.number)].join());
  jobs.forEach((job, i) => {
    if (!rows.has(keys[i])) rows.set(keys[i], queued(job));
    rows.get(keys[i]).firstChild.textContent = `Edit ${job.number}, ${told(job)}`;
  });
  for (const key of before) if (!keys.includes(key)) rows.delete(key);
  if (before.join(" ") !== keys.join(" ")) $("queue").replaceChildren(...keys.map((key) => rows.get(key)));
}

function told(job) {
  if (job.state === "running") return `running: ${job.stage} ${job.done} of ${job.total}`;
  return job.state === "interrupted" ? job.message : job.state === "failed" ? `failed: ${job.message}` : job.state;
}

function queued(job) {
  const row = element("li", {}, element("span"));
  if (job.state === "running") row.append(element("button", { className: "button", textContent: "Watch", onclick: () => { watched = job.number; show("watch"); } }));
  if (job.state === "interrupted") row.append(element("button", { className: "button", textContent: "Run again", onclick: attempt(async () => { watched = (await api("/submit", job.values)).number; await api("/stop", { number: job.number }); poll(); }) }));
  if (offered.has(job.number) && job.run) row.append(element("button", { className: "button", textContent: "Show", onclick: attempt(async () => { await open(job); offered.delete(job.number); showJobs(); }) }));
  const what = job.state === "running" ? "Stop" : offered.has(job.number) ? "Dismiss" : "Cancel";
  const drop = element("button", { className: "button", textContent: what, "aria-label": `${what} edit ${job.number}` });
  drop.onclick = attempt(async () => { if (!offered.delete(job.number)) await api("/stop", { number: job.number }); showJobs(); poll(); });
  row.append(drop);
  return row;
}

function drawPlot(job) {
  const lines = job.paths.map((path, i) => path.map(([x, y]) => Math.hypot(x - job.values.drags[i].target[0], y - job.values.drags[i].target[1])));
  const longest = Math.max(0, ...lines.map((one) => one.length));
  $("plot-box").hidden = longest < 2;
  if (longest < 2) return;
  const most = Math.max(1, ...lines.flat()), steps = Math.max(longest - 1, job.stage === "drag" ? job.total - 1 : 1);
  const svg = (name, values, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(values)) made.setAttribute(key, value);
    if (text) made.textContent = text;
    return made;
  };
  const at = (step, value) => `${(26 + 270 * step / steps).toFixed(1)},${(74 - 64 * value / most).toFixed(1)}`;
  $("plot").replaceChildren(
    svg("line", { class: "grid", x1: 26, x2: 296, y1: 74, y2: 74 }), svg("line", { class: "grid", x1: 26, x2: 296, y1: 10, y2: 10 }),
    svg("text", { x: 20, y: 13, "text-anchor": "end" }, most.toFixed(0)), svg("text", { x: 20, y: 77, "text-anchor": "end" }, "0"),
    ...lines.map((one, i) => svg("polyline", { class: `h${i % TRACES.length}`, points: one.map((value, step) => at(step, value)).join(" ") })),
  );
}

const run = attempt(async () => {
  if (!edit.drags.length) throw new Error("make a drag first: press on something and drag it");
  $("run").disabled = true;
  let first;
  try { first = await submit(await wanted()); } finally { $("run").disabled = !edit.drags.length; }
  await poll();
  if (first) show("watch");
});

// ---- results and history

async function openRun(name, job) {  // job: the one that made it, if it has just ended; its picture stays closed
  const found = await api(query("/run", { name }));
  const file = (which) => (found.files.includes(which) ? loadImage(query("/file", { name, file: which, v: found.time })) : null);
  const [original, edited, raw] = await Promise.all([found.options.image ? loadImage(query("/picture", { image: found.options.image })) : file("generated.png"), file("edited.png"), file("raw.png")]);
  result = { ...found, original, edited, raw };
  if (!job) await openOptions(found.options.image ? found.options : { ...found.options, image: `${start.runs}/${name}/generated.png`, made: true });
  view.fit = true;
  $("raw-box").hidden = !raw;
  $("show-raw").checked = false;
  split = 0.5;
  $("compare").value = 500;
  $("result-title").textContent = found.stopped ? `${name}, stopped` : name;
  $("result-notes").replaceChildren(...(job && job.notes.length && !found.stopped ? job.notes : inWords(found)).map((note) => element("li", { textContent: note, className: /arrived/.test(note) ? "good" : "" })));
  $("downloads").replaceChildren(...Object.keys(NAMES).filter((which) => found.files.includes(which)).map((which) => element("a", { href: query("/file", { name, file: which }), download: `${name}-${which}`, textContent: NAMES[which] })));
  show("result");
  for (const button of document.querySelectorAll("#history button")) button.setAttribute("aria-current", button.dataset.run === name);
}

function inWords({ result: { distances = [], remaining = [], arrived, stopped } }) {
  const lines = distances.map((distance, i) => `handle ${i + 1} moved ${(distance - remaining[i]).toFixed(1)} of ${distance.toFixed(1)} pixels, ${remaining[i].toFixed(1)} remain`);
  return [...(stopped ? [stopped] : []), ...lines, ...(arrived ? ["every handle arrived"] : [])];
}

async function drawHistory() {
  const runs = await api("/history");
  $("history").replaceChildren(...runs.map((one) => {
    const kind = one.stopped ? "stopped" : one.arrived ? "good" : "";
    const about = one.stopped ? "stopped" : one.arrived ? "arrived" : "fell short";
    const left = (one.remaining || []).map((pixels) => pixels.toFixed(1)).join(", ");
    const button = element("button", { title: `${one.name}: ${about}${left ? `, ${left} pixels remain` : ""}${one.prompt ? `\n${one.prompt}` : ""}`, "data-run": one.name },
      element("img", { src: query("/thumb", { name: one.name, v: one.time }), alt: "", loading: "lazy" }),
      element("span", {}, element("i", { className: kind }), one.name));
    button.setAttribute("aria-label", `Run ${one.name}, ${about}`);
    button.onclick = attempt(() => openRun(one.name));
    return element("li", {}, button);
  }));
}

// ---- keeping the draft

const keepDraft = later(500, async () => {
  if (now < 0) return;
  const draft = { ...past[now], start: start.options.image };
  try { sessionStorage.setItem("draft", JSON.stringify(draft)); } catch { /* a large one is kept by the server */ }
  await api("/draft", draft);
});

async function takeDraft(draft) {
  if (!draft || draft.start !== start.options.image || !draft.edit) return false;
  try {
    picture = await loadImage(query("/picture", { image: draft.edit.image }));
    size = draft.size;
    edit = { ...edit, ...draft.edit };
    setMask(unpack(draft.mask, size[0] * size[1]));
    commit();
    fillForm();
    return true;
  } catch { return false; }
}

// ---- start

function bind() {
  $("mode-points").onclick = () => setMode("points");
  $("mode-mask").onclick = () => setMode("mask");
  $("brush").onclick = () => { tool = "brush"; setMode("mask"); };
  $("eraser").onclick = () => { tool = "eraser"; setMode("mask"); };
  $("undo").onclick = () => step(-1);
  $("redo").onclick = () => step(1);
  $("zoom-in").onclick = () => zoom(1.4);
  $("zoom-out").onclick = () => zoom(1 / 1.4);
  $("zoom-fit").onclick = () => { view.fit = true; draw(); };
  $("preview").onclick = () => { previewing = !previewing; $("preview").setAttribute("aria-pressed", previewing); draw(); };
  $("delete").onclick = () => { if (half) { half = null; draw(); } else if (selected) remove(selected.index); };
  $("drags-clear").onclick = () => { edit.drags = []; half = selected = action = null; commit(); };
  $("add-drag").onclick = () => {
    setMode("points");
    const at = pixelAt({ x: width / 2, y: height / 2 }), far = Math.max(1, Math.round(size[0] / 10));
    edit.drags.push({ handle: at, target: [Math.min(size[0] - 1, at[0] + far), at[1]] });
    selected = { index: edit.drags.length - 1, which: "handle" };
    commit();
    canvas.focus();
  };
  $("brush-size").oninput = draw;
  $("mask-invert").onclick = () => { setMask(mask.bits.map((bit) => bit ^ 1)); commit(); };
  $("mask-clear").onclick = () => { setMask(new Uint8Array(mask.bits.length)); commit(); };
  $("mask-drags").onclick = () => {
    if (!edit.drags.length) return say("make a drag first");
    let dirty = null;
    for (const { handle, target } of edit.drags) {
      const wide = Math.max(0.36 * Math.min(...size), Math.hypot(handle[0] - target[0], handle[1] - target[1]));
      dirty = joined(dirty, paintLine([handle[0] + 0.5, handle[1] + 0.5], [target[0] + 0.5, target[1] + 0.5], wide));
    }
    readMask(dirty);
  };
  $("mask-load").onclick = () => $("mask-file").click();
  $("mask-file").onchange = attempt(async () => {
    const [file] = $("mask-file").files;
    $("mask-file").value = "";
    if (file) await loadMask(file);
  });
  $("mask-save").onclick = attempt(async () => {
    const url = URL.createObjectURL(await maskFile());
    element("a", { href: url, download: "mask.png" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  });
  $("open").onclick = () => $("file").click();
  $("file").onchange = attempt(async () => { const files = [...$("file").files]; $("file").value = ""; await openFiles(files); });
  for (const name of ["edit", "watch", "result"]) $(`view-${name}`).onclick = () => show(name);
  $("compare").oninput = () => { split = $("compare").value / 1000; draw(); };
  $("show-paths").onchange = $("show-raw").onchange = draw;
  $("result-close").onclick = () => show("edit");
  $("continue").onclick = attempt(async () => {
    await openOptions({ ...result.options, image: `${start.runs}/${result.name}/edited.png`, drags: [], mask: null });
    show("edit");
  });
  $("prompt").oninput = () => { edit.prompt = $("prompt").value; prepare(); };
  $("prompt").onchange = commit;
  $("model").onchange = () => { edit.model = $("model").value; noteModel(); commit(); };
  $("seed").onchange = () => { if (!$("seed").checkValidity() || $("seed").value === "") return fillForm(); edit.seed = Number($("seed").value); commit(); };
  $("negative").onchange = () => { edit.negative = $("negative").value; commit(); };
  $("guidance").onchange = () => { if (!$("guidance").checkValidity() || $("guidance").value === "") return fillForm(); edit.guidance = Number($("guidance").value); commit(); };
  $("generate").onclick = generate;
  $("run").onclick = run;
  $("stop").onclick = attempt(async () => { await api("/stop", { number: watched }); poll(); });
  $("ahead").onchange = attempt(async () => {
    localStorage.setItem("ahead", $("ahead").checked ? "yes" : "no");
    if ($("ahead").checked) { lastPrepared = ""; prepare(); } else if (state.ahead && active(state.ahead)) { lastPrepared = ""; await api("/stop", { number: 0 }); }
  });
  $("help").onclick = () => $("help-box").showModal();
  $("theme").onclick = () => {
    const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("theme", document.documentElement.dataset.theme);
    draw();
  };
  window.addEventListener("paste", attempt(async (event) => { if (event.clipboardData.files.length) { event.preventDefault(); await openFiles(event.clipboardData.files); } }));
  window.addEventListener("dragover", (event) => { event.preventDefault(); $("drop").hidden = false; });
  window.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
  window.addEventListener("drop", attempt(async (event) => { event.preventDefault(); $("drop").hidden = true; await openFiles(event.dataTransfer.files); }));
  document.addEventListener("visibilitychange", () => { if (!document.hidden) { poll(); drawHistory().catch(() => {}); } });
  new ResizeObserver(() => { width = $("box").clientWidth; height = $("box").clientHeight; draw(); }).observe($("box"));
}

async function main() {
  if (location.search) history.replaceState(null, "", "/");  // the token is in a cookie by now
  if (localStorage.getItem("theme")) document.documentElement.dataset.theme = localStorage.getItem("theme");
  $("ahead").checked = localStorage.getItem("ahead") !== "no";
  bind();
  setMode("points");
  $("model-state").textContent = "loading the model";
  $("model-state").className = "chip busy";
  start = await api("/start");
  let draft = null;
  try { draft = JSON.parse(sessionStorage.getItem("draft")); } catch { /* none */ }
  const taken = (await takeDraft(draft)) || (await takeDraft(start.draft));
  if (!taken) await openOptions(start.options).catch((error) => say(error.message));
  settings = await api("/settings");
  buildForm();
  if (!settings.models.includes(edit.model)) edit.model = settings.models[0];
  edit.config = { ...settings.presets.default, ...edit.config };
  if (now >= 0) past[now].edit = structuredClone(edit);  // the settings' defaults are not a step of undo
  fillForm();
  changed();
  await drawHistory();
  await poll();
  if (watchedJob()) show("watch");
}

main().catch((error) => { $("banner").textContent = error.message; $("banner").hidden = false; });
