/** The samplers: the coefficients of their rows, computed in float64 from the schedule. Section "Samplers". */

import { InputError, shown } from "./errors.js";
import { NoiseSchedule } from "./schedule.js";
import { emptyColumns } from "./spec.js";

/** @typedef {import("./schedule.js").Spacing} Spacing */
/** @typedef {import("./spec.js").SamplerSpec} SamplerSpec */
/** @typedef {import("./spec.js").SamplerTable} SamplerTable */

/**
 * What a sampler's rows are computed from.
 * @typedef {object} Steps
 * @property {NoiseSchedule} schedule
 * @property {number[]} visited the S timesteps between which the steps go, noisiest first
 * @property {number} eta
 * @property {"beta_tilde" | "beta" | "learned"} variance
 */

/**
 * A row of the table: the timestep at which the network is called, and the coefficients that are not 0.
 * @typedef {{ t: number, c: number, d: number, e?: number, e2?: number, f?: number, s?: number, g?: number }} Row
 */

/**
 * @typedef {object} Method
 * @property {(steps: Steps) => Row[]} rows the rows of each step but the last, which in every sampler returns x0
 * @property {number} [eta] what eta is by default; absent if it has no effect
 */

/** @type {Record<string, Method>} */
const METHODS = {
  ddpm: { rows: ddpm },
  ddim: { rows: ddim, eta: 0 },
  dpmpp_2m: { rows: dpmpp2m },
  dpmpp_2m_sde: { rows: dpmpp2mSde },
  dpmpp_3m: { rows: dpmpp3m },
  heun: { rows: (steps) => heun({ ...steps, eta: 0 }) },
  heun_churn: { rows: heun, eta: 0.25 },
};

/** Names of the samplers that every file can be sampled with. */
export const SAMPLERS = Object.keys(METHODS);

/**
 * What eta is by default in each sampler in which it has an effect, unless the file says otherwise of its own.
 * @type {Record<string, number>}
 */
export const DEFAULT_ETA = Object.fromEntries(
  Object.entries(METHODS).flatMap(([name, { eta }]) => (eta === undefined ? [] : [[name, eta]])),
);

const MAX_STEP_RATIO = 3; // of a step in log_snr to the one before: a longer one would extrapolate too far
const MIN_STEPS_FOR_ORDER_3 = 15; // with fewer, the last steps have a lower order

/**
 * What the file's default sampler is replaced with; what is left out is the file's.
 * @typedef {object} SamplerOptions
 * @property {string} [sampler] a name of `SAMPLERS`, or "fast" for the file's choice with few network evaluations
 * @property {number} [numSteps] from 1 to the number of training timesteps
 * @property {number} [eta] fraction of fresh noise, 0 to 1, in the samplers of `DEFAULT_ETA`
 * @property {Spacing} [spacing] how the timesteps are chosen
 */

/**
 * Compute the table of another sampler than the file's own.
 * @param {SamplerSpec} spec
 * @param {SamplerOptions} options
 * @returns {SamplerTable}
 * @throws {InputError} an unknown name or a value out of range
 */
export function samplerTable(spec, { sampler, numSteps, eta, spacing }) {
  let own = spec.sampler;
  if (sampler === "fast") {
    if (!own.fast)
      throw new InputError(`sampler fast: none was measured for this file; choose one of ${SAMPLERS.join(", ")}`);
    [own, sampler] = [{ ...own, ...own.fast }, undefined];
  }
  const name = sampler ?? own.name;
  if (!Object.hasOwn(METHODS, name))
    throw new InputError(`sampler ${shown(name)}: choose one of ${SAMPLERS.join(", ")}`);
  const method = METHODS[name];
  if (eta !== undefined && !(eta >= 0 && eta <= 1)) throw new InputError(`eta ${shown(eta)}: give 0 to 1`);
  if (eta && method.eta === undefined) {
    const [all, any] = [" and ", " or "].map((word) => Object.keys(DEFAULT_ETA).join(word));
    throw new InputError(`eta ${eta}: only the samplers ${all} use it, not ${name}; choose ${any}, or leave eta out`);
  }
  const schedule = new NoiseSchedule(spec.schedule.betas);
  const visited = schedule.timesteps(numSteps ?? own.num_steps, spacing ?? own.spacing);
  if (schedule.alphasCumprod[visited[0]] === 0 && (spec.prediction_type === "epsilon" || spec.noise_level))
    throw new InputError(`sampler ${name}: alphas_cumprod is 0 at its first timestep; leave the sampler's options out`);
  const defaultEta = name === spec.sampler.name ? own.eta : (method.eta ?? 0);
  const rows = method.rows({ schedule, visited, eta: eta ?? defaultEta, variance: own.variance });
  return toTable(spec, schedule, [...rows, { t: visited[visited.length - 1], c: 1, d: 0 }]);
}

/**
 * @param {SamplerSpec} spec
 * @param {NoiseSchedule} schedule
 * @param {Row[]} rows
 * @returns {SamplerTable}
 */
function toTable(spec, schedule, rows) {
  const columns = emptyColumns(rows.length);
  const [lo, hi] = spec.sampler.clip ?? [-Infinity, Infinity];
  rows.forEach(({ t, ...coefficients }, i) => {
    const [a, b] = x0Coefficients(spec.prediction_type, schedule.alphasCumprod[t]);
    for (const [name, value] of Object.entries({ a, b, ...coefficients, lo, hi }))
      columns[/** @type {keyof typeof columns} */ (name)][i] = value;
  });
  const timesteps = rows.map((row) => row.t);
  const sigma = (/** @type {number} */ level) => Math.sqrt((1 - level) / level);
  const noiseLevel = {
    sigma: (/** @type {number} */ t) => sigma(schedule.alphasCumprod[t]),
    log_snr: (/** @type {number} */ t) => schedule.logSnr[t],
  };
  return {
    numRows: rows.length,
    timesteps: spec.noise_level ? null : timesteps,
    noiseLevels: spec.noise_level ? timesteps.map(noiseLevel[spec.noise_level]) : null,
    columns,
    learnedVariance: rows.some((row) => row.g !== undefined),
  };
}

/**
 * a and b of x0 = a x + b out.
 * @param {import("./spec.js").PredictionType} predictionType
 * @param {number} level alphas_cumprod
 */
function x0Coefficients(predictionType, level) {
  if (predictionType === "sample") return [0, 1];
  if (predictionType === "epsilon") return [1 / Math.sqrt(level), -Math.sqrt((1 - level) / level)];
  return [Math.sqrt(level), -Math.sqrt(1 - level)];
}

/**
 * The steps, each from a timestep t to the next one s, with alphas_cumprod at both.
 * @param {Steps} steps
 */
function pairs({ schedule, visited }) {
  const levels = visited.map((t) => schedule.alphasCumprod[t]);
  return visited.slice(0, -1).map((t, i) => ({ t, before: levels[i], after: levels[i + 1] }));
}

/**
 * h, how much log_snr grows in each step.
 * @param {Steps} steps
 */
function logSnrSteps({ schedule, visited }) {
  return visited.slice(1).map((s, i) => schedule.logSnr[s] - schedule.logSnr[visited[i]]);
}

/**
 * beta and beta-tilde of a step.
 * @param {number} before alphas_cumprod before it
 * @param {number} after and after it
 */
function betas(before, after) {
  const beta = 1 - before / after;
  return [beta, (beta * (1 - after)) / (1 - before)];
}

/**
 * c and d of a step of DDIM.
 * @param {number} before
 * @param {number} after
 * @param {number} [s] standard deviation of the fresh noise
 */
function ddimCoefficients(before, after, s = 0) {
  const d = Math.sqrt(Math.max(1 - after - s ** 2, 0)) / Math.sqrt(1 - before);
  return { c: Math.sqrt(after) - d * Math.sqrt(before), d };
}

/**
 * Ancestral sampling, arXiv:2006.11239, Eqs. 7 and 11; a learned variance by arXiv:2102.09672, Eq. 15.
 * @param {Steps} steps
 * @returns {Row[]}
 */
function ddpm(steps) {
  return pairs(steps).map(({ t, before, after }) => {
    const [beta, betaTilde] = betas(before, after);
    const c = (Math.sqrt(after) * beta) / (1 - before);
    const d = (Math.sqrt(before / after) * (1 - after)) / (1 - before);
    if (steps.variance === "learned")
      return { t, c, d, s: Math.sqrt(Math.sqrt(betaTilde * beta)), g: Math.log(beta / betaTilde) / 4 };
    return { t, c, d, s: Math.sqrt(steps.variance === "beta" ? beta : betaTilde) };
  });
}

/**
 * DDIM, arXiv:2010.02502, Eqs. 12 and 16.
 * @param {Steps} steps
 * @returns {Row[]}
 */
function ddim(steps) {
  return pairs(steps).map(({ t, before, after }) => {
    const s = steps.eta * Math.sqrt(betas(before, after)[1]);
    return { t, ...ddimCoefficients(before, after, s), s };
  });
}

/**
 * Rows of second order from rows of first order, which extrapolate from this prediction and the one before.
 * @param {Row[]} rows
 * @param {number[]} h
 */
function extrapolated(rows, h) {
  return rows.map((row, i) => {
    const ratio = i ? h[i] / h[i - 1] : Infinity;
    const w = ratio > MAX_STEP_RATIO ? 0 : ratio / 2;
    return { ...row, c: (1 + w) * row.c, e: -w * row.c };
  });
}

/**
 * DPM-Solver++(2M), arXiv:2211.01095, Algorithm 2.
 * @param {Steps} steps
 * @returns {Row[]}
 */
function dpmpp2m(steps) {
  return extrapolated(ddim({ ...steps, eta: 0 }), logSnrSteps(steps));
}

/**
 * The SDE of DPM-Solver++(2M), arXiv:2211.01095, Section 5.
 * @param {Steps} steps
 * @returns {Row[]}
 */
function dpmpp2mSde(steps) {
  return extrapolated(ddpm({ ...steps, variance: "beta_tilde" }), logSnrSteps(steps));
}

/**
 * DPM-Solver++(3M), arXiv:2211.01095, with the coefficients of UniP-3, arXiv:2302.04867. Section "Order 3".
 * @param {Steps} steps
 * @returns {Row[]}
 */
function dpmpp3m(steps) {
  const hs = logSnrSteps(steps);
  const levels = pairs(steps);
  const numSteps = steps.visited.length;
  return dpmpp2m(steps).map((row, i) => {
    const lowered = i === numSteps - 2 && numSteps < MIN_STEPS_FOR_ORDER_3;
    if (i < 2 || lowered || hs[i] / hs[i - 1] > MAX_STEP_RATIO || hs[i - 1] / hs[i - 2] > MAX_STEP_RATIO) return row;
    const [h, r1, r2] = [hs[i] / 2, hs[i - 1] / hs[i], hs[i - 2] / hs[i]];
    const p1 = -Math.expm1(-h);
    const p2 = 1 - p1 / h;
    const p3 = 1 - (2 * p2) / h;
    const q = (r1 * p2 + p3) / (r1 + r2);
    const [u, v] = [(p2 + q) / r1, q / r2];
    const signal = Math.sqrt(levels[i].after);
    return { ...row, c: signal * (p1 + u), e: -signal * (u + v), e2: signal * v };
  });
}

/**
 * Heun's method, and with eta its churn, EDM, arXiv:2206.00364, Algorithms 1 and 2: two rows a step. Section "Heun".
 * @param {Steps} steps
 * @returns {Row[]}
 */
function heun({ schedule, visited, eta }) {
  const { alphasCumprod, logSnr } = schedule;
  const last = visited.length - 1;
  // Where each step starts, perhaps from more noise than the step before has left.
  const starts = visited.map((t, i) =>
    i === 0 || i === last || eta === 0 ? t : schedule.nearest(logSnr[t] - 2 * Math.log1p(eta * (Math.SQRT2 - 1))),
  );
  return visited.slice(1).flatMap((end, i) => {
    const after = alphasCumprod[end];
    const rho = Math.exp((logSnr[end] - logSnr[starts[i]]) / 2);
    const w = rho > MAX_STEP_RATIO ? 0 : (Math.sqrt(after) * (rho - 1)) / 2;
    const kept = alphasCumprod[starts[i + 1]] / after;
    const k = Math.sqrt(kept);
    return [
      { t: starts[i], ...ddimCoefficients(alphasCumprod[starts[i]], after) },
      { t: end, c: k * w, d: k, e: -k * w, s: Math.sqrt(1 - kept) },
    ];
  });
}
