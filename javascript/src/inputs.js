/** What a caller gives besides the sampler: labels, guidance, conditions and numbers. */

import { InputError, shown } from "./errors.js";
import { broadcast, classesOf, sizeOf } from "./spec.js";

/** @typedef {import("./spec.js").SamplerSpec} SamplerSpec */
/** @typedef {import("./spec.js").ConditionSpec} ConditionSpec */
/** @typedef {number | string | readonly (number | string)[]} Labels name or number of one class for all samples, or
 * one for each */
/** @typedef {number | ArrayLike<number>} ConditionValues flat, for all samples together or one after another */

/**
 * @param {string} name
 * @param {unknown} value
 * @param {number} lowest
 * @param {number} highest
 * @returns {number}
 */
export function wholeNumber(name, value, lowest, highest) {
  if (typeof value !== "number" || !Number.isInteger(value) || value < lowest || value > highest)
    throw new InputError(`${name} ${shown(value)}: give a whole number from ${lowest} to ${highest}`);
  return value;
}

/**
 * A seed mod 2^32.
 * @param {number | bigint} seed
 */
export function seedWord(seed) {
  if (typeof seed !== "bigint" && !Number.isSafeInteger(seed))
    throw new InputError(`seed ${shown(seed)}: give a whole number, above 2^53 as a BigInt`);
  return Number(BigInt.asUintN(32, BigInt(seed)));
}

/**
 * One label for each sample, or null for an unconditional model.
 * @param {SamplerSpec} spec
 * @param {Labels | undefined} labels
 * @param {number} numSamples
 * @param {number} firstIndex
 */
export function resolveLabels(spec, labels, numSamples, firstIndex) {
  const classes = classesOf(spec);
  if (!classes.length) {
    if (labels !== undefined)
      throw new InputError(`labels ${shown(labels)}: this model has no classes; leave the labels out`);
    return null;
  }
  if (labels === undefined)
    return Array.from({ length: numSamples }, (_, i) => (firstIndex + i) % classes.length);
  const list = typeof labels === "object" ? Array.from(labels) : Array(numSamples).fill(labels);
  if (list.length !== numSamples)
    throw new InputError(`${list.length} labels for ${numSamples} samples: give one for all, or one for each`);
  return list.map((label) => labelNumber(label, classes));
}

/**
 * A string is always a name, since class names may look like numbers.
 * @param {unknown} label
 * @param {string[]} classes
 */
function labelNumber(label, classes) {
  if (typeof label === "string" && classes.includes(label)) return classes.indexOf(label);
  if (typeof label === "number" && Number.isInteger(label) && label >= 0 && label < classes.length) return label;
  const names = classes.slice(0, 20).join(", ") + (classes.length > 20 ? ", ..." : "");
  throw new InputError(
    `label ${shown(label)}: give the name of a class (${names}) or a number (0 to ${classes.length - 1})`,
  );
}

/**
 * @param {SamplerSpec} spec
 * @param {number | undefined} scale
 */
export function resolveGuidance(spec, scale) {
  if (scale === undefined) return spec.sampler.guidance_scale;
  if (!classesOf(spec).length)
    throw new InputError(`guidanceScale ${shown(scale)}: this model has no classes; leave it out`);
  if (typeof scale !== "number" || !(scale >= 0 && scale <= 100))
    throw new InputError(`guidanceScale ${shown(scale)}: give 0 to 100, such as 3`);
  return scale;
}

/**
 * The normalised values of each condition, for all samples, by the name of the graph's input.
 * @param {SamplerSpec} spec
 * @param {Record<string, ConditionValues> | undefined} given
 * @param {number} numSamples
 * @returns {{ name: string, shape: number[], values: Float32Array }[]}
 */
export function resolveConditions(spec, given = {}, numSamples) {
  const specs = spec.conditions ?? [];
  for (const name of Object.keys(given))
    if (!specs.some((each) => each.name === name)) {
      const known = specs.length ? `has ${specs.map((each) => each.name).join(", ")}` : "needs no conditions";
      throw new InputError(`condition ${shown(name)}: this model ${known}`);
    }
  return specs.map((each) => {
    if (!Object.hasOwn(given, each.name))
      throw new InputError(`conditions: this model needs ${each.name} of shape ${shown(each.shape)}`);
    const values = conditionValues(each, given[each.name], numSamples);
    return { name: `condition_${each.name}`, shape: each.shape, values };
  });
}

/**
 * @param {ConditionSpec} spec
 * @param {ConditionValues} given
 * @param {number} numSamples
 */
function conditionValues({ name, shape, mean, std }, given, numSamples) {
  const source = typeof given === "number" ? [given] : given;
  const size = sizeOf(shape);
  if (source.length !== size && source.length !== numSamples * size)
    throw new InputError(
      `condition ${name} has ${source.length} values: give ${size} for all samples, or ${numSamples * size}`,
    );
  const [means, stds] = [broadcast(mean, shape), broadcast(std, shape)];
  const values = Float32Array.from({ length: numSamples * size }, (_, i) => {
    const place = i % size;
    return (source[i % source.length] - means[place]) / stds[place];
  });
  if (!values.every(Number.isFinite))
    throw new InputError(`condition ${name} is not finite: give finite numbers within float32's range`);
  return values;
}
