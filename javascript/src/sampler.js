/** Draws samples from a sampler.onnx with ONNX Runtime. */

import { InputError } from "./errors.js";
import { resolveConditions, resolveGuidance, resolveLabels, seedWord, wholeNumber } from "./inputs.js";
import { readMetadata } from "./metadata.js";
import { normalNoise } from "./noise.js";
import { samplerTable } from "./samplers.js";
import { broadcast, classesOf, readSpec, signatureOf, sizeOf } from "./spec.js";

/** @typedef {import("./spec.js").SamplerSpec} SamplerSpec */
/** @typedef {import("./spec.js").SamplerTable} SamplerTable */

/**
 * The part of onnxruntime-node and onnxruntime-web that is used.
 * @typedef {object} Runtime
 * @property {{ create(content: Uint8Array, options?: any): Promise<any> }} InferenceSession
 * @property {new (type: any, data: any, dims: readonly number[]) => any} Tensor
 */

/**
 * @typedef {object} OpenOptions
 * @property {Runtime} ort the runtime: `import * as ort from "onnxruntime-node"`, or from "onnxruntime-web"
 * @property {object} [sessionOptions] options of ONNX Runtime, such as `{ executionProviders: ["webgpu"] }`
 */

/**
 * Everything is optional; what is left out is the file's.
 * @typedef {object} SampleOptions
 * @property {number | bigint} [seed] 0 if it is left out; only seed mod 2^32 is used
 * @property {string} [sampler] a name of `SAMPLERS`, or "fast" for the file's choice with few network evaluations
 * @property {number} [numSteps] from 1 to the number of training timesteps
 * @property {number} [eta] fraction of fresh noise, 0 to 1, in the samplers of `DEFAULT_ETA`
 * @property {import("./schedule.js").Spacing} [spacing] how the timesteps are chosen
 * @property {import("./inputs.js").Labels} [labels] for a conditional model, the name or number of one class for all
 *   samples, or one for each; by default sample i has label i modulo the number of classes
 * @property {number} [guidanceScale] for a conditional model, 0 to 100: 0 ignores the class, 1 draws it as learned
 * @property {Record<string, import("./inputs.js").ConditionValues>} [conditions] for a model with condition inputs,
 *   the values of each by its name, in its units
 * @property {number} [firstIndex] index of the first sample: draws samples firstIndex, firstIndex + 1, ... of the seed
 * @property {number} [batchSize] number of samples that go through the network at a time
 * @property {AbortSignal} [signal] ends the call between two network calls, with the signal's reason
 * @property {(done: number, total: number) => void} [onRow] called after each network call
 * @property {(x0: Float32Array, firstSample: number, x: () => Float32Array) => void} [onPreview] called after each
 *   network call with the model's estimate of the finished samples of the batch, in data units; with the number of the
 *   batch's first sample; and with a function that gives the noisy samples themselves, in data units as well
 */

const MAX_SAMPLES = 10_000_000;
const NUM_INDICES = 2 ** 32;
const MAX_BATCH_SIZE = 1024;
const MAX_BATCH_VALUES = 2 ** 16; // activations of larger batches leave a core's cache
const YIELD_MS = 10;

/**
 * Draws samples from a diffusion model stored in a `sampler.onnx` file.
 *
 *     const sampler = await Sampler.open(bytes, { ort });
 *     const digits = await sampler.sample(64, { seed: 0 }); // Float32Array of 64 * 1 * 8 * 8 values in data units
 *
 * A seed fixes its samples: sample i is the same for any number of samples and any batch size, and the same that
 * Python's `export.Sampler` draws, up to rounding.
 */
export class Sampler {
  /** @type {any} */
  #session;
  /** @type {Runtime} */
  #ort;
  /** @type {Float64Array} */
  #mean;
  /** @type {Float64Array} */
  #std;

  /**
   * Use `Sampler.open`.
   * @param {any} session
   * @param {Runtime} ort
   * @param {SamplerSpec} spec
   * @param {SamplerTable} table
   */
  constructor(session, ort, spec, table) {
    this.#session = session;
    this.#ort = ort;
    /** The file's metadata. */
    this.spec = spec;
    /** The table of the file's default sampler. */
    this.defaultTable = table;
    this.#mean = broadcast(spec.data.mean, spec.data.shape);
    this.#std = broadcast(spec.data.std, spec.data.shape);
  }

  /**
   * Open the content of a sampler.onnx.
   * @param {Uint8Array | ArrayBuffer} content
   * @param {OpenOptions} options
   * @returns {Promise<Sampler>}
   * @throws {InputError} the content is not that of a sampler.onnx, or the runtime cannot run it
   */
  static async open(content, { ort, sessionOptions }) {
    const bytes = content instanceof Uint8Array ? content : new Uint8Array(content);
    const { spec, table } = readSpec(readMetadata(bytes));
    let session;
    try {
      session = await ort.InferenceSession.create(bytes, {
        logSeverityLevel: 4,
        // A model from elsewhere may not read other files, which ONNX Runtime would look for in the working directory.
        extra: { session: { model_external_initializers_file_folder_path: "/dev/null/none" } },
        ...sessionOptions,
      });
    } catch (error) {
      throw new InputError(`ONNX Runtime cannot read the model: ${firstLine(error)}`, { cause: error });
    }
    checkSignature(session, spec);
    return new Sampler(session, ort, spec, table);
  }

  /** Class names by label; empty if the model is unconditional. */
  get classes() {
    return classesOf(this.spec);
  }

  /** Free the memory of ONNX Runtime's session. */
  async release() {
    await this.#session.release();
  }

  /**
   * The table of a sampler; without options the file's own.
   * @param {import("./samplers.js").SamplerOptions} [options]
   * @returns {SamplerTable}
   */
  table(options = {}) {
    const { sampler, numSteps, eta, spacing } = options;
    const own = [sampler, numSteps, eta, spacing].every((value) => value === undefined);
    return own ? this.defaultTable : samplerTable(this.spec, options);
  }

  /**
   * Draw samples.
   * @param {number} numSamples at least 1
   * @param {SampleOptions} [options]
   * @returns {Promise<Float32Array>} the samples in data units, one after another, each of `spec.data.shape`
   * @throws {InputError} a value is out of range, a name is unknown, or the samples are not finite
   */
  async sample(numSamples, options = {}) {
    const { signal, onRow, onPreview } = options;
    const size = sizeOf(this.spec.data.shape);
    wholeNumber("numSamples", numSamples, 1, MAX_SAMPLES);
    const seed = seedWord(options.seed ?? 0);
    const firstIndex = wholeNumber("firstIndex", options.firstIndex ?? 0, 0, NUM_INDICES - numSamples);
    const batchSize = wholeNumber("batchSize", options.batchSize ?? this.#defaultBatchSize(), 1, MAX_SAMPLES);
    const labels = resolveLabels(this.spec, options.labels, numSamples, firstIndex);
    const scale = resolveGuidance(this.spec, options.guidanceScale);
    const conditions = resolveConditions(this.spec, options.conditions, numSamples);
    const table = this.table(options);
    const samples = new Float32Array(numSamples * size);
    const totalCalls = Math.ceil(numSamples / batchSize) * table.numRows;
    const pause = pauses();
    let calls = 0;
    signal?.throwIfAborted();
    for (let first = 0; first < numSamples; first += batchSize) {
      const count = Math.min(batchSize, numSamples - first);
      const denoise = this.#denoiser(count, {
        labels: labels && labels.slice(first, first + count),
        scale,
        conditions: conditions.map(({ name, shape, values }) => {
          const each = sizeOf(shape);
          return { name, shape, values: values.subarray(first * each, (first + count) * each) };
        }),
        table,
      });
      const noise = (/** @type {number} */ k) => normalNoise(seed, firstIndex + first, count, k, size);
      let x = noise(0);
      for await (const state of trajectory(denoise, x, table, noise)) {
        x = state.x;
        onRow?.(++calls, totalCalls);
        onPreview?.(this.#inDataUnits(state.x0), first, () => this.#inDataUnits(state.x));
        await pause();
        signal?.throwIfAborted();
      }
      const finished = this.#inDataUnits(x);
      if (!finished.every(Number.isFinite))
        throw new InputError(
          "the samples are not finite: the model is broken or diverges with this sampler; choose another sampler " +
            "or more steps",
        );
      samples.set(finished, first * size);
    }
    return samples;
  }

  /**
   * A function from x and a row's index to the network's outputs, with guidance.
   * @param {number} count number of samples
   * @param {{ labels: number[] | null, scale: number, table: SamplerTable,
   *   conditions: { name: string, shape: number[], values: Float32Array }[] }} options
   * @returns {(x: Float64Array, row: number) => Promise<[ArrayLike<number>, ArrayLike<number> | null]>}
   */
  #denoiser(count, { labels, scale, conditions, table }) {
    const { Tensor } = this.#ort;
    const guided = labels !== null && scale !== 1;
    const copies = guided ? 2 : 1; // with guidance, the samples without their classes come first
    const batch = copies * count;
    const repeated = (/** @type {Float64Array | Float32Array} */ values) => {
      const result = new Float32Array(copies * values.length);
      for (let copy = 0; copy < copies; copy++) result.set(values, copy * values.length);
      return result;
    };
    const int64 = (/** @type {number[]} */ values) =>
      new Tensor("int64", BigInt64Array.from(values, BigInt), [batch]);
    /** @type {Record<string, any>} */
    const fixed = {};
    for (const { name, shape, values } of conditions)
      fixed[name] = new Tensor("float32", repeated(values), [batch, ...shape]);
    if (labels) fixed.y = int64(guided ? [...Array(count).fill(this.classes.length), ...labels] : labels);
    const level = (/** @type {number} */ row) =>
      table.noiseLevels
        ? new Tensor("float32", new Float32Array(batch).fill(table.noiseLevels[row]), [batch])
        : int64(Array(batch).fill(/** @type {number[]} */ (table.timesteps)[row]));
    return async (x, row) => {
      const inputs = {
        ...fixed,
        x: new Tensor("float32", repeated(x), [batch, ...this.spec.data.shape]),
        [this.spec.noise_level ?? "t"]: level(row),
      };
      const { model_output, variance } = await this.#run(inputs);
      for (const output of variance ? [model_output, variance] : [model_output])
        if (output.data.length !== copies * x.length)
          throw new InputError("the model's output has another shape than its input: export the model again");
      if (!guided) return [model_output.data, variance?.data ?? null];
      const [none, labelled] = [model_output.data, model_output.data.subarray(x.length)];
      return [x.map((_, i) => none[i] + scale * (labelled[i] - none[i])), variance?.data.subarray(x.length) ?? null];
    };
  }

  /** @param {Record<string, any>} inputs */
  async #run(inputs) {
    try {
      return await this.#session.run(inputs);
    } catch (error) {
      throw new InputError(`ONNX Runtime cannot run the model: ${firstLine(error)}`, { cause: error });
    }
  }

  /** @param {Float64Array} x */
  #inDataUnits(x) {
    const [lowest, highest] = this.spec.data.range ?? [-Infinity, Infinity];
    const size = this.#mean.length;
    const data = new Float32Array(x.length);
    for (let i = 0; i < x.length; i++) {
      const place = i % size;
      data[i] = Math.min(Math.max(x[i] * this.#std[place] + this.#mean[place], lowest), highest);
    }
    return data;
  }

  #defaultBatchSize() {
    const shapes = [this.spec.data.shape, ...(this.spec.conditions ?? []).map((each) => each.shape)];
    const values = Math.max(...shapes.map(sizeOf));
    return Math.max(1, Math.min(MAX_BATCH_SIZE, Math.floor(MAX_BATCH_VALUES / values)));
  }
}

/**
 * Run a table from noise to samples. Section "The update".
 * @param {(x: Float64Array, row: number) => Promise<[ArrayLike<number>, ArrayLike<number> | null]>} denoise
 * @param {Float64Array} start the noise to start from
 * @param {SamplerTable} table
 * @param {(k: number) => Float64Array} noise
 * @returns {AsyncGenerator<{ x: Float64Array, x0: Float64Array }>} after each row; the last x are the samples
 */
async function* trajectory(denoise, start, table, noise) {
  const { columns, learnedVariance } = table;
  const length = start.length;
  let x = start;
  let x0 = new Float64Array(length);
  let previous = x0;
  for (let row = 0; row < table.numRows; row++) {
    const [out, variance] = await denoise(x, row);
    const [a, b, lo, hi] = [columns.a[row], columns.b[row], columns.lo[row], columns.hi[row]];
    const [c, d, e, e2] = [columns.c[row], columns.d[row], columns.e[row], columns.e2[row]];
    const [f, s, g] = [columns.f[row], columns.s[row], columns.g[row]];
    const z = s ? noise(row + 1) : null;
    const scales = learnedVariance && g ? variance : null;
    const previous2 = previous;
    previous = x0;
    x0 = new Float64Array(length);
    const next = new Float64Array(length);
    for (let i = 0; i < length; i++) {
      x0[i] = Math.min(Math.max(a * x[i] + b * out[i], lo), hi);
      let value = c * x0[i] + d * x[i] + e * previous[i];
      if (e2) value += e2 * previous2[i];
      value += f * out[i];
      if (z) value += (scales ? s * Math.exp(g * scales[i]) : s) * z[i];
      next[i] = value;
    }
    x = next;
    yield { x, x0 };
  }
}

/**
 * A function that lets other tasks of the thread run, such as one that aborts: `session.run` of WebAssembly does not.
 */
function pauses() {
  let last = performance.now();
  return async () => {
    if (performance.now() - last < YIELD_MS) return;
    await new Promise((resolve) => {
      const { port1, port2 } = new MessageChannel(); // timers would wait for 4 ms
      port1.onmessage = () => {
        port1.close();
        resolve(undefined);
      };
      port2.postMessage(null);
    });
    last = performance.now();
  };
}

/**
 * @param {any} session
 * @param {SamplerSpec} spec
 */
function checkSignature(session, spec) {
  const needed = signatureOf(spec);
  const sides = /** @type {const} */ ([
    [session.inputMetadata, needed.inputs],
    [session.outputMetadata, needed.outputs],
  ]);
  for (const [actual, expected] of sides) {
    const fits = actual.every(
      (/** @type {{ name: string, type: string, shape: (number | string)[] }} */ { name, type, shape }) =>
        Object.hasOwn(expected, name) &&
        type === expected[name].type &&
        typeof shape[0] === "string" &&
        `${shape.slice(1)}` === `${expected[name].shape}`,
    );
    if (fits && actual.length === Object.keys(expected).length) continue;
    const list = (/** @type {[string, string, any[]][]} */ values) =>
      values.map(([name, type, shape]) => `${name} ${type} [${shape.join(", ")}]`).join(", ").slice(0, 300);
    const found = list(actual.map((/** @type {any} */ { name, type, shape }) => [name, type, shape ?? []]));
    const wanted = list(Object.entries(expected).map(([name, { type, shape }]) => [name, type, ["batch", ...shape]]));
    throw new InputError(`the model has ${found}, but needs ${wanted}: export the model again`);
  }
}

/** @param {unknown} error */
function firstLine(error) {
  return String(error instanceof Error ? error.message : error).split("\n")[0].slice(0, 160);
}
