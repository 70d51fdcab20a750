/** Pictures of samples on a canvas: a grid of images, or points as a scatter. */

const COLOURS = ["#4f46e5", "#e8590c", "#0a8f6a", "#c2255c", "#1c7ed6", "#b08900", "#7048e8", "#2b8a3e", "#d6336c", "#0c8599"];
const MAX_CLASSES = 12; // that have columns of their own
const MAX_HEADINGS = 24;

/**
 * Draw a grid of images.
 * @param {HTMLCanvasElement} canvas
 * @param {Float32Array} values images in data units, one after another; NaN where nothing has been drawn yet
 * @param {{ shape: number[], range: [number, number] }} data
 * @param {string[] | null} headings class names, if the images' classes are these in turn
 */
export function drawImages(canvas, values, { shape: [channels, height, width], range }, headings) {
  const count = values.length / (channels * height * width);
  const side = Math.ceil(Math.sqrt(count));
  // Each class has a column of its own, or several.
  const [titled, columns] = classColumns(headings, count, side);
  const pixelWidth = widthOf(canvas);
  const cell = pixelWidth / columns;
  const cellHeight = (cell * height) / width;
  const top = titled ? Math.round(22 * devicePixelRatio) : 0;
  resize(canvas, pixelWidth, top + cellHeight * Math.ceil(count / columns));
  const context = canvas.getContext("2d");
  if (titled) {
    Object.assign(context, { fillStyle: style("--soft"), font: font(13), textAlign: "center", textBaseline: "middle" });
    for (let i = 0; i < columns; i++)
      context.fillText(headings[i % headings.length], (i + 0.5) * cell, top / 2, cell * 0.9);
  }
  context.imageSmoothingQuality = "high";
  const tile = new OffscreenCanvas(width, height);
  const tileContext = tile.getContext("2d");
  const pixels = tileContext.createImageData(width, height);
  const gap = Math.max(1, Math.round(cell * 0.03));
  const blank = style("--line");
  for (let i = 0; i < count; i++) {
    const image = values.subarray(i * channels * height * width, (i + 1) * channels * height * width);
    const [x, y] = [(i % columns) * cell, top + Math.floor(i / columns) * cellHeight];
    context.save();
    context.beginPath();
    context.roundRect(x + gap, y + gap, cell - 2 * gap, cellHeight - 2 * gap, gap * 1.5);
    context.clip();
    if (Number.isNaN(image[0])) {
      context.fillStyle = blank;
      context.fill();
    } else {
      paint(pixels.data, image, channels, range);
      tileContext.putImageData(pixels, 0, 0);
      context.drawImage(tile, x + gap, y + gap, cell - 2 * gap, cellHeight - 2 * gap);
    }
    context.restore();
  }
}

/**
 * Whether columns have headings, and how many there are.
 * @param {string[] | null} headings
 * @param {number} count number of images
 * @param {number} side columns of a square
 * @returns {[boolean, number]}
 */
function classColumns(headings, count, side) {
  const classes = headings?.length ?? 0;
  if (classes < 2 || classes > MAX_CLASSES) return [false, side];
  const columns = classes * Math.max(1, Math.round(side / classes));
  return [columns <= MAX_HEADINGS, Math.min(columns, count)];
}

/**
 * @param {Uint8ClampedArray} pixels
 * @param {Float32Array} image
 * @param {number} channels 1 or 3
 * @param {[number, number]} range
 */
function paint(pixels, image, channels, [lowest, highest]) {
  const area = pixels.length / 4;
  for (let i = 0; i < area; i++) {
    for (let channel = 0; channel < 3; channel++) {
      const value = image[(channels === 3 ? channel : 0) * area + i];
      pixels[4 * i + channel] = (255 * (value - lowest)) / (highest - lowest);
    }
    pixels[4 * i + 3] = 255;
  }
}

/**
 * Draw points as a scatter; a single column as a strip.
 * @param {HTMLCanvasElement} canvas
 * @param {Float32Array} values points in data units, one after another
 * @param {{ dimensions: number, axes: { column: number, name: string, range: [number, number] }[],
 *   classes: (number | null)[] }} choices `classes` has the class of each point, or nulls
 */
export function drawPoints(canvas, values, { dimensions, axes, classes }) {
  const side = widthOf(canvas);
  resize(canvas, side, side);
  const context = canvas.getContext("2d");
  const unit = devicePixelRatio;
  const frame = { left: 46 * unit, top: 10 * unit, right: side - 10 * unit, bottom: side - 40 * unit };
  const [across, up] = axes;
  const toX = scale(across.range, frame.left, frame.right);
  const toY = scale(up.range, frame.bottom, frame.top);
  Object.assign(context, { font: font(12), fillStyle: style("--soft"), strokeStyle: style("--line"), lineWidth: unit });
  Object.assign(context, { textAlign: "center", textBaseline: "top" });
  for (const tick of ticks(across.range)) {
    line(context, toX(tick), frame.top, toX(tick), frame.bottom);
    context.fillText(label(tick), toX(tick), frame.bottom + 6 * unit);
  }
  context.fillText(across.name, (frame.left + frame.right) / 2, frame.bottom + 22 * unit);
  Object.assign(context, { textAlign: "right", textBaseline: "middle" });
  if (up.column !== across.column) {
    for (const tick of ticks(up.range)) {
      line(context, frame.left, toY(tick), frame.right, toY(tick));
      context.fillText(label(tick), frame.left - 6 * unit, toY(tick));
    }
    context.save();
    context.translate(10 * unit, (frame.top + frame.bottom) / 2);
    context.rotate(-Math.PI / 2);
    context.textAlign = "center";
    context.fillText(up.name, 0, 0);
    context.restore();
  }
  context.save();
  context.beginPath();
  context.rect(frame.left, frame.top, frame.right - frame.left, frame.bottom - frame.top);
  context.clip();
  const count = values.length / dimensions;
  const radius = unit * Math.max(1.2, Math.min(4, 90 / Math.sqrt(count)));
  context.globalAlpha = count > 200 ? 0.6 : 0.85;
  const plain = style("--accent");
  for (let i = 0; i < count; i++) {
    const x = toX(values[i * dimensions + across.column]);
    // A strip spreads its points by their numbers, evenly and always in the same way.
    const y = up.column === across.column ? frame.bottom - spread(i) * (frame.bottom - frame.top)
      : toY(values[i * dimensions + up.column]);
    context.fillStyle = classes[i] === null ? plain : COLOURS[classes[i] % COLOURS.length];
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.fill();
  }
  context.restore();
}

/** @param {number} i */
function spread(i) {
  return (0.5 + i * 0.6180339887498949) % 1;
}

/**
 * @param {[number, number]} range
 * @param {number} first pixel of the range's start
 * @param {number} last pixel of its end
 */
function scale([start, end], first, last) {
  return (/** @type {number} */ value) => first + ((value - start) / (end - start)) * (last - first);
}

/** @param {[number, number]} range */
function ticks([start, end]) {
  const rough = (end - start) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const stride = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const first = Math.ceil(start / stride);
  return Array.from({ length: Math.floor(end / stride) - first + 1 }, (_, i) => (first + i) * stride);
}

/** @param {number} value */
function label(value) {
  return Number(value.toPrecision(4)).toString();
}

function line(context, x1, y1, x2, y2) {
  context.beginPath();
  context.moveTo(x1, y1);
  context.lineTo(x2, y2);
  context.stroke();
}

/** Pixels of the device across the canvas's place in the page. */
function widthOf(canvas) {
  return Math.round(canvas.parentElement.clientWidth * devicePixelRatio);
}

/** An empty canvas of a size, which is dear to change. */
function resize(canvas, width, height) {
  const [w, h] = [Math.round(width), Math.round(height)];
  if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
  else canvas.getContext("2d").clearRect(0, 0, w, h);
}

function font(size) {
  return `${size * devicePixelRatio}px system-ui, sans-serif`;
}

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
