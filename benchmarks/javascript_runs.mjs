/**
 * Draws samples with the module javascript/ for benchmarks and tests, see javascript_runs.py.
 *
 * A run has `file` (its name), `count` and `options` for `sample`, and perhaps `watch`: then what the callbacks were
 * given comes too. What comes of a run are its samples, or the name and the message of the error. In Node.js a program
 * that reads runs from stdin and writes to stdout, both JSON.
 */

export async function draw(runs, read, { Sampler, ort }) {
  const opened = new Map();
  const found = [];
  for (const { file, count, options = {}, watch = false } of runs) {
    try {
      if (!opened.has(file)) opened.set(file, await Sampler.open(await read(file), { ort }));
      const [rows, previews] = [[], []];
      const callbacks = {
        onRow: (done, total) => rows.push([done, total]),
        onPreview: (x0, first, x) => previews.push({ first, x0: Array.from(x0), x: Array.from(x()) }),
      };
      const samples = await opened.get(file).sample(count, { ...options, ...(watch ? callbacks : {}) });
      found.push({ samples: Array.from(samples), ...(watch ? { rows, previews } : {}) });
    } catch (error) {
      found.push({ error: error.name, message: error.message });
    }
  }
  return found;
}

if (globalThis.process?.argv[1]?.endsWith("javascript_runs.mjs")) {
  const { readFileSync } = await import("node:fs");
  const { createRequire } = await import("node:module");
  const { Sampler } = await import("../javascript/src/index.js");
  const ort = createRequire(new URL("../javascript/", import.meta.url))("onnxruntime-node");
  const runs = JSON.parse(readFileSync(0, "utf8"));
  console.log(JSON.stringify(await draw(runs, readFileSync, { Sampler, ort })));
}
