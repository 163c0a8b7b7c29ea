// Elements of the page, sentences for the person, and words for values.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

export function element(name, values = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(values)) {
    if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

export function vector(name, values = {}, ...children) {  // an element of SVG
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(values)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

export const icon = (name) => vector("svg", { class: "icon" }, vector("use", { href: `#i-${name}` }));

export const newCanvas = (width = 1, height = 1) => element("canvas", { width, height });

export function checkRadio(prefix, names, chosen) {
  for (const name of names) $(prefix + name).setAttribute("aria-checked", name === chosen);
}

export function setChip(id, text, kind = "") {  // kind: good, busy, bad
  $(id).textContent = text;
  $(id).className = `chip ${kind}`;
}

let toastTimer;

export function say(sentence) {
  $("toast").textContent = sentence[0].toUpperCase() + sentence.slice(1);
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { $("toast").hidden = true; }, 7000);
}

export function announce(sentence) {  // to a screen reader
  $("live").textContent = sentence;
}

export function attempt(work) {  // a listener whose errors become sentences
  return async (...values) => {
    try {
      await work(...values);
    } catch (error) {
      say(error.message);
    }
  };
}

export function later(wait, work) {  // once nothing has called it for `wait` milliseconds
  const guarded = () => work().catch((error) => !error.away && say(error.message));
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(guarded, wait);
  };
}

export const words = (name) => name.replaceAll("_", " ").replace("lora", "LoRA");

export function duration(seconds) {
  if (seconds < 100) return `${Math.max(1, Math.round(seconds))} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}
