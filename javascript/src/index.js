/** Draws samples from a sampler.onnx of ray-ddpm with ONNX Runtime, in Node.js and in browsers. */

export { InputError } from "./errors.js";
export { normalNoise, threefry } from "./noise.js";
export { Sampler } from "./sampler.js";
export { DEFAULT_ETA, SAMPLERS } from "./samplers.js";
export { NoiseSchedule, SPACINGS } from "./schedule.js";

/** @typedef {import("./inputs.js").ConditionValues} ConditionValues */
/** @typedef {import("./inputs.js").Labels} Labels */
/** @typedef {import("./sampler.js").OpenOptions} OpenOptions */
/** @typedef {import("./sampler.js").SampleOptions} SampleOptions */
/** @typedef {import("./samplers.js").SamplerOptions} SamplerOptions */
/** @typedef {import("./schedule.js").Spacing} Spacing */
/** @typedef {import("./spec.js").SamplerSpec} SamplerSpec */
/** @typedef {import("./spec.js").SamplerTable} SamplerTable */
