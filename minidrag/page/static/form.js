// The form: prompt, model, presets, and the settings that the server describes.

import { $, element, say, words } from "./dom.js";
import { state } from "./state.js";
import { commit } from "./undo.js";

const LORA = "LoRA, trained on the image";
const NOTES = {
  tiny: "The small model knows only rendered scenes: for a photo, choose sd15.",
  sd15: "Stable Diffusion 1.5 is downloaded on first use: 4.3 GB, half of that in half precision.",
};

const inputs = () => document.querySelectorAll("[data-setting]");

export function buildForm() {
  const { models, presets, fields } = state.settings;
  $("model").replaceChildren(...models.map((name) => element("option", { value: name, textContent: name })));
  $("presets").replaceChildren(...Object.keys(presets).map(buildPreset));
  const groups = { [LORA]: [], Edit: [] };
  for (const field of fields) groups[field.name.startsWith("lora_") ? LORA : "Edit"].push(buildField(field));
  const parts = Object.entries(groups);
  $("settings").replaceChildren(
    ...parts.flatMap(([name, rows]) => [element("h3", { textContent: name }), ...rows]));
}

function buildPreset(name) {
  const title = element("strong", {}, name, element("em"));
  const summary = element("small", { textContent: state.settings.summaries[name] });
  const card = element("button", { role: "radio", "data-preset": name }, title, summary);
  card.onclick = () => {
    state.edit.config = { ...state.settings.presets[name] };
    commit();
  };
  return card;
}

function buildField(field) {
  const { name, help, kind, choices } = field;
  const options = (choices || []).map((value) => element("option", { value, textContent: value }));
  const type = kind === "bool" ? "checkbox" : "number";
  const input = choices ? element("select", {}, ...options) : element("input", { type });
  input.dataset.setting = name;
  if (input.type === "number") {
    input.min = field.least ?? "";
    input.max = field.most ?? "";
    input.step = kind === "int" ? 1 : "any";
    input.placeholder = field.optional ? "auto" : "";
  }
  input.onchange = () => {
    const value = valueOf(input, field);
    if (value === undefined) return fillForm();
    state.edit.config[name] = value;
    return commit();
  };
  const texts = [element("span", { textContent: words(name) }), element("small", { textContent: help })];
  return element("label", { className: "field" }, texts[0], input, texts[1]);
}

function valueOf(input, { name, optional }) {  // undefined, after a sentence, if it is not valid
  if (input.type === "checkbox") return input.checked;
  if (input.type !== "number") return input.value;
  if (input.checkValidity() && (input.value !== "" || optional)) {
    return input.value === "" ? null : Number(input.value);
  }
  say(`${words(name)}: ${input.validationMessage || "enter a number"}`);
  return undefined;
}

function fillForm() {
  const { edit, size } = state;
  for (const name of ["prompt", "model", "seed", "negative", "guidance"]) $(name).value = edit[name];
  $("size").textContent = size.join(" \u00d7 ");
  for (const input of inputs()) {
    const value = edit.config[input.dataset.setting];
    if (input.type === "checkbox") input.checked = value;
    else input.value = value ?? "";
  }
}

function showNote() {
  const { edit, server, start } = state;
  const needless = { tiny: !start || edit.image.includes("tiny/demo"), sd15: server.model === "sd15" };
  $("model-note").textContent = needless[edit.model] ? "" : NOTES[edit.model] || "";
  $("model-note").hidden = !$("model-note").textContent;
}

function markPreset() {
  const { settings, edit } = state;
  if (!settings) return;
  const changesOf = (preset) => Object.keys(preset).filter((name) => preset[name] !== edit.config[name]);
  const counts = Object.entries(settings.presets).map(([name, preset]) => [name, changesOf(preset)]);
  const [closest, changes] = counts.reduce((best, one) => (one[1].length < best[1].length ? one : best));
  for (const card of $("presets").children) {
    card.setAttribute("aria-checked", card.dataset.preset === closest);
    if (card.dataset.preset === closest) $("reset").onclick = () => card.click();
  }
  for (const input of inputs()) {
    input.closest(".field").classList.toggle("changed", changes.includes(input.dataset.setting));
  }
  const names = changes.slice(0, 3).map(words).join(", ") + (changes.length > 3 ? " ..." : "");
  $("changed").textContent = `${changes.length} of its settings changed: ${names}`;
  $("changes").hidden = !changes.length;
}

function bindNumber(name) {
  $(name).onchange = () => {
    if (!$(name).checkValidity() || $(name).value === "") return fillForm();
    state.edit[name] = Number($(name).value);
    return commit();
  };
}

function bindText(name) {
  $(name).onchange = () => {
    state.edit[name] = $(name).value;
    commit();
  };
}

["negative", "model", "prompt"].forEach(bindText);
["seed", "guidance"].forEach(bindNumber);
$("prompt").addEventListener("input", () => { state.edit.prompt = $("prompt").value; });
state.on("change", () => {
  fillForm();
  showNote();
  markPreset();
});
state.on("server", showNote);
