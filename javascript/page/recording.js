/** What was drawn at each row of a sampler's table, so that it can be played and gone through again. */

const MAX_VALUES = 2 ** 23; // of all rows together

export class Recording {
  /**
   * @param {number} rows number of rows of the sampler's table
   * @param {Float32Array} noise all samples before the first row, in data units
   * @param {number} size number of values in a sample
   * @param {number} [batches] number of batches in which the samples are drawn
   */
  constructor(rows, noise, size, batches = 1) {
    this.rows = rows;
    this.size = size;
    this.batches = batches;
    this.count = noise.length / size;
    /** The row of the last picture that came, and the first sample of its batch. */
    this.last = 0;
    this.first = 0;
    this.every = Math.ceil((rows * noise.length) / MAX_VALUES);
    /** @type {Map<number, { x0: Float32Array, x: Float32Array }>} */
    this.pictures = new Map([[0, { x0: noise, x: noise }]]);
  }

  /** Add the picture of a batch after a row. */
  add(row, first, x0, x) {
    [this.last, this.first] = [row, first];
    const kept = row % this.every === 0 || row === this.rows;
    if (!kept) return;
    if (!this.pictures.has(row)) {
      const empty = () => new Float32Array(this.count * this.size).fill(NaN);
      this.pictures.set(row, { x0: empty(), x: empty() });
    }
    const picture = this.pictures.get(row);
    picture.x0.set(x0, first * this.size);
    picture.x.set(x, first * this.size);
  }

  /**
   * All samples after a row, or between two. Samples of earlier batches are finished, while others are drawn.
   * @param {number} row
   * @param {"x0" | "x"} kind
   * @param {boolean} blend whether to move from one row to the next, which points can
   */
  at(row, kind, blend) {
    const before = this.#kept(Math.floor(row));
    const values = this.pictures.get(before)[kind];
    const after = this.#next(before);
    const batched = this.first > 0 && row < this.rows;
    if (!batched && (!blend || after === undefined || row === before)) return values;
    const result = values.slice();
    if (blend && after !== undefined) {
      const part = (row - before) / (after - before);
      const later = this.pictures.get(after)[kind];
      for (let i = 0; i < result.length; i++) result[i] += part * (later[i] - result[i]);
    }
    if (batched && this.pictures.has(this.rows))
      result.set(this.pictures.get(this.rows)[kind].subarray(0, this.first * this.size));
    return result;
  }

  /** The row, of those kept, that is not after this one. */
  #kept(row) {
    let kept = Math.min(row, this.last);
    while (!this.pictures.has(kept)) kept--;
    return kept;
  }

  #next(row) {
    for (let after = row + 1; after <= this.last; after++) if (this.pictures.has(after)) return after;
    return undefined;
  }
}
