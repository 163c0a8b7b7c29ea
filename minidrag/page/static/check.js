// What the server says about an edit before it runs, and its LoRA, trained while points are placed.

import { api } from "./api.js";
import { $, attempt, duration, element, later, setChip } from "./dom.js";
import { poll } from "./jobs.js";
import { extendMask } from "./objects.js";
import { checkOptions } from "./request.js";
import { isActive, NO_CHECK, state } from "./state.js";
import { draw } from "./view.js";

const extendButton = element("button", { className: "link", textContent: "extend the mask" });
let ended = "";  // what the server had finished at the last look

const check = later(350, async () => {
  if (!state.settings || !state.edit.image) return;
  const values = await checkOptions();
  const answer = await api("/check", values);
  if (JSON.stringify(values) !== JSON.stringify(await checkOptions())) return;
  const hasDrags = state.edit.drags.length > 0;
  state.check = { ...NO_CHECK, ...answer, image: state.edit.image };
  $("error").textContent = (hasDrags && answer.error) || "";
  $("error").hidden = !$("error").textContent;
  const notes = hasDrags ? answer.notes : ["make a drag first"];
  $("notes").replaceChildren(...notes.map((note) => element("li", { textContent: note })));
  if (hasDrags && state.check.cut.length) $("notes").lastChild.append(" ", extendButton);
  showTimes(answer.seconds);
  showScale();
  showLora();
  draw();
});

function showScale() {  // beside the image's size
  const { scale } = state.check;
  const enlarged = `, enlarged ${(1 / scale).toFixed(1)} times`;
  const reduced = `, edited at ${scale.toFixed(1)} image pixels per pixel`;
  $("scale").textContent = scale > 1.05 ? reduced : scale < 0.95 ? enlarged : "";
}

function showTimes(seconds) {
  for (const card of $("presets").children) {
    const chosen = card.getAttribute("aria-checked") === "true";
    const time = seconds[chosen ? "now" : card.dataset.preset];
    card.querySelector("em").textContent = time ? `\u2264 ${duration(time)}` : "";
    card.title = time ? "at most, by the last run on this machine" : "not yet timed on this machine";
  }
}

const prefetch = later(1500, async () => {
  if (!state.settings || !state.edit.image || !$("prefetch").checked || !state.edit.config.lora_steps) return;
  await api("/prefetch", await checkOptions());
  poll();
});

function refresh() {
  if (state.check.image !== state.edit.image) state.check = NO_CHECK;
  check();
  prefetch();
}

function loraStatus() {  // text and kind of the chip
  const { prefetch: job } = state.server;
  const { lora, ready } = state.check;
  if (!state.edit.config.lora_steps) return [""];
  if (ready) return ["LoRA ready", "good"];
  if (!job || !lora || job.lora !== lora) return [""];
  if (job.state === "waiting") return ["LoRA waiting", "busy"];
  if (job.state === "failed") return [job.message, "bad"];
  const count = job.stage === "LoRA" ? `, ${job.done} of ${job.total}` : "";
  return job.state === "running" ? [`training the LoRA${count}`, "busy"] : [""];
}

const showLora = () => setChip("lora-state", ...loraStatus());

function follow() {
  const { model, jobs, prefetch: job } = state.server;
  const numbers = jobs.filter((one) => !isActive(one)).map((one) => one.number);
  const now = JSON.stringify([model, numbers, job && !isActive(job) && [job.lora, job.state]]);
  if (now !== ended) refresh();  // each of them changes the notes, the times, or what is to be trained
  ended = now;
  showLora();
}

async function togglePrefetch() {
  localStorage.setItem("prefetch", $("prefetch").checked ? "yes" : "no");
  if ($("prefetch").checked) prefetch();
  else if (state.server.prefetch) await api("/stop", { number: 0 });
}

extendButton.onclick = () => extendMask(state.check);
$("prefetch").checked = localStorage.getItem("prefetch") !== "no";
$("prefetch").onchange = attempt(togglePrefetch);
$("prompt").addEventListener("input", refresh);
state.on("change", refresh);
state.on("server", follow);
