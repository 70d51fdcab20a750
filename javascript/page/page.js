/** The page: its controls, what it shows, and the model in a worker. */

import { Model, Stopped } from "./model.js";
import { drawImages, drawPoints } from "./pictures.js";
import { normalNoise } from "./ray-ddpm/index.js";
import { broadcast, classesOf, sizeOf } from "./ray-ddpm/spec.js";
import { Recording } from "./recording.js";

const PLAY_SECONDS = 2.5; // at least, however fast the model is
const MAX_VALUES = 2 ** 21; // in all samples together
const MAX_BATCH_VALUES = 2 ** 16;
const DEFAULT_POINTS = 1500;

const element = (id) => document.getElementById(id);
const [canvas, form, row, error] = ["canvas", "controls", "row", "error"].map(element);
const model = new Model();

/** @type {{ spec: import("./ray-ddpm/spec.js").SamplerSpec, name: string, defaultEta: Record<string, number> } | null} */
let file = null;
/** @type {Recording | null} */
let recording = null;
let position = 0; // the row that is shown; between two rows while it plays
let drawing = false;
let samples = null;
let classes = []; // of the samples

// What is shown

function show() {
  if (!recording) return;
  const { data } = file.spec;
  const kind = new FormData(form).get("shown");
  const points = data.kind === "points";
  const values = recording.at(position, kind, points);
  if (points) {
    const axes = ["x-column", "y-column"].map((id) => axisOf(Number(element(id).value)));
    drawPoints(canvas, values, { dimensions: data.shape[0], axes, classes });
  } else drawImages(canvas, values, data, cycles() ? classesOf(file.spec) : null);
  const at = Math.round(position);
  row.value = String(at);
  const words = at === 0 ? "Noise" : `Step ${at} of ${recording.rows}`;
  element("row-label").textContent = words;
  row.setAttribute("aria-valuetext", words);
  canvas.setAttribute("aria-label", `${recording.count} ${points ? "points" : "images"}: ${words.toLowerCase()}`);
}

/** An axis that has room for the data as well as for the noise, so that it stands still. */
function axisOf(column) {
  const { shape, mean, std, columns } = file.spec.data;
  const [centre, scale] = [broadcast(mean, shape)[column], broadcast(std, shape)[column]];
  const [lo, hi] = file.spec.sampler.clip ?? [0, 0];
  const range = [centre + Math.min(lo * 1.05, -2.6) * scale, centre + Math.max(hi * 1.05, 2.6) * scale];
  return { column, range, name: columns?.[column] ?? `x${column}` };
}

/** Whether each class is drawn in turn. */
function cycles() {
  return classesOf(file.spec).length > 0 && element("class").value === "";
}

let playing = 0;
let previousTime = 0;

/** Go on to the rows that have come, in `PLAY_SECONDS` at least. */
function play(time) {
  // The time of a frame may be before that of the call that asked for it.
  const elapsed = Math.min(Math.max(time - previousTime, 0), 100) / 1000;
  previousTime = time;
  const speed = (recording.rows * recording.batches) / PLAY_SECONDS;
  const next = Math.min(position + elapsed * speed, recording.last);
  const moved = file.spec.data.kind === "points" ? next !== position : Math.round(next) !== Math.round(position);
  position = next;
  if (moved) show();
  const ended = !drawing && position >= recording.last;
  playing = ended ? 0 : requestAnimationFrame(play);
  if (ended) updateBusy();
}

function startPlaying() {
  previousTime = performance.now();
  if (!playing) playing = requestAnimationFrame(play);
  updateBusy();
}

function stopPlaying() {
  cancelAnimationFrame(playing);
  playing = 0;
  updateBusy();
}

function updateBusy() {
  element("picture").ariaBusy = String(drawing || playing !== 0);
}

/** The noise of the seed, before anything is drawn. */
function showNoise() {
  stopPlaying();
  const { data } = file.spec;
  const count = Number(element("count").value);
  if (!element("count").checkValidity() || !element("seed").checkValidity()) return;
  const noise = normalNoise(Number(element("seed").value), 0, count, 0, sizeOf(data.shape));
  const [mean, std] = [broadcast(data.mean, data.shape), broadcast(data.std, data.shape)];
  const values = Float32Array.from(noise, (value, i) => value * std[i % std.length] + mean[i % mean.length]);
  classes = Array.from({ length: count }, (_, i) => classOf(i));
  recording = new Recording(1, values, std.length);
  position = 0;
  samples = null;
  element("save").disabled = row.disabled = true;
  show();
}

function classOf(i) {
  const names = classesOf(file.spec);
  if (!names.length) return null;
  const chosen = element("class").value;
  return chosen === "" ? i % names.length : Number(chosen);
}

function say(text) {
  element("status").textContent = text;
}

function complain(text) {
  error.textContent = text;
  error.hidden = !text;
}

// Drawing

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (drawing) return stop();
  draw();
});

async function draw() {
  complain("");
  showNoise();
  setDrawing(true);
  say("Drawing …");
  const count = recording.count;
  // Who wants less motion sees the rows as they come.
  const reduced = matchMedia("(prefers-reduced-motion: reduce)").matches;
  try {
    const { samples: drawn, calls, seconds } = await model.draw(count, options(), (message) => {
      if (message.done === 1) begin(message);
      if (message.first !== recording.first) position = 0; // a new batch
      recording.add(message.row, message.first, message.x0, message.x);
      if (reduced) position = recording.last;
    });
    samples = drawn;
    const things = file.spec.data.kind === "points" ? "points" : "images";
    const took = seconds < 1 ? `${Math.max(1, Math.round(seconds * 1000))} ms` : `${seconds.toFixed(1)} s`;
    say(`${count} ${things} in ${took}: ${calls} calls of the network on ${file.engine}`);
    element("save").disabled = false;
  } catch (problem) {
    say("");
    if (problem instanceof Stopped) say("Stopped");
    else complain(problem.message);
  }
  setDrawing(false);
}

/** Start a recording at the first row, whose message tells how many there are. */
function begin({ numRows, total }) {
  recording = new Recording(numRows, recording.pictures.get(0).x, recording.size, total / numRows);
  row.max = String(numRows);
  row.disabled = false;
  startPlaying();
}

async function stop() {
  element("draw").disabled = true;
  await model.stop();
  element("draw").disabled = false;
}

function setDrawing(value) {
  drawing = value;
  const button = element("draw");
  button.textContent = value ? "Stop" : "Draw";
  button.formNoValidate = value; // a field may be half edited while it stops
  element("open").disabled = element("webgpu").disabled = value;
  updateBusy();
}

/** What differs from the file's default sampler, for `Sampler.sample`. */
function options() {
  const own = file.spec.sampler;
  const [sampler, spacing] = [element("sampler").value, element("spacing").value];
  const [numSteps, eta] = [Number(element("steps").value), Number(element("eta").value)];
  const usesEta = sampler in file.defaultEta;
  const etaChanged = usesEta && element("eta").value !== element("eta").defaultValue;
  const same = sampler === own.name && numSteps === own.num_steps && spacing === own.spacing && !etaChanged;
  const chosen = element("class").value;
  const guidance = element("guidance");
  return {
    seed: Number(element("seed").value),
    batchSize: Math.max(1, Math.floor(MAX_BATCH_VALUES / sizeOf(file.spec.data.shape))),
    ...(same ? {} : { sampler, numSteps, spacing, ...(usesEta ? { eta } : {}) }),
    ...(chosen === "" ? {} : { labels: Number(chosen) }),
    ...(guidance.value === guidance.defaultValue ? {} : { guidanceScale: Number(guidance.value) }),
  };
}

// Files

async function open(bytes, name) {
  const engine = element("webgpu").checked ? "webgpu" : "wasm";
  complain("");
  element("draw").disabled = true;
  say("Opening …");
  try {
    const opened = await model.open(bytes, engine);
    const problem = unshowable(opened.spec);
    if (problem) throw new Error(problem);
    file = { ...opened, name, bytes };
    describe(bytes.byteLength);
    fillControls();
    showNoise();
    say("Press Draw, and watch samples appear from noise.");
  } catch (problem) {
    say("");
    complain(`${name}: ${problem.message}`);
    if (file && file.bytes !== bytes) await model.open(file.bytes, engine); // the one before goes on
  }
  element("draw").disabled = !file;
}

/** Why samples of a model cannot be shown, or null. */
function unshowable({ data, conditions }) {
  if (conditions?.length) {
    const names = conditions.map((each) => each.name).join(", ");
    return `this model needs conditions (${names}), which this page cannot give; the module ray-ddpm can`;
  }
  if (data.kind === "image" && ![1, 3].includes(data.shape[0]))
    return `images of ${data.shape[0]} channels are no pictures`;
  return null;
}

function describe(numBytes) {
  const { data } = file.spec;
  const numClasses = classesOf(file.spec).length;
  const parts = [
    file.name,
    data.kind === "points" ? `points with ${data.shape[0]} columns` : `images of ${data.shape[1]} × ${data.shape[2]} pixels`,
    ...(numClasses ? [`${numClasses} classes`] : []),
    numBytes < 1e6 ? `${Math.round(numBytes / 1e3)} kB` : `${(numBytes / 1e6).toFixed(1)} MB`,
  ];
  element("model").textContent = parts.join(" · ");
}

function fillControls() {
  const { data, sampler: own, schedule } = file.spec;
  const names = classesOf(file.spec);
  fill("class", [["", "All in turn"], ...names.map((name, i) => [i, name])], "");
  element("class-field").hidden = element("guidance-field").hidden = !names.length;
  setDefault("guidance", own.guidance_scale);
  const size = sizeOf(data.shape);
  const count = element("count");
  count.max = String(Math.max(1, Math.min(20000, Math.floor(MAX_VALUES / size))));
  const wanted = data.kind === "points" ? DEFAULT_POINTS : names.length && names.length <= 12 ? names.length * Math.min(names.length, 8) : 64;
  count.value = String(Math.min(wanted, Math.max(1, Math.floor(2 ** 17 / size)), Number(count.max)));
  const known = [...new Set([own.name, ...file.samplers])];
  const fast = own.fast ? [["fast", `fast: ${own.fast.name}, ${own.fast.num_steps} steps`]] : [];
  fill("sampler", [...known.map((name) => [name, name]), ...fast], own.name);
  const steps = element("steps");
  steps.max = String(schedule.betas.length);
  steps.value = String(own.num_steps);
  fill("spacing", file.spacings.map((name) => [name, name]), own.spacing);
  setDefault("eta", own.eta);
  const columns = Array.from({ length: data.shape[0] }, (_, i) => [i, data.columns?.[i] ?? `x${i}`]);
  fill("x-column", columns, 0);
  fill("y-column", columns, Math.min(1, columns.length - 1));
  element("x-field").hidden = element("y-field").hidden = data.kind !== "points" || data.shape[0] < 3;
  updateOutputs();
}

function fill(id, pairs, value) {
  element(id).replaceChildren(...pairs.map(([each, text]) => new Option(text, each)));
  element(id).value = String(value);
}

/** A slider's value, which the slider may round; what it then shows counts as unchanged. */
function setDefault(id, value) {
  const slider = element(id);
  slider.max = String(Math.max(Number(slider.max), value));
  slider.value = String(value);
  slider.defaultValue = slider.value;
}

function updateOutputs() {
  element("guidance-value").textContent = element("guidance").value;
  element("eta-value").textContent = element("eta").value;
  element("eta-field").hidden = !(element("sampler").value in file.defaultEta);
}

// Controls

form.addEventListener("input", ({ target }) => {
  if (!file) return;
  if (target.id === "sampler" && target.value === "fast") {
    const { name, num_steps } = file.spec.sampler.fast;
    target.value = name;
    element("steps").value = String(num_steps);
  }
  if (target.id === "sampler") {
    const own = file.spec.sampler;
    setDefault("eta", target.value === own.name ? own.eta : (file.defaultEta[target.value] ?? 0));
  }
  updateOutputs();
  if (drawing) return;
  if (["count", "seed", "class"].includes(target.id)) showNoise();
  else show();
});

element("dice").addEventListener("click", () => {
  element("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000);
  if (file && !drawing) draw();
});

row.addEventListener("input", () => {
  stopPlaying();
  if (!drawing) recording.first = 0; // all batches together
  position = Number(row.value);
  show();
});

element("save").addEventListener("click", async () => {
  const { data } = file.spec;
  const seed = element("seed").value;
  if (data.kind !== "points")
    return canvas.toBlob((blob) => download(blob, `samples-${seed}.png`), "image/png");
  const names = Array.from({ length: data.shape[0] }, (_, i) => data.columns?.[i] ?? `x${i}`);
  const lines = [names.map(quoted).join(",")];
  for (let i = 0; i < samples.length; i += names.length) lines.push(samples.slice(i, i + names.length).join(","));
  download(new Blob([`${lines.join("\n")}\n`], { type: "text/csv" }), `samples-${seed}.csv`);
});

function quoted(name) {
  return /[",\n]/.test(name) ? `"${name.replaceAll('"', '""')}"` : name;
}

function download(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}

element("open").addEventListener("click", () => element("file").click());
element("file").addEventListener("change", ({ target }) => {
  if (target.files.length) openFile(target.files[0]);
  target.value = "";
});

let dragged = 0; // enters less leaves: one of each for every element on the way
for (const [type, change] of [["dragenter", 1], ["dragleave", -1]])
  document.addEventListener(type, (event) => {
    event.preventDefault();
    dragged += change;
    document.body.classList.toggle("dropping", dragged > 0);
  });
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  dragged = 0;
  document.body.classList.remove("dropping");
  const [dropped] = event.dataTransfer.files;
  if (dropped && !drawing) openFile(dropped);
});

async function openFile(blob) {
  await open(await blob.arrayBuffer(), blob.name);
}

element("webgpu").addEventListener("change", async ({ target }) => {
  if (!file) return;
  await open(file.bytes, file.name);
  if (!error.hidden && target.checked) {
    const reason = error.textContent;
    target.checked = false;
    await open(file.bytes, file.name);
    complain(`WebGPU cannot be used: ${reason}`);
  }
});

new ResizeObserver(() => file && !playing && show()).observe(canvas.parentElement);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => file && show());

// Start

async function start() {
  element("not-started").remove();
  const gpu = await navigator.gpu?.requestAdapter().catch(() => null);
  element("webgpu-field").hidden = !gpu || document.documentElement.dataset.webgpu === "no"; // see build.js
  const response = await fetch("sampler.onnx").catch(() => null);
  if (response?.ok) return open(await response.arrayBuffer(), "sampler.onnx");
  element("model").textContent = "No model yet";
  complain("There is no sampler.onnx beside this page: open one, or drop it here.");
}

start();
