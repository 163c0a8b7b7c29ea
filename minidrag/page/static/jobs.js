// Jobs: submitting edits, following them, and the queue below Run.

import { api } from "./api.js";
import { $, announce, attempt, element, say, setChip } from "./dom.js";
import { openOptions } from "./open.js";
import { fingerprint, generationOptions, jobOptions } from "./request.js";
import { drawHistory, openRun } from "./runs.js";
import { isActive, state } from "./state.js";
import { show } from "./view.js";

const WAIT = { hidden: 3000, idle: 1500, busy: 400 };  // milliseconds between two polls
const baselines = new Map();  // by number of this tab's jobs: the edit at the time of submitting
const unopened = new Map();  // jobs that ended while the person was at something else
const rows = new Map();  // of the queue, by what decides their buttons: a new row would lose the focus
let polling = Promise.resolve();
let pollTimer;

async function submit(values) {  // true if it need not wait
  const { number } = await api("/submit", values);
  baselines.set(number, fingerprint());
  const waiting = Boolean(state.watchedJob);
  if (waiting) say("added to the queue");
  else state.watched = number;
  await poll();
  return !waiting;
}

async function run() {
  if (!state.edit.drags.length) throw new Error("make a drag first: press on an object and drag it");
  $("run").disabled = true;
  try {
    if (await submit(await jobOptions())) show("watch");
  } finally {
    $("run").disabled = !state.edit.drags.length;
  }
}

async function generate() {
  if (!state.edit.prompt.trim()) throw new Error("describe the image in the prompt first");
  await submit(await generationOptions());
}

export function poll() {  // one after the other
  polling = polling.then(pollNow);
  return polling;
}

async function pollNow() {
  clearTimeout(pollTimer);
  try {
    const before = state.server;
    state.server = await api("/state");
    if ($("banner").dataset.away) $("banner").hidden = true;
    await follow(before);
  } catch (error) {
    if (error.away) showAway(error.status);
    else say(error.message);
  }
  const { jobs, model, prefetch } = state.server;
  const busy = !model || [...jobs, prefetch].some((job) => job && isActive(job));
  clearTimeout(pollTimer);
  pollTimer = setTimeout(poll, document.hidden ? WAIT.hidden : busy ? WAIT.busy : WAIT.idle);
}

function showAway(status) {
  $("banner").textContent = status === 403
    ? "The server was restarted: open the new address."
    : "The server does not answer. Your work is saved: start the server again and reload.";
  $("banner").dataset.away = "yes";
  $("banner").hidden = false;
}

async function follow(before) {
  const { jobs } = state.server;
  const running = jobs.find((job) => job.state === "running");
  if (state.watched === null && running) state.watched = running.number;  // after a reload, or of another tab
  showModel();
  for (const job of jobs) {
    const earlier = before.jobs.find((one) => one.number === job.number);
    const fresh = baselines.has(job.number) || (earlier && isActive(earlier));  // it may have failed at once
    if (!isActive(job) && fresh) await finish(job);
  }
  showQueue();
  state.emit("server");
}

function showModel() {
  const { model, prefetch } = state.server;
  const failed = prefetch && prefetch.kind === "load" && prefetch.state === "failed";
  const name = model === state.edit.model ? model : `${model} is loaded`;
  if (failed) setChip("model-state", prefetch.message, "bad");
  else setChip("model-state", model ? name : "loading the model", model ? "good" : "busy");
}

async function finish(job) {
  await drawHistory().catch(() => {});
  const { number } = job;
  const watched = number === state.watched;
  const untouched = await isUntouched(job);
  if (job.state === "failed") {
    say("The edit failed; the reason is below Run.");
    unopened.set(number, job);
  }
  if (!watched && !baselines.has(number)) return;
  baselines.delete(number);
  if (watched) state.watched = null;
  announce(`the edit is ${job.state}`);
  const idle = !state.pending && !state.action && state.tab !== "result";
  if (job.run && untouched && idle) {
    await openJob(job);
  } else if (job.run) {
    unopened.set(number, job);
    say(`edit ${number} is ${job.state}: Show, below Run, opens it`);
  } else if (job.state === "stopped") {
    say(job.message);
  }
}

async function isUntouched(job) {  // true if the edit is still the one that was submitted
  if (baselines.has(job.number)) return baselines.get(job.number) === fingerprint();
  return Boolean(state.settings) && JSON.stringify(await jobOptions()) === JSON.stringify(job.values);
}

async function openJob(job) {  // the open image stays, unless one was generated
  if (job.values.drags.length) return openRun(job.run, job);
  const image = `${state.start.runs}/${job.run}/generated.png`;
  await openOptions({ ...job.values, image, generated: true });
  return show("edit");
}

function showQueue() {
  const { jobs } = state.server;
  $("run").textContent = jobs.some(isActive) ? "Add to the queue" : "Run";
  const listed = jobs.filter((job) => job !== state.watchedJob
    && (isActive(job) || job.state === "interrupted" || unopened.has(job.number)));
  const before = [...rows.keys()];
  const keys = listed.map((job) => [job.number, job.state, unopened.has(job.number)].join());
  listed.forEach((job, i) => {
    if (!rows.has(keys[i])) rows.set(keys[i], buildRow(job));
    rows.get(keys[i]).firstChild.textContent = `Edit ${job.number}, ${describe(job)}`;
  });
  for (const key of before) if (!keys.includes(key)) rows.delete(key);
  if (before.join(" ") !== keys.join(" ")) $("queue").replaceChildren(...keys.map((key) => rows.get(key)));
}

function describe(job) {
  if (job.state === "running") return `running: ${job.stage} ${job.done} of ${job.total}`;
  if (job.state === "failed") return `failed: ${job.message}`;
  return job.state === "interrupted" ? job.message : job.state;
}

function buildRow(job) {
  const { number } = job;
  const row = element("li", {}, element("span"));
  const add = (textContent, work, values = {}) => {
    row.append(element("button", { className: "button", textContent, onclick: attempt(work), ...values }));
  };
  if (job.state === "running") add("Watch", () => watch(number));
  if (job.state === "interrupted") add("Run again", () => runAgain(job));
  if (unopened.has(number) && job.run) add("Show", () => openUnopened(job));
  const label = job.state === "running" ? "Stop" : unopened.has(number) ? "Dismiss" : "Cancel";
  add(label, () => drop(number), { "aria-label": `${label} edit ${number}` });
  return row;
}

function watch(number) {
  state.watched = number;
  show("watch");
}

async function runAgain(job) {
  state.watched = (await api("/submit", job.values)).number;
  await api("/stop", { number: job.number });
  await poll();
}

async function openUnopened(job) {
  await openJob(job);
  unopened.delete(job.number);
  showQueue();
}

async function drop(number) {
  if (!unopened.delete(number)) await api("/stop", { number });
  showQueue();
  await poll();
}

$("run").onclick = attempt(run);
$("generate").onclick = attempt(generate);
$("stop").onclick = attempt(async () => {
  await api("/stop", { number: state.watched });
  await poll();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) return;
  poll();
  drawHistory().catch(() => {});
});
state.on("change", () => { $("run").disabled = !state.edit.drags.length; });
