// Opening images, masks, and run.json; the draft, which survives a reload.

import { api, base64, loadImage, loadNamed, sendMask } from "./api.js";
import { $, attempt, later, newCanvas, say } from "./dom.js";
import { bitsOf, clearMask, setMask, unpack } from "./mask.js";
import { recipe } from "./request.js";
import { state } from "./state.js";
import { commit, latest } from "./undo.js";
import { show, view } from "./view.js";

const MOST = 48 * 2 ** 20;  // bytes of a file
const BRUSH = 0.12;  // of the image's shorter side

const baseName = (path) => String(path || "").split(/[\\/]/).pop();

export async function openOptions(values) {  // in the form of run.json, with images that the server has
  const image = await loadNamed(values.image);
  const { settings, edit } = state;
  state.image = image;
  state.size = [image.naturalWidth, image.naturalHeight];
  state.edit = {
    image: values.image,
    drags: (values.drags || []).map(({ handle, target }) => ({ handle: [...handle], target: [...target] })),
    prompt: values.prompt || "",
    negative: values.negative || "",
    guidance: values.guidance ?? 7.5,
    generated: "",
    model: !settings || settings.models.includes(values.model) ? values.model : edit.model,
    config: { ...(settings ? settings.presets.default : {}), ...values.config },
    seed: values.seed || 0,
  };
  clearMask();
  if (values.mask) setMask(bitsOf(await loadNamed(values.mask)));
  if (values.generated) state.edit.generated = recipe();
  const lora = baseName(values.lora);
  if (lora) say(`that run used the LoRA ${lora}; here one is trained on the image instead`);
  state.letGo();
  view.fit = true;
  $("brush-size").value = Math.round(100 * Math.sqrt(BRUSH));
  commit();
}

async function upload(file) {
  if (file.size > MOST) throw new Error("the file has more than 48 MB: send a smaller one");
  say("opening the image");
  const { image } = await api("/image", { data: await base64(file) });
  $("toast").hidden = true;
  return image;
}

async function openFiles(files) {
  const isJson = (file) => file.name.endsWith(".json") || file.type === "application/json";
  const json = [...files].find(isJson);
  const [image, ...others] = [...files].filter((file) => file !== json);
  if (!json && !image) return;
  const { model, config, seed } = state.edit;
  show("edit");
  if (json) await openRunFile(json, [image, ...others]);
  else if (state.mode === "mask" && await isMask(image)) await loadMask(image);
  else await openOptions({ image: await upload(image), model, config, seed });
}

async function openRunFile(json, images) {  // with the images that came along
  let values;
  try {
    values = JSON.parse(await json.text());
  } catch {
    throw new Error(`${json.name} cannot be read as JSON`);
  }
  const known = await api("/match", values);
  for (const [name, send] of [["image", upload], ["mask", sendMask]]) {
    const base = baseName(values[name]);
    const file = base && images.find((one) => one && one.name === base);
    if (file) known[name] = await send(file);
    if (base && !known[name]) {
      throw new Error(`the run's ${name} ${base} is not here: drop it together with ${json.name}`);
    }
  }
  if (!known.image) throw new Error(`${json.name} names no image: drop one together with ${json.name}`);
  await openOptions({ ...values, ...known });
}

async function loadMask(file) {  // by way of the server, which reads it as the command does
  const name = await sendMask(file);
  if (!name) throw new Error("the mask is all black: paint white what may change");
  setMask(bitsOf(await loadNamed(name)));
  commit();
}

async function isMask(file) {  // true for an image of the right size that is black and white
  const url = URL.createObjectURL(file);
  const image = await loadImage(url).catch(() => null);
  URL.revokeObjectURL(url);
  if (!image || [image.naturalWidth, image.naturalHeight].join() !== state.size.join()) return false;
  const pen = newCanvas(...state.size).getContext("2d");
  pen.drawImage(image, 0, 0);
  const { data } = pen.getImageData(0, 0, ...state.size);
  return data.every((value, i) => i % 4 === 3 || value < 16 || value > 239);
}

const keepDraft = later(500, async () => {
  if (!latest()) return;
  const draft = { ...latest(), start: state.start.options.image };
  try {
    sessionStorage.setItem("draft", JSON.stringify(draft));
  } catch { /* a large one is kept by the server alone */ }
  await api("/draft", draft);
});

function tabDraft() {
  try {
    return JSON.parse(sessionStorage.getItem("draft"));
  } catch {
    return null;
  }
}

async function takeDraft(draft) {  // true if it belongs to what the server began with
  if (!draft || draft.start !== state.start.options.image || !draft.edit) return false;
  try {
    state.image = await loadNamed(draft.edit.image);
    state.size = draft.size;
    state.edit = { ...state.edit, ...draft.edit };
    setMask(unpack(draft.mask, state.size[0] * state.size[1]));
    commit();
    return true;
  } catch {
    return false;
  }
}

export async function openStart() {
  if (await takeDraft(tabDraft()) || await takeDraft(state.start.draft)) return;
  await openOptions(state.start.options).catch((error) => say(error.message));
}

function bindFiles(button, input, work) {
  $(button).onclick = () => $(input).click();
  $(input).onchange = attempt(async () => {
    const files = [...$(input).files];
    $(input).value = "";
    if (files.length) await work(files);
  });
}

bindFiles("open", "file", openFiles);
bindFiles("mask-load", "mask-file", ([file]) => loadMask(file));
window.addEventListener("paste", attempt(async (event) => {
  const { files } = event.clipboardData;
  if (!files.length) return;
  event.preventDefault();
  await openFiles(files);
}));
window.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").hidden = false;
});
window.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
window.addEventListener("drop", attempt(async (event) => {
  event.preventDefault();
  $("drop").hidden = true;
  await openFiles(event.dataTransfer.files);
}));
state.on("change", keepDraft);
