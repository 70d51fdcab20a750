/** The noise schedule and the timesteps that a sampler visits. Sections "Samplers" and "Spacings". */

import { InputError, shown } from "./errors.js";

/** @typedef {"leading" | "trailing" | "linspace" | "logsnr" | "karras"} Spacing */

/** @type {readonly Spacing[]} */
export const SPACINGS = ["leading", "trailing", "linspace", "logsnr", "karras"];

const LOWEST_LOG_SNR = -10;
const RHO = 7; // of the spacing "karras": even steps in the 7th root of sigma, EDM, arXiv:2206.00364, Eq. 5

/** What is known of a schedule at each training timestep. */
export class NoiseSchedule {
  /** @param {readonly number[]} betas */
  constructor(betas) {
    let product = 1;
    let sum = 0;
    /** @type {number[]} */
    this.alphasCumprod = betas.map((beta) => (product *= 1 - beta));
    /** @type {number[]} */
    this.logSnr = betas.map((beta) => {
      sum += Math.log1p(-beta);
      return sum - Math.log(-Math.expm1(sum));
    });
  }

  /** T, the number of training timesteps. */
  get numTrainTimesteps() {
    return this.alphasCumprod.length;
  }

  /**
   * The timesteps of a sampler, noisiest first.
   * @param {number} numSteps S, from 1 to T
   * @param {Spacing} spacing
   * @returns {number[]}
   */
  timesteps(numSteps, spacing) {
    const total = this.numTrainTimesteps;
    if (!Number.isInteger(numSteps) || numSteps < 1 || numSteps > total)
      throw new InputError(`numSteps ${shown(numSteps)}: give a whole number from 1 to ${total}`);
    if (!SPACINGS.includes(spacing))
      throw new InputError(`spacing ${shown(spacing)}: choose one of ${SPACINGS.join(", ")}`);
    return this.#rising(numSteps, spacing).reverse();
  }

  /**
   * @param {number} numSteps
   * @param {Spacing} spacing
   */
  #rising(numSteps, spacing) {
    const total = this.numTrainTimesteps;
    const indices = Array.from({ length: numSteps }, (_, i) => i);
    if (numSteps === total) return indices;
    if (spacing === "leading") return indices.map((i) => i * Math.floor(total / numSteps));
    if (spacing === "trailing")
      return indices.map((i) => roundHalfToEven(total - (numSteps - 1 - i) * (total / numSteps)) - 1);
    if (numSteps === 1) return [total - 1];
    if (spacing === "linspace") return linspace(0, total - 1, numSteps).map(roundHalfToEven);
    const falling = this.logSnr.map((value) => Math.max(value, LOWEST_LOG_SNR));
    const [first, last] = [falling[0], falling[total - 1]];
    const root = (/** @type {number} */ value) => Math.exp(value / (-2 * RHO));
    const targets =
      spacing === "karras"
        ? linspace(root(first), root(last), numSteps).map((value) => -2 * RHO * Math.log(value))
        : linspace(first, last, numSteps);
    return movedApart(nearest(falling, targets), total);
  }

  /**
   * The timestep whose log_snr is nearest, the smallest of equally near ones.
   * @param {number} logSnr
   */
  nearest(logSnr) {
    return nearest(this.logSnr, [logSnr])[0];
  }
}

/**
 * For each target, the smallest of the timesteps whose value is nearest.
 * @param {readonly number[]} falling
 * @param {readonly number[]} targets falling
 */
function nearest(falling, targets) {
  let start = 0; // the first timestep of a value that is still in question, since both lists fall
  return targets.map((target) => {
    let best = start;
    for (let t = start; t < falling.length; t++) {
      if (Math.abs(falling[t] - target) < Math.abs(falling[best] - target)) best = t;
      if (falling[t] < target) break;
    }
    start = best;
    return best;
  });
}

/**
 * Distinct timesteps, the last of which is T - 1.
 * @param {readonly number[]} timesteps rising, perhaps with repetitions
 * @param {number} total T
 */
function movedApart(timesteps, total) {
  let highest = -Infinity;
  const apart = timesteps.map((timestep, i) => {
    highest = Math.max(highest, timestep - i);
    return Math.min(highest, total - timesteps.length) + i;
  });
  apart[apart.length - 1] = total - 1;
  return apart;
}

/**
 * @param {number} first
 * @param {number} last
 * @param {number} count at least 2
 */
function linspace(first, last, count) {
  const stride = (last - first) / (count - 1);
  return Array.from({ length: count }, (_, i) => (i === count - 1 ? last : first + i * stride));
}

/** @param {number} value */
function roundHalfToEven(value) {
  const floor = Math.floor(value);
  const part = value - floor;
  return floor + (part > 0.5 || (part === 0.5 && floor % 2 !== 0) ? 1 : 0);
}
