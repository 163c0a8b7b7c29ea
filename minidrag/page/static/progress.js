// The job that is watched: its stage, its time, its plot, and the preview of its drag.

import { loadImage, loadNamed, query } from "./api.js";
import { $, duration, element, newCanvas, vector } from "./dom.js";
import { state } from "./state.js";
import { draw, show, view } from "./view.js";

const STAGES = ["LoRA", "inversion", "drag", "denoising", "animation"];
const ORDER = ["model", "sampling", ...STAGES];
const COLORS = 6;  // of the plot's lines, in page.css

function showProgress() {
  const job = state.watchedJob;
  $("progress-card").hidden = !job;
  if (!job) return;
  const { jobs, prefetch } = state.server;
  const idle = !jobs.some((one) => one.state === "running");
  const training = job.state === "waiting" && idle && prefetch && prefetch.state === "running";
  showStage(training ? prefetch : job);
  drawPlot(job);
  $("stop").disabled = job.stopping;
  $("stop").textContent = job.stopping ? "Stopping" : "Stop";
}

function showStage({ state: status, stage, done, total, seconds_left: seconds }) {
  const count = total ? `, ${done} of ${total}` : "";
  $("progress-title").textContent = status === "waiting" ? "Waiting" : (stage || "starting") + count;
  $("progress-left").textContent = seconds === null ? "" : `about ${duration(seconds)} left`;
  if (total) $("progress").value = done / total;
  else if (status === "running") $("progress").removeAttribute("value");
  else $("progress").value = 0;
  const isPast = (name) => ORDER.indexOf(name) < ORDER.indexOf(stage);
  const classOf = (name) => (isPast(name) ? "past" : name === stage ? "now" : "");
  const items = STAGES.map((name) => element("li", { textContent: name, className: classOf(name) }));
  $("stages").replaceChildren(...items);
}

function drawPlot(job) {  // distance of each handle from its target, by update
  const distances = job.paths.map((path, i) => {
    const [u, v] = job.values.drags[i].target;
    return path.map(([x, y]) => Math.hypot(x - u, y - v));
  });
  const longest = Math.max(0, ...distances.map((line) => line.length));
  $("plot-box").hidden = longest < 2;
  if (longest < 2) return;
  const most = Math.max(1, ...distances.flat());
  const steps = Math.max(longest - 1, job.stage === "drag" ? job.total - 1 : 1);
  const at = (value, step) => [26 + 270 * step / steps, 74 - 64 * value / most].map((one) => one.toFixed(1));
  const marks = [[10, most.toFixed(0)], [74, "0"]].flatMap(([y, text]) => [
    vector("line", { class: "grid", x1: 26, x2: 296, y1: y, y2: y }),
    vector("text", { x: 20, y: y + 3, "text-anchor": "end" }, text),
  ]);
  const lines = distances.map((line, i) => {
    return vector("polyline", { class: `h${i % COLORS}`, points: line.map(at).join(" ") });
  });
  $("plot").replaceChildren(...marks, ...lines);
}

async function loadPreview() {
  const job = state.watchedJob;
  if (!job) return;
  const { image: name, mask, config } = job.values;
  if (name && ![state.edit.image, state.scene.name].includes(name)) {
    state.scene = { name, image: await loadNamed(name).catch(() => null) };
    if (state.tab === "watch") view.fit = true;
  }
  const key = `${job.number}-${job.previews}`;
  if (!job.previews || key === state.preview.key || document.hidden) return;
  const image = await loadImage(query("/preview", { job: job.number, key }));
  state.preview = { key, image: mask && config.keep_background ? await within(image, mask) : image };
}

async function within(image, mask) {  // what the edit will keep of an image: the part in the mask
  const stencil = await loadImage(query("/image", { name: mask, v: 1 }));
  const { naturalWidth: width, naturalHeight: height } = stencil;
  const pen = newCanvas(width, height).getContext("2d");
  pen.drawImage(stencil, 0, 0);
  const pixels = pen.getImageData(0, 0, width, height);
  for (let i = 0; i < pixels.data.length; i += 4) pixels.data[i + 3] = pixels.data[i];
  pen.putImageData(pixels, 0, 0);
  pen.globalCompositeOperation = "source-in";
  pen.drawImage(image, 0, 0, width, height);
  return pen.canvas;
}

function showTab() {
  const job = state.watchedJob;
  if (state.tab === "watch" && !job) show("edit");
  if ($("view-watch").hidden === Boolean(job)) show(state.tab);
  if (state.tab === "watch") draw();
}

state.on("server", () => {
  showProgress();
  showTab();
  loadPreview().catch(() => {}).then(draw);  // the next one will do
});
