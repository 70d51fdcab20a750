/** Runs the model of the page, away from the thread that draws it. */

import { DEFAULT_ETA, InputError, Sampler, SAMPLERS, SPACINGS } from "./ray-ddpm/index.js";

const RUNTIMES = {
  wasm: {
    name: "WebAssembly",
    module: "./ort/wasm.js",
    binary: "ort/ort-wasm-simd-threaded.wasm",
    providers: ["wasm"],
  },
  webgpu: {
    name: "WebGPU",
    module: "./ort/webgpu.js",
    binary: "ort/ort-wasm-simd-threaded.jsep.wasm",
    providers: ["webgpu", "wasm"], // WebAssembly for operators that WebGPU lacks
  },
};

/** @type {Sampler | undefined} */
let sampler;
/** @type {AbortController | undefined} */
let running;

const requests = {
  /** Open a file; `engine` is a key of `RUNTIMES`. */
  async open({ bytes, engine }) {
    const runtime = RUNTIMES[engine];
    const ort = await import(runtime.module);
    ort.env.wasm.numThreads = 1; // more need headers that few static hosts send
    ort.env.wasm.wasmPaths = { wasm: new URL(runtime.binary, import.meta.url).href };
    const opened = await Sampler.open(bytes, { ort, sessionOptions: { executionProviders: runtime.providers } });
    await sampler?.release();
    sampler = opened;
    return { spec: opened.spec, samplers: SAMPLERS, defaultEta: DEFAULT_ETA, spacings: SPACINGS, engine: runtime.name };
  },

  /** Draw samples, with a message "row" after each call of the network. */
  async draw({ count, options }) {
    running = new AbortController();
    const started = performance.now();
    const { numRows } = sampler.table(options);
    let [done, total] = [0, 0];
    const samples = await sampler.sample(count, {
      ...options,
      signal: running.signal,
      onRow: (...calls) => ([done, total] = calls),
      onPreview(x0, first, noisy) {
        const x = noisy();
        const row = ((done - 1) % numRows) + 1;
        self.postMessage({ type: "row", row, numRows, done, total, first, x0, x }, [x0.buffer, x.buffer]);
      },
    });
    return { samples, calls: total, seconds: (performance.now() - started) / 1000 };
  },
};

self.onmessage = async ({ data: { type, id, ...request } }) => {
  if (type === "stop") return running?.abort();
  try {
    self.postMessage({ type: "done", id, result: await requests[type](request) });
  } catch (error) {
    const stopped = error instanceof DOMException && error.name === "AbortError";
    const message = error instanceof InputError ? error.message : `unexpected: ${error?.message ?? error}`;
    self.postMessage({ type: "failed", id, stopped, message });
  }
};
