// Reads a sampler.onnx and draws samples, from docs/onnx-format.md alone, with Node.js and onnxruntime-node.
//
//     npm install --ignore-scripts onnxruntime-node       # in the working directory, or a folder of NODE_PATH
//     node docs/onnx_reader.mjs sampler.onnx 16 samples.npy
//
// An example for whoever writes a reader in another language. Sections of the page are named in the comments.
// Arrays of samples are flat Float64Arrays, sample after sample.

import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const ort = createRequire(`${process.cwd()}/`)("onnxruntime-node");

const PREFIX = "ray_ddpm.";
const COLUMNS = ["a", "b", "c", "d", "e", "f", "s", "lo", "hi"]; // of version 1; version 2 writes its own
const EXTRA_COLUMNS = ["e2", "g"];
const PARTS = ["data", "schedule", "prediction_type", "sampler", "provenance"];
const EXTRA_PARTS = ["noise_level", "conditions"];

// The session, the spec and the default table of a file. Sections "Metadata" and "What to refuse".
export async function read(path) {
  const content = readFileSync(path);
  const entries = metadata(content);
  const version = entries[`${PREFIX}format_version`];
  if (version !== "1" && version !== "2") throw Error(`${path}: format version ${version} is not known`);
  const spec = JSON.parse(entries[`${PREFIX}spec`]);
  const columns = version === "2" ? JSON.parse(entries[`${PREFIX}columns`]) : COLUMNS;
  const parts = version === "2" ? [...PARTS, ...EXTRA_PARTS] : PARTS;
  const unknown = [
    ...columns.filter((name) => ![...COLUMNS, ...EXTRA_COLUMNS].includes(name)),
    ...Object.keys(spec).filter((name) => !parts.includes(name)),
  ];
  if (unknown.length) throw Error(`${path}: ${unknown.join(", ")} is not known`);
  const values = new Float64Array(decode(entries[`${PREFIX}table`]));
  const table = Object.fromEntries(
    columns.map((name, place) => [name, values.filter((_, index) => index % columns.length === place)]),
  );
  for (const name of columns)
    if (name !== "lo" && name !== "hi" && !table[name].every(Number.isFinite))
      throw Error(`${path}: the table is not finite`);
  if (spec.noise_level) table.noise_level = new Float64Array(decode(entries[`${PREFIX}noise_levels`]));
  else table.timestep = Float64Array.from(new BigInt64Array(decode(entries[`${PREFIX}timesteps`])), Number);
  return { session: await ort.InferenceSession.create(content), spec, table };
}

// Base64 of little-endian numbers, as an ArrayBuffer of its own.
function decode(text) {
  return Uint8Array.from(Buffer.from(text, "base64")).buffer;
}

// The metadata, which onnxruntime-node does not give, from the file itself. Section "Metadata".
function metadata(bytes) {
  const found = {};
  for (const [field, entry] of fields(bytes)) {
    if (field !== 14) continue;
    const pair = Object.fromEntries(fields(entry));
    found[pair[1].toString("utf8")] = pair[2]?.toString("utf8") ?? "";
  }
  return found;
}

// [number, bytes] of the length-delimited fields of a protobuf message.
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    const wireType = tag % 8;
    if (wireType === 2) {
      const length = varint();
      yield [Math.floor(tag / 8), bytes.subarray(at, at + length)];
      at += length;
    } else if (wireType === 0) varint();
    else at += wireType === 1 ? 8 : 4;
  }
}

// Timesteps of a sampler with fewer steps, noisy first. Section "Spacings".
export function spacedTimesteps(logSnr, numSteps, spacing) {
  const total = logSnr.length;
  const index = Array.from({ length: numSteps }, (_, i) => i);
  let rising;
  if (spacing === "leading") rising = index.map((i) => i * Math.floor(total / numSteps));
  else if (spacing === "trailing")
    rising = index.map((i) => roundHalfToEven(total - (numSteps - 1 - i) * (total / numSteps)) - 1);
  else if (numSteps === 1) rising = [total - 1];
  else if (spacing === "linspace") rising = linspace(0, total - 1, numSteps).map(roundHalfToEven);
  else {
    const falling = logSnr.map((value) => Math.max(value, -10));
    const [first, last] = [falling[0], falling[total - 1]];
    const targets =
      spacing === "karras"
        ? linspace(Math.exp(first / -14), Math.exp(last / -14), numSteps).map((root) => -14 * Math.log(root))
        : linspace(first, last, numSteps);
    let highest = -Infinity;
    rising = targets.map((target, i) => {
      highest = Math.max(highest, nearestTimestep(falling, target) - i);
      return Math.min(highest + i, total - numSteps + i);
    });
    rising[numSteps - 1] = total - 1;
  }
  return rising.reverse();
}

// The timestep with the nearest value, the smallest of equally near ones.
function nearestTimestep(logSnr, target) {
  let nearest = 0;
  for (let t = 1; t < logSnr.length; t++)
    if (Math.abs(logSnr[t] - target) < Math.abs(logSnr[nearest] - target)) nearest = t;
  return nearest;
}

function linspace(first, last, count) {
  const stride = (last - first) / (count - 1);
  return Array.from({ length: count }, (_, i) => (i === count - 1 ? last : first + i * stride));
}

function roundHalfToEven(value) {
  const floor = Math.floor(value);
  return floor + (value - floor > 0.5 || (value - floor === 0.5 && floor % 2 !== 0) ? 1 : 0);
}

// The table of another sampler than the file's own. Section "Samplers".
export function buildTable(spec, sampler, numSteps, options = {}) {
  const { eta = sampler === "heun_churn" ? 0.25 : 0, spacing = "logsnr" } = options;
  const { sqrt } = Math;
  let product = 1;
  let sum = 0;
  const alphasCumprod = spec.schedule.betas.map((beta) => (product *= 1 - beta));
  const logSnr = spec.schedule.betas.map((beta) => {
    sum += Math.log1p(-beta);
    return sum - Math.log(-Math.expm1(sum));
  });
  const visited = spacedTimesteps(logSnr, numSteps, spacing);
  const twoRows = sampler === "heun" || sampler === "heun_churn";
  // Where each step starts: raised by heun_churn, except at both ends. Section "Heun".
  const starts = visited.map((timestep, i) => {
    if (sampler !== "heun_churn" || i === 0 || i === numSteps - 1) return timestep;
    return nearestTimestep(logSnr, logSnr[timestep] - 2 * Math.log1p(eta * (Math.SQRT2 - 1)));
  });
  const timesteps = twoRows
    ? starts.flatMap((timestep, i) => (i < numSteps - 1 ? [timestep, visited[i + 1]] : [timestep]))
    : visited;
  const step = (i) => logSnr[timesteps[i + 1]] - logSnr[timesteps[i]];
  const learned = sampler === "ddpm" && spec.sampler.variance === "learned";
  const [lo, hi] = spec.sampler.clip ?? [-Infinity, Infinity];
  const rows = timesteps.map((timestep, i) => {
    const at = alphasCumprod[timestep]; // alphas_cumprod before the row
    const last = i === timesteps.length - 1;
    const after = last ? 1 : alphasCumprod[timesteps[i + 1]]; // and after it
    if (at === 0 && (spec.prediction_type === "epsilon" || spec.noise_level))
      throw Error("alphas_cumprod reaches 0");
    const [a, b] = {
      epsilon: [1 / sqrt(at), -sqrt((1 - at) / at)],
      sample: [0, 1],
      v_prediction: [sqrt(at), -sqrt(1 - at)],
    }[spec.prediction_type];
    const sigma = sqrt((1 - at) / at);
    const row = { timestep, noise_level: spec.noise_level === "sigma" ? sigma : logSnr[timestep] };
    Object.assign(row, { a, b, c: 1, d: 0, e: 0, e2: 0, f: 0, s: 0, lo, hi });
    if (learned) row.g = 0;
    if (last) return row; // it returns x0
    const beta = 1 - at / after;
    const betaTilde = (beta * (1 - after)) / (1 - at);
    if (twoRows && i % 2) {
      const rho = Math.exp((logSnr[timestep] - logSnr[timesteps[i - 1]]) / 2);
      const w = rho > 3 ? 0 : (sqrt(at) * (rho - 1)) / 2;
      const kept = after / at; // A[r_{i+1}] / A[t_{i+1}]
      const k = sqrt(kept);
      return Object.assign(row, { c: k * w, d: k, e: -k * w, s: sqrt(1 - kept) });
    }
    if (sampler === "ddpm" || sampler === "dpmpp_2m_sde") {
      row.c = (sqrt(after) * beta) / (1 - at);
      row.d = (sqrt(at / after) * (1 - after)) / (1 - at);
      row.s = sqrt(sampler === "ddpm" && spec.sampler.variance === "beta" ? beta : betaTilde);
      if (learned) [row.s, row.g] = [sqrt(sqrt(betaTilde * beta)), 0.25 * Math.log(beta / betaTilde)];
    } else {
      if (sampler === "ddim") row.s = eta * sqrt(betaTilde);
      row.d = sqrt(Math.max(1 - after - row.s ** 2, 0)) / sqrt(1 - at);
      row.c = sqrt(after) - row.d * sqrt(at);
    }
    if (sampler.startsWith("dpmpp_") && i > 0) {
      const ratio = step(i) / step(i - 1);
      const weight = ratio > 3 ? 0 : ratio / 2; // first order after a step too short
      row.e = -row.c * weight;
      row.c *= 1 + weight;
      const lowered = i === numSteps - 2 && numSteps < 15;
      if (sampler === "dpmpp_3m" && i > 1 && !lowered && ratio <= 3 && step(i - 1) / step(i - 2) <= 3)
        Object.assign(row, thirdOrder(step(i), step(i - 1), step(i - 2), sqrt(after)));
    }
    return row;
  });
  const names = Object.keys(rows[0]).filter((name) => name !== (spec.noise_level ? "timestep" : "noise_level"));
  return Object.fromEntries(names.map((name) => [name, rows.map((row) => row[name])]));
}

// c, e and e2 of a row from steps of log_snr. Section "Order 3".
function thirdOrder(step, stepBefore, stepBeforeThat, signal) {
  const [h, r1, r2] = [step / 2, stepBefore / step, stepBeforeThat / step];
  const p1 = -Math.expm1(-h);
  const p2 = 1 - p1 / h;
  const p3 = 1 - (2 * p2) / h;
  const q = (r1 * p2 + p3) / (r1 + r2);
  const [u, v] = [(p2 + q) / r1, q / r2];
  return { c: signal * (p1 + u), e: -signal * (u + v), e2: signal * v };
}

// Threefry 2x32 with 20 rounds. Section "Noise".
export function threefry(key0, key1, x0, x1) {
  const keys = [key0, key1, (key0 ^ key1 ^ 0x1bd11bda) >>> 0];
  x0 = (x0 + key0) >>> 0;
  x1 = (x1 + key1) >>> 0;
  for (let group = 0; group < 5; group++) {
    for (const rotation of group % 2 ? [17, 29, 16, 24] : [13, 15, 26, 6]) {
      x0 = (x0 + x1) >>> 0;
      x1 = (((x1 << rotation) | (x1 >>> (32 - rotation))) ^ x0) >>> 0;
    }
    x0 = (x0 + keys[(group + 1) % 3]) >>> 0;
    x1 = (x1 + keys[(group + 2) % 3] + group + 1) >>> 0;
  }
  return [x0, x1];
}

// Standard normal noise of samples 0 ... numSamples - 1 of a seed. Section "Noise".
function noise(seed, numSamples, k, size) {
  const values = new Float64Array(numSamples * size);
  for (let index = 0; index < numSamples; index++)
    for (let element = 0; element < size; element += 2) {
      const [w0, w1] = threefry(seed % 2 ** 32, index, k, element / 2);
      const radius = Math.sqrt(-2 * Math.log((w0 + 0.5) / 2 ** 32));
      const theta = (2 * Math.PI * (w1 + 0.5)) / 2 ** 32;
      values[index * size + element] = radius * Math.cos(theta);
      if (element + 1 < size) values[index * size + element + 1] = radius * Math.sin(theta);
    }
  return values;
}

// Samples in data units, Float32Array [numSamples, ...shape]. Sections "The update" and "Guidance".
// `labels` are numbers of classes, one per sample. `conditions` are flat arrays by name, one row per sample.
export async function sample({ session, spec }, table, numSamples, options = {}) {
  const { seed = 0, guidanceScale = spec.sampler.guidance_scale, conditions = {} } = options;
  const { shape, classes } = spec.data;
  const numClasses = classes?.length ?? 0;
  const size = shape.reduce((product, side) => product * side, 1);
  const dims = [numSamples, ...shape];
  const labels = options.labels ?? Array.from({ length: numSamples }, (_, index) => index % numClasses);
  const learned = "g" in table;
  const extra = {};
  for (const { name, shape, mean, std } of spec.conditions ?? []) {
    if (!(name in conditions)) throw Error(`the model needs the condition ${name} of shape [${shape}]`);
    const [means, stds] = [broadcast(mean, shape), broadcast(std, shape)];
    const values = Float32Array.from(
      conditions[name],
      (value, i) => (value - means[i % means.length]) / stds[i % stds.length],
    );
    extra[`condition_${name}`] = new ort.Tensor("float32", values, [numSamples, ...shape]);
  }

  const int64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [numSamples]);
  const call = async (x, row, y) => {
    const inputs = { x: new ort.Tensor("float32", Float32Array.from(x), dims), ...extra };
    if (table.timestep) inputs.t = int64(Array(numSamples).fill(table.timestep[row]));
    else {
      const levels = new Float32Array(numSamples).fill(table.noise_level[row]);
      inputs[spec.noise_level] = new ort.Tensor("float32", levels, [numSamples]);
    }
    if (numClasses) inputs.y = int64(y);
    const { model_output, variance } = await session.run(inputs);
    return [Float64Array.from(model_output.data), variance?.data];
  };

  let x = noise(seed, numSamples, 0, size);
  let x0 = new Float64Array(x.length);
  let x0Previous = x0;
  for (let i = 0; i < table.a.length; i++) {
    const [out, variance] = await call(x, i, labels);
    if (numClasses && guidanceScale !== 1) {
      const [none] = await call(x, i, Array(numSamples).fill(numClasses));
      for (let j = 0; j < out.length; j++) out[j] = none[j] + guidanceScale * (out[j] - none[j]);
    }
    const [a, b, c, d, e, f, s, lo, hi] = COLUMNS.map((name) => table[name][i]);
    const [e2, g] = EXTRA_COLUMNS.map((name) => table[name]?.[i] ?? 0);
    const z = s ? noise(seed, numSamples, i + 1, size) : new Float64Array(x.length);
    const x0Previous2 = x0Previous;
    x0Previous = x0;
    x0 = x.map((value, j) => Math.min(Math.max(a * value + b * out[j], lo), hi));
    x = x.map(
      (value, j) =>
        c * x0[j] + d * value + e * x0Previous[j] + e2 * x0Previous2[j] + f * out[j] +
        s * (learned ? Math.exp(g * variance[j]) : 1) * z[j],
    );
  }
  const [mean, std] = [broadcast(spec.data.mean, shape), broadcast(spec.data.std, shape)];
  const [lowest, highest] = spec.data.range ?? [-Infinity, Infinity];
  return Float32Array.from(x, (value, j) =>
    Math.min(Math.max(value * std[j % size] + mean[j % size], lowest), highest),
  );
}

// A number or nested lists as a flat array of the shape, aligned at the last dimension. Section "Metadata".
export function broadcast(value, shape) {
  let depth = 0;
  for (let each = value; Array.isArray(each); each = each[0]) depth++;
  const expand = (each, level, sizes) => {
    if (!sizes.length) return [each];
    const inside = level >= sizes.length; // this dimension is one of the lists' own
    return Array.from({ length: sizes[0] }, (_, i) =>
      expand(inside ? each[each.length === 1 ? 0 : i] : each, inside ? level - 1 : level, sizes.slice(1)),
    ).flat();
  };
  return expand(value, depth, shape);
}

// A float32 file of numpy.save.
function npy(values, shape) {
  const header = `{'descr': '<f4', 'fortran_order': False, 'shape': (${shape.join(", ")},), }`;
  const padded = `${header.padEnd(117)}\n`; // 10 bytes before it, 128 in all
  const start = Buffer.from([0x93, ..."NUMPY".split("").map((c) => c.charCodeAt(0)), 1, 0, padded.length, 0]);
  return Buffer.concat([start, Buffer.from(padded), Buffer.from(values.buffer)]);
}

if (process.argv[1] && import.meta.url === pathToFileURL(process.argv[1]).href) {
  if (process.argv.length !== 5) throw Error("usage: node onnx_reader.mjs sampler.onnx NUM_SAMPLES samples.npy");
  const [file, count, output] = process.argv.slice(2);
  const model = await read(file);
  const samples = await sample(model, model.table, Number(count));
  writeFileSync(output, npy(samples, [Number(count), ...model.spec.data.shape]));
  console.log(`${output}: ${count} samples`);
}
