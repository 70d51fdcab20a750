/**
 * Noise as a function of the seed, the sample's index and k, so that a seed gives the same samples at any batch size
 * and in any language. Section "Noise" of docs/onnx-format.md.
 */

const ROTATIONS = [
  [13, 15, 26, 6],
  [17, 29, 16, 24],
];

/**
 * Threefry 2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
 * @param {number} key0 uint32, as the other three words
 * @param {number} key1
 * @param {number} counter0
 * @param {number} counter1
 * @returns {[number, number]} two uint32 words
 */
export function threefry(key0, key1, counter0, counter1) {
  const keys = [key0, key1, key0 ^ key1 ^ 0x1bd11bda];
  let x0 = (counter0 + key0) | 0;
  let x1 = (counter1 + key1) | 0;
  for (let group = 0; group < 5; group++) {
    for (const rotation of ROTATIONS[group % 2]) {
      x0 = (x0 + x1) | 0;
      x1 = ((x1 << rotation) | (x1 >>> (32 - rotation))) ^ x0;
    }
    x0 = (x0 + keys[(group + 1) % 3]) | 0;
    x1 = (x1 + keys[(group + 2) % 3] + group + 1) | 0;
  }
  return [x0 >>> 0, x1 >>> 0];
}

/**
 * Standard normal noise of consecutive samples of a seed, by the Box-Muller transform.
 * @param {number} seed uint32
 * @param {number} firstIndex index of the first sample
 * @param {number} numSamples
 * @param {number} k 0 for the noise that sampling starts from, i + 1 for that of row i
 * @param {number} size number of values in a sample
 * @returns {Float64Array} sample after sample
 */
export function normalNoise(seed, firstIndex, numSamples, k, size) {
  const values = new Float64Array(numSamples * size);
  for (let sample = 0; sample < numSamples; sample++) {
    const start = sample * size;
    for (let element = 0; element < size; element += 2) {
      const [w0, w1] = threefry(seed, firstIndex + sample, k, element / 2);
      const radius = Math.sqrt(-2 * Math.log((w0 + 0.5) / 2 ** 32));
      const theta = (2 * Math.PI * (w1 + 0.5)) / 2 ** 32;
      values[start + element] = radius * Math.cos(theta);
      if (element + 1 < size) values[start + element + 1] = radius * Math.sin(theta);
    }
  }
  return values;
}
