/**
 * Puts the page together: `node page/build.js SAMPLER_ONNX FOLDER`. Any static web server can serve the folder.
 *
 * With `--without-webgpu` it lacks the runtime for graphics processors, most of its size.
 */

import { cpSync, existsSync, mkdirSync, readFileSync, readdirSync, rmSync, statSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { readMetadata } from "../src/metadata.js";
import { readSpec } from "../src/spec.js";

const HERE = fileURLToPath(new URL(".", import.meta.url));
const RUNTIME = join(HERE, "../node_modules/onnxruntime-web/dist");
const MARK = "ray-ddpm-page.txt"; // in a folder that this program wrote, and may replace
const PARTS = ["index.html", "style.css", "icon.svg", "page.js", "model.js", "pictures.js", "recording.js", "worker.js"];
// Files of the runtime. Some servers do not know .mjs, and browsers then refuse it.
const WASM = { "ort.wasm.bundle.min.mjs": "wasm.js", "ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm" };
// Of the builds with WebGPU the one that has every operator for the CPU as well: the others lack the cast of a timestep
// to float64.
const WEBGPU = {
  "ort.bundle.min.mjs": "webgpu.js",
  "ort-wasm-simd-threaded.jsep.wasm": "ort-wasm-simd-threaded.jsep.wasm",
};

function fail(message) {
  console.error(`error: ${message}`);
  process.exit(2);
}

const { values, positionals } = parseArgs({
  options: { "without-webgpu": { type: "boolean", default: false } },
  allowPositionals: true,
});
if (positionals.length !== 2) fail("usage: node page/build.js SAMPLER_ONNX FOLDER [--without-webgpu]");
const [model, folder] = positionals.map((path) => resolve(path));
if (!existsSync(RUNTIME)) fail("onnxruntime-web is not installed: run make javascript");
if (!existsSync(model)) fail(`${model} does not exist: give the sampler.onnx of a run`);
let content;
try {
  content = readFileSync(model);
  readSpec(readMetadata(content));
} catch (error) {
  fail(`${model}: ${error.message}`);
}
if (existsSync(folder) && readdirSync(folder).length && !existsSync(join(folder, MARK)))
  fail(`${folder} has other files: give a new or empty folder`);

rmSync(folder, { recursive: true, force: true });
mkdirSync(join(folder, "ort"), { recursive: true });
for (const part of PARTS) cpSync(join(HERE, part), join(folder, part));
if (values["without-webgpu"]) {
  const page = readFileSync(join(folder, "index.html"), "utf8");
  writeFileSync(join(folder, "index.html"), page.replace('data-webgpu="yes"', 'data-webgpu="no"'));
}
cpSync(join(HERE, "../src"), join(folder, "ray-ddpm"), { recursive: true });
for (const [from, to] of Object.entries({ ...WASM, ...(values["without-webgpu"] ? {} : WEBGPU) }))
  cpSync(join(RUNTIME, from), join(folder, "ort", to));
cpSync(join(HERE, "runtime-licence.txt"), join(folder, "ort", "licence.txt"));
writeFileSync(join(folder, "sampler.onnx"), content);
writeFileSync(join(folder, MARK), "This folder was written by ray-ddpm's make page, which replaces it.\n");

const megabytes = (names) =>
  (names.reduce((sum, name) => sum + statSync(join(folder, name)).size, 0) / 1e6).toFixed(1);
const files = readdirSync(folder, { recursive: true }).filter((name) => statSync(join(folder, name)).isFile());
const forGpus = files.filter((name) => Object.values(WEBGPU).some((each) => name.endsWith(each)));
const rest = files.filter((name) => !forGpus.includes(name));
console.log(`${folder}: ${megabytes(rest)} MB${forGpus.length ? `, and ${megabytes(forGpus)} MB for WebGPU` : ""}`);
