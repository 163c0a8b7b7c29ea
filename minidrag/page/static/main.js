// The start of the page. The other modules bind their controls when they are imported.

import "./canvas.js";
import "./check.js";
import "./keys.js";
import "./progress.js";
import "./tools.js";
import { api } from "./api.js";
import { $, setChip } from "./dom.js";
import { buildForm } from "./form.js";
import { poll } from "./jobs.js";
import { openStart } from "./open.js";
import { drawHistory } from "./runs.js";
import { state } from "./state.js";
import { amend } from "./undo.js";
import { draw, setMode, show } from "./view.js";

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  draw();
}

function toggleTheme() {
  const { theme } = document.documentElement.dataset;
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  localStorage.setItem("theme", dark ? "light" : "dark");
  setTheme(dark ? "light" : "dark");
}

async function main() {
  if (location.search) history.replaceState(null, "", "/");  // the token is in a cookie by now
  if (localStorage.getItem("theme")) setTheme(localStorage.getItem("theme"));
  $("theme").onclick = toggleTheme;
  $("help").onclick = () => $("help-box").showModal();
  setMode("points");
  setChip("model-state", "loading the model", "busy");
  state.start = await api("/start");
  await openStart();
  state.settings = await api("/settings");
  buildForm();
  const { settings, edit } = state;
  if (!settings.models.includes(edit.model)) edit.model = settings.models[0];
  edit.config = { ...settings.presets.default, ...edit.config };
  amend();
  await drawHistory();
  await poll();
  if (state.watchedJob) show("watch");
}

main().catch((error) => {
  $("banner").textContent = error.message;
  $("banner").hidden = false;
});
