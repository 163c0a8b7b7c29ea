// The state of the page. Its events: "change", the edit has changed; "server", the server has reported its
// jobs; "draw", the canvas is due.

export const NO_CHECK = { image: "", window: null, scale: 1, lora: "", ready: false, cut: [], cell: 0 };

class State extends EventTarget {
  start = null;  // of the server: the options to begin with, the draft, the folder of the runs
  settings = null;  // of the server: fields, presets, models, values fixed by the command line
  edit = {
    image: "", drags: [], prompt: "", negative: "", guidance: 7.5, generated: "", model: "tiny", config: {},
    seed: 0,
  };
  check = NO_CHECK;  // what the server says of the edit; window: the part that is edited, null for all
  image = null;  // the edit's image, drawable
  size = [1, 1];
  mode = "points";  // or "mask"
  tool = "brush";  // or "eraser"
  tab = "edit";  // or "watch", "result"
  pending = null;  // a drag without its target
  selected = null;  // a point: {index, which}
  action = null;  // of the pointer: {kind, ...}
  result = null;  // the run that is compared: {name, options, result, files, original, edited, raw}
  server = { model: "", jobs: [], prefetch: null };
  watched = null;  // number of the job that this tab follows
  scene = { name: "", image: null };  // image of the watched job, where another one is open
  preview = { key: "", image: null };  // latest preview of the watched job

  emit(name) {
    this.dispatchEvent(new Event(name));
  }

  on(name, listener) {
    this.addEventListener(name, () => listener());
  }

  get watchedJob() {
    return this.server.jobs.find((job) => job.number === this.watched && isActive(job));
  }

  get drags() {  // with the pending one, once it has a target
    return this.pending && this.pending.target ? [...this.edit.drags, this.pending] : this.edit.drags;
  }

  letGo() {  // of points
    this.pending = null;
    this.selected = null;
    this.action = null;
  }
}

export const isActive = (job) => ["waiting", "running"].includes(job.state);

export const state = new State();
