// What the server says about an edit before it runs, and its LoRA, trained while points are placed.

import { api } from "./api.js";
import { $, attempt, duration, element, later, setChip } from "./dom.js";
import { poll } from "./jobs.js";
import { options } from "./request.js";
import { isActive, state } from "./state.js";

let ready = "";  // key of a LoRA that is trained
let prefetched = "";  // key of the LoRA that was requested last
let ended = "";  // what the server had finished at the last look

function loraKey() {  // everything that decides a LoRA
  const { image, prompt, model, seed, config } = state.edit;
  const names = Object.keys(config).filter((name) => name.startsWith("lora_"));
  return JSON.stringify([image, prompt, model, seed, config.size, ...names.map((name) => config[name])]);
}

const check = later(350, async () => {
  if (!state.settings || !state.edit.image) return;
  const values = await options();
  const text = JSON.stringify(values);
  const answer = await api("/check", values);
  if (text !== JSON.stringify(await options())) return;
  const hasDrags = state.edit.drags.length > 0;
  $("error").textContent = (hasDrags && answer.error) || "";
  $("error").hidden = !$("error").textContent;
  const notes = hasDrags ? answer.notes : ["make a drag first"];
  $("notes").replaceChildren(...notes.map((note) => element("li", { textContent: note })));
  showTimes(answer.seconds);
  if (answer.ready) ready = loraKey();
  showLora();
});

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
  const key = loraKey();
  if (key === prefetched || key === ready) return;
  prefetched = key;
  await api("/prefetch", { ...(await options()), mask: null });
  poll();
});

function loraStatus() {  // text and kind of the chip
  const job = state.server.prefetch;
  if (!state.edit.config.lora_steps) return [""];
  if (ready === loraKey()) return ["LoRA ready", "good"];
  if (!job || job.kind !== "train" || prefetched !== loraKey()) return [""];
  if (job.state === "waiting") return ["LoRA waiting", "busy"];
  if (job.state === "failed") return [job.message, "bad"];
  const count = job.stage === "LoRA" ? `, ${job.done} of ${job.total}` : "";
  return job.state === "running" ? [`training the LoRA${count}`, "busy"] : [""];
}

const showLora = () => setChip("lora-state", ...loraStatus());

function follow() {
  const { model, jobs, prefetch: job } = state.server;
  const current = job && job.kind === "train" && prefetched === loraKey();
  if (current && job.state === "done") ready = prefetched;
  if (current && job.state === "stopped" && !jobs.some(isActive)) {
    prefetched = "";
    prefetch();
  }
  const numbers = jobs.filter((one) => !isActive(one)).map((one) => one.number);
  const now = JSON.stringify([model, numbers, ready]);  // each of them changes the notes or the times
  if (now !== ended) check();
  ended = now;
  showLora();
}

async function togglePrefetch() {
  localStorage.setItem("prefetch", $("prefetch").checked ? "yes" : "no");
  const job = state.server.prefetch;
  prefetched = "";
  if ($("prefetch").checked) prefetch();
  else if (job && isActive(job)) await api("/stop", { number: 0 });
}

$("prefetch").checked = localStorage.getItem("prefetch") !== "no";
$("prefetch").onchange = attempt(togglePrefetch);
$("prompt").addEventListener("input", prefetch);
state.on("change", () => {
  check();
  prefetch();
});
state.on("server", follow);
