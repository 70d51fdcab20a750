/**
 * Everything about a model that sampling needs besides the network, read from a file's metadata and checked. Sections
 * "Metadata", "What to refuse" and "Format version 2" of docs/onnx-format.md.
 */

import { InputError, shown } from "./errors.js";
import { SPACINGS } from "./schedule.js";

/** @typedef {import("./schedule.js").Spacing} Spacing */
/** @typedef {"epsilon" | "sample" | "v_prediction"} PredictionType */
/** @typedef {"sigma" | "log_snr"} NoiseLevel */
/** @typedef {number | number[] | number[][] | number[][][]} NestedNumbers */

/**
 * @typedef {object} DataSpec
 * @property {"image" | "points"} kind
 * @property {number[]} shape of one sample: [C, H, W] or [D]
 * @property {NestedNumbers} mean broadcasts against the shape: data = x * std + mean
 * @property {NestedNumbers} std
 * @property {[number, number] | null} range smallest and largest value in data units; null for points
 * @property {string[] | null} [columns] names of the columns of points
 * @property {string[] | null} [classes] class names by label; absent or null if the model is unconditional
 */

/**
 * @typedef {object} SamplerChoice
 * @property {string} name
 * @property {number} num_steps
 */

/**
 * @typedef {object} DefaultSampler
 * @property {string} name
 * @property {number} num_steps
 * @property {number} eta 0 to 1
 * @property {"beta_tilde" | "beta" | "learned"} variance
 * @property {Spacing} spacing
 * @property {[number, number] | null} clip in normalised units
 * @property {number} guidance_scale 0 to 100
 * @property {SamplerChoice} [fast] a sampler with at most 20 network evaluations, if it was measured
 */

/**
 * @typedef {object} ConditionSpec
 * @property {string} name
 * @property {number[]} shape [] for a single number
 * @property {NestedNumbers} mean the network receives (value - mean) / std
 * @property {NestedNumbers} std
 */

/**
 * @typedef {object} SamplerSpec
 * @property {DataSpec} data
 * @property {{ kind?: string, betas: number[], [parameter: string]: unknown }} schedule
 * @property {PredictionType} prediction_type
 * @property {DefaultSampler} sampler the default sampler
 * @property {Record<string, unknown>} provenance
 * @property {NoiseLevel} [noise_level] what the network receives instead of a timestep
 * @property {ConditionSpec[]} [conditions] further inputs of the network
 */

/**
 * A sampler, one row for each call of the network, noisiest first.
 * @typedef {object} SamplerTable
 * @property {number} numRows
 * @property {number[] | null} timesteps what the network receives in each row, or null if it receives `noiseLevels`
 * @property {number[] | null} noiseLevels
 * @property {Record<Column, Float64Array>} columns coefficients of each row; zeros in a column that the table lacks
 * @property {boolean} learnedVariance whether it has the column g
 */

/** @typedef {typeof COLUMNS[number] | typeof EXTRA_COLUMNS[number]} Column */

export const COLUMNS = /** @type {const} */ (["a", "b", "c", "d", "e", "f", "s", "lo", "hi"]);
export const EXTRA_COLUMNS = /** @type {const} */ (["e2", "g"]);

const PREFIX = "ray_ddpm.";
const PARTS = ["data", "schedule", "prediction_type", "sampler", "provenance"];
const OPTIONAL_PARTS = { 1: [], 2: ["noise_level", "conditions"] };
const MAX_ROWS = 100_000; // and timesteps of a schedule
const MAX_VALUES = 2 ** 28; // in one sample
const MAX_FLOAT32 = 3.4028234663852886e38;

/**
 * Read and check the metadata of a file.
 * @param {Map<string, string>} entries
 * @returns {{ spec: SamplerSpec, table: SamplerTable }} the spec and the default sampler's table
 * @throws {InputError} entries are missing, damaged or inconsistent, or have an unknown format version
 */
export function readSpec(entries) {
  const version = entries.get(`${PREFIX}format_version`);
  if (entries.has(`${PREFIX}whole_loop`))
    throw new InputError("the file is a whole loop, which ONNX Runtime runs by itself: give the sampler.onnx of a run");
  if (version === undefined)
    throw new InputError("the file has no ray_ddpm metadata: give the sampler.onnx of a run");
  if (version !== "1" && version !== "2")
    throw new InputError(
      `the file has ray_ddpm format ${shown(version)}, but this version reads "1" and "2": install a newer one`,
    );
  const spec = readParts(entries, OPTIONAL_PARTS[version]);
  const columns = version === "2" ? readColumns(entries) : [...COLUMNS];
  checkSchedule(spec.schedule);
  const table = readTable(entries, spec, columns);
  checkData(spec.data);
  require(
    ["epsilon", "sample", "v_prediction"].includes(spec.prediction_type),
    `prediction_type ${shown(spec.prediction_type)}`,
  );
  checkSampler(spec.sampler, spec.schedule.betas.length, columns.includes("g"));
  const [numRows, numSteps] = [table.numRows, spec.sampler.num_steps];
  if (version === "1") {
    require(spec.sampler.spacing !== "karras", "sampler spacing karras, which needs version 2");
    const total = spec.schedule.betas.length;
    require(numRows <= total, `the table has ${numRows} rows, more than the schedule's ${total} timesteps`);
  } else {
    require(numSteps <= numRows && numRows <= MAX_ROWS, `the table has ${numRows} rows for ${numSteps} steps`);
    checkConditions(spec.conditions);
  }
  return { spec, table };
}

/**
 * Class names by label; empty if the model is unconditional.
 * @param {SamplerSpec} spec
 */
export function classesOf(spec) {
  return spec.data.classes ?? [];
}

/**
 * Number of values of a shape.
 * @param {readonly number[]} shape
 */
export function sizeOf(shape) {
  return shape.reduce((product, side) => product * side, 1);
}

/**
 * Names, types and shapes of the graph's inputs and outputs, without the batch dimension.
 * @param {SamplerSpec} spec
 */
export function signatureOf(spec) {
  const { shape } = spec.data;
  /** @type {Record<string, { type: string, shape: number[] }>} */
  const inputs = { x: { type: "float32", shape } };
  inputs[spec.noise_level ?? "t"] = { type: spec.noise_level ? "float32" : "int64", shape: [] };
  if (classesOf(spec).length) inputs.y = { type: "int64", shape: [] };
  for (const condition of spec.conditions ?? [])
    inputs[`condition_${condition.name}`] = { type: "float32", shape: condition.shape };
  /** @type {typeof inputs} */
  const outputs = { model_output: { type: "float32", shape } };
  if (spec.sampler.variance === "learned") outputs.variance = { type: "float32", shape };
  return { inputs, outputs };
}

/**
 * A number or nested lists as a flat array of a shape, aligned at the last dimension.
 * @param {NestedNumbers} value
 * @param {readonly number[]} shape
 * @throws {InputError} it does not broadcast to the shape
 */
export function broadcast(value, shape) {
  const own = nestedShape(value);
  const flat = /** @type {number[]} */ ([value].flat(Infinity));
  const offset = shape.length - own.length;
  require(
    offset >= 0 && own.every((side, axis) => side === 1 || side === shape[offset + axis]),
    `a list of shape ${shown(own)} does not fit the shape ${shown(shape)}`,
  );
  const result = new Float64Array(sizeOf(shape));
  for (let index = 0; index < result.length; index++) {
    let rest = index;
    let place = 0;
    let stride = 1;
    for (let axis = shape.length - 1; axis >= offset; axis--) {
      if (own[axis - offset] > 1) place += (rest % shape[axis]) * stride;
      rest = Math.floor(rest / shape[axis]);
      stride *= own[axis - offset];
    }
    result[index] = flat[place];
  }
  return result;
}

/**
 * Shape of nested lists of numbers.
 * @param {unknown} value
 * @param {number} [depth] how many more lists may be in each other
 * @returns {number[]}
 */
function nestedShape(value, depth = 4) {
  if (!Array.isArray(value)) {
    require(typeof value === "number", `${shown(value)} is not a number`);
    return [];
  }
  require(depth > 0 && value.length > 0, "a list of numbers is empty or nested too deeply");
  const shapes = value.map((each) => nestedShape(each, depth - 1));
  require(
    shapes.every((each) => `${each}` === `${shapes[0]}`),
    "the lists of numbers in a list are not equally long",
  );
  return [value.length, ...shapes[0]];
}

/**
 * @param {Map<string, string>} entries
 * @param {string[]} optional
 * @returns {SamplerSpec} with values that have not been checked yet
 */
function readParts(entries, optional) {
  const spec = parseJson(entryOf(entries, "spec"), "the spec");
  require(isObject(spec), "the spec is not an object");
  for (const name of PARTS) require(name in spec, `the spec has no ${name}`);
  const unknown = Object.keys(spec).filter((name) => ![...PARTS, ...optional].includes(name));
  require(!unknown.length, `the spec has an unknown part ${shown(unknown.join(", "))}`);
  for (const name of ["data", "schedule", "sampler", "provenance"])
    require(isObject(spec[name]), `${name} is not an object`);
  const level = spec.noise_level;
  require(level === undefined || level === "sigma" || level === "log_snr", `noise_level ${shown(level)}`);
  return /** @type {any} */ (spec);
}

/** @param {Map<string, string>} entries */
function readColumns(entries) {
  const columns = parseJson(entryOf(entries, "columns"), "the list of columns");
  const known = [...COLUMNS, ...EXTRA_COLUMNS];
  require(
    Array.isArray(columns) &&
      new Set(columns).size === columns.length &&
      columns.every((name) => known.includes(name)) &&
      COLUMNS.every((name) => columns.includes(name)),
    `columns ${shown(columns)} are not ${COLUMNS.join(" ")} and possibly ${EXTRA_COLUMNS.join(" ")}`,
  );
  return /** @type {Column[]} */ (columns);
}

/** @param {SamplerSpec["schedule"]} schedule */
function checkSchedule({ kind, betas }) {
  require(kind === undefined || typeof kind === "string", `schedule kind ${shown(kind)}`);
  require(
    Array.isArray(betas) && betas.length > 0 && betas.every((beta) => isNumber(beta) && beta > 0 && beta <= 1),
    "betas are not a list of numbers above 0 and up to 1",
  );
  require(
    betas.length <= MAX_ROWS,
    `the schedule has ${betas.length} timesteps, more than ${MAX_ROWS}`,
  );
}

/**
 * @param {Map<string, string>} entries
 * @param {SamplerSpec} spec
 * @param {Column[]} names
 * @returns {SamplerTable}
 */
function readTable(entries, spec, names) {
  const levels = spec.noise_level ? Array.from(decodeFloat64(entries, "noise_levels")) : null;
  const timesteps = levels ? null : Array.from(new BigInt64Array(decode(entries, "timesteps")), Number);
  const numRows = (levels ?? timesteps ?? []).length;
  const values = decodeFloat64(entries, "table");
  const alphasCumprod = decodeFloat64(entries, "alphas_cumprod");
  require(numRows > 0, "the table has no rows");
  require(
    values.length === numRows * names.length && alphasCumprod.length === numRows + 1,
    `the table and alphas_cumprod are not those of ${numRows} rows`,
  );
  const columns = emptyColumns(numRows);
  names.forEach((name, place) => {
    for (let row = 0; row < numRows; row++) columns[name][row] = values[row * names.length + place];
    const finite = name === "lo" || name === "hi" || columns[name].every(Number.isFinite);
    require(finite, "the table is not finite");
  });
  require(
    columns.lo.every((lo, row) => lo <= columns.hi[row]),
    "the table has an empty clip interval",
  );
  require(
    columns.g.every((g, row) => g === 0 || columns.s[row] !== 0),
    "g is not 0 in a row where s is 0",
  );
  require(alphasCumprod.every(Number.isFinite), "alphas_cumprod is not finite");
  const total = spec.schedule.betas.length;
  require(
    !timesteps || timesteps.every((t) => t >= 0 && t < total),
    `the table's timesteps are not all in 0..${total - 1}`,
  );
  require(
    !levels || levels.every((level) => Math.abs(level) <= MAX_FLOAT32 && (level > 0 || spec.noise_level !== "sigma")),
    `the table's noise levels are not finite${spec.noise_level === "sigma" ? " and positive" : ""}`,
  );
  return { numRows, timesteps, noiseLevels: levels, columns, learnedVariance: names.includes("g") };
}

/**
 * Columns of zeros.
 * @param {number} numRows
 */
export function emptyColumns(numRows) {
  const pairs = [...COLUMNS, ...EXTRA_COLUMNS].map((name) => [name, new Float64Array(numRows)]);
  return /** @type {Record<Column, Float64Array>} */ (Object.fromEntries(pairs));
}

/** @param {DataSpec} data */
function checkData({ kind, shape, mean, std, range, columns, classes }) {
  require(kind === "image" || kind === "points", `data kind ${shown(kind)}`);
  checkNormalisation(shape, mean, std);
  require(shape.length === (kind === "image" ? 3 : 1), `${kind} of shape ${shown(shape)}`);
  require(kind === "image" ? isInterval(range) : range === null, `${kind} with the range ${shown(range)}`);
  require(
    columns == null || (kind === "points" && areNames(columns) && columns.length === shape[0]),
    `columns ${shown(columns)} are not a name for each value of a point`,
  );
  require(classes == null || areNames(classes), "classes is not a list of names");
}

/**
 * @param {number[]} shape
 * @param {NestedNumbers} mean
 * @param {NestedNumbers} std
 */
function checkNormalisation(shape, mean, std) {
  require(
    Array.isArray(shape) && shape.every((side) => Number.isInteger(side) && side >= 1) && sizeOf(shape) <= MAX_VALUES,
    `shape ${shown(shape)}`,
  );
  for (const value of [mean, std])
    require(
      broadcast(value, shape).every((each) => Math.abs(each) <= MAX_FLOAT32),
      "mean or std is not finite",
    );
  require(
    [std].flat(Infinity).every((each) => /** @type {number} */ (each) > 0),
    "std is not positive",
  );
}

/**
 * @param {DefaultSampler} sampler
 * @param {number} total number of training timesteps
 * @param {boolean} hasG whether the table has the column g
 */
function checkSampler(sampler, total, hasG) {
  for (const choice of "fast" in sampler ? [sampler, sampler.fast] : [sampler]) {
    require(isObject(choice), `the fast sampler ${shown(choice)}`);
    const { name, num_steps } = choice;
    require(
      typeof name === "string" && /^[\p{L}_-][\p{L}\p{N}_-]*$/u.test(name),
      `sampler name ${shown(name)}`,
    );
    require(
      Number.isInteger(num_steps) && num_steps >= 1 && num_steps <= total,
      `num_steps ${shown(num_steps)} is not in 1..${total}`,
    );
  }
  const { eta, variance, spacing, clip, guidance_scale } = sampler;
  require(isNumber(eta) && eta >= 0 && eta <= 1, `eta ${shown(eta)}`);
  require(["beta_tilde", "beta", "learned"].includes(variance), `sampler variance ${shown(variance)}`);
  require(
    hasG === (variance === "learned"),
    `the variance is ${variance}, but the table has ${hasG ? "the" : "no"} column g`,
  );
  require(SPACINGS.includes(spacing), `sampler spacing ${shown(spacing)}`);
  require(clip === null || isInterval(clip), `clip ${shown(clip)}`);
  require(
    isNumber(guidance_scale) && guidance_scale >= 0 && guidance_scale <= 100,
    `guidance_scale ${shown(guidance_scale)}`,
  );
}

/** @param {ConditionSpec[] | undefined} conditions */
function checkConditions(conditions) {
  if (conditions === undefined) return;
  require(Array.isArray(conditions), "conditions is not a list");
  for (const condition of conditions) {
    require(
      isObject(condition) && `${Object.keys(condition).sort()}` === "mean,name,shape,std",
      `condition ${shown(condition)} does not have the members name, shape, mean and std`,
    );
    const { name, shape, mean, std } = condition;
    require(typeof name === "string" && /^[A-Za-z0-9_]{1,64}$/.test(name), `condition name ${shown(name)}`);
    checkNormalisation(shape, mean, std);
  }
  const names = conditions.map((condition) => condition.name);
  require(new Set(names).size === names.length, "two conditions have the same name");
}

/**
 * @param {Map<string, string>} entries
 * @param {string} name
 */
function decodeFloat64(entries, name) {
  return new Float64Array(decode(entries, name));
}

/**
 * Bytes of little-endian numbers of 8 bytes in base64. Every engine of JavaScript in use is little-endian.
 * @param {Map<string, string>} entries
 * @param {string} name
 */
function decode(entries, name) {
  const text = entryOf(entries, name);
  require(/^[A-Za-z0-9+/]*={0,2}$/.test(text) && text.length % 4 === 0, `${name} is not base64`);
  const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  require(bytes.length % 8 === 0, `${name} is not a list of numbers of 8 bytes`);
  return bytes.buffer;
}

/**
 * @param {Map<string, string>} entries
 * @param {string} name
 */
function entryOf(entries, name) {
  const text = entries.get(PREFIX + name);
  if (text === undefined) throw damaged(`it has no ${name}`);
  return text;
}

/**
 * @param {string} text
 * @param {string} what
 */
function parseJson(text, what) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw damaged(`${what} is no JSON`, error);
  }
}

/**
 * @param {unknown} condition
 * @param {string} problem
 * @returns {asserts condition}
 */
function require(condition, problem) {
  if (!condition) throw damaged(problem);
}

/**
 * @param {string} problem
 * @param {unknown} [cause]
 */
function damaged(problem, cause) {
  return new InputError(`the file's ray_ddpm metadata are damaged (${problem}): export the model again`, { cause });
}

/**
 * @param {unknown} value
 * @returns {value is Record<string, any>}
 */
function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/**
 * @param {unknown} value
 * @returns {value is number}
 */
function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

/** @param {unknown} value */
function isInterval(value) {
  return Array.isArray(value) && value.length === 2 && value.every(isNumber) && value[0] < value[1];
}

/** @param {unknown} value */
function areNames(value) {
  return Array.isArray(value) && value.every((name) => typeof name === "string");
}
