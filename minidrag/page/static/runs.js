// Results: the runs of this folder, and the one that is compared with its original.

import { api, loadImage, loadNamed, query } from "./api.js";
import { $, attempt, element } from "./dom.js";
import { openOptions } from "./open.js";
import { state } from "./state.js";
import { setSplit, show, view } from "./view.js";

const DOWNLOADS = {
  "edited.png": "edit", "process.gif": "animation", "comparison.png": "comparison", "run.json": "run.json",
  "lora.safetensors": "LoRA", "generated.png": "generated",
};

export async function openRun(name, job = null) {  // job: the one that has just ended; its image stays closed
  const run = await api(query("/run", { name }));
  const { options, files } = run;
  const load = (file) => (files.includes(file) ? loadImage(fileUrl(run, file)) : null);
  const original = options.image ? loadNamed(options.image) : load("generated.png");
  const images = await Promise.all([original, load("edited.png"), load("raw.png")]);
  state.result = { ...run, original: images[0], edited: images[1], raw: images[2] };
  const generated = { ...options, image: `${state.start.runs}/${name}/generated.png`, generated: true };
  if (!job) await openOptions(options.image ? options : generated);
  view.fit = true;
  setSplit(0.5);
  showResult(run, job && !run.stopped ? job.notes : []);
  show("result");
  for (const button of document.querySelectorAll("#history button")) {
    button.setAttribute("aria-current", button.dataset.run === name);
  }
}

const fileUrl = ({ name, time }, file) => query("/file", { name, file, v: time });

function showResult(run, notes) {
  const { name, files, stopped } = run;
  $("raw-box").hidden = !state.result.raw;
  $("show-raw").checked = false;
  $("result-title").textContent = stopped ? `${name}, stopped` : name;
  const lines = notes.length ? notes : summarize(run.result);
  $("result-notes").replaceChildren(...lines.map((line) => {
    return element("li", { textContent: line, className: /arrived/.test(line) ? "good" : "" });
  }));
  const links = Object.entries(DOWNLOADS).filter(([file]) => files.includes(file));
  $("downloads").replaceChildren(...links.map(([file, textContent]) => {
    return element("a", { textContent, href: fileUrl(run, file), download: `${name}-${file}` });
  }));
}

function summarize({ distances = [], remaining = [], arrived, stopped }) {
  const lines = distances.map((distance, i) => {
    const moved = `${(distance - remaining[i]).toFixed(1)} of ${distance.toFixed(1)} pixels`;
    return `handle ${i + 1} moved ${moved}, ${remaining[i].toFixed(1)} remain`;
  });
  return [...(stopped ? [stopped] : []), ...lines, ...(arrived ? ["every handle arrived"] : [])];
}

export async function drawHistory() {
  $("history").replaceChildren(...(await api("/history")).map(buildEntry));
}

function buildEntry({ name, time, prompt, stopped, arrived, remaining }) {
  const kind = stopped ? "stopped" : arrived ? "good" : "";
  const outcome = stopped ? "stopped" : arrived ? "arrived" : "fell short";
  const distances = (remaining || []).map((pixels) => pixels.toFixed(1)).join(", ");
  const title = `${name}: ${outcome}${distances && `, ${distances} pixels remain`}${prompt && `\n${prompt}`}`;
  const thumb = element("img", { src: query("/thumb", { name, v: time }), alt: "", loading: "lazy" });
  const caption = element("span", {}, element("i", { className: kind }), name);
  const label = { "data-run": name, "aria-label": `Run ${name}, ${outcome}` };
  const open = attempt(() => openRun(name));
  return element("li", {}, element("button", { title, onclick: open, ...label }, thumb, caption));
}

async function continueResult() {
  const { options, name } = state.result;
  await openOptions({ ...options, image: `${state.start.runs}/${name}/edited.png`, drags: [], mask: null });
  show("edit");
}

$("continue").onclick = attempt(continueResult);
$("result-close").onclick = () => show("edit");
