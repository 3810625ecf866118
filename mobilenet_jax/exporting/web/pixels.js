// Photos to the input of a network, with the preprocessing of its card.
//
// The pixels equal those of Pillow, which resizes in evaluation: the same filter, the same fixed-point coefficients,
// and uint8 between the two passes. A canvas scales in its own way, and the answers would differ in the second digit.

const PRECISION = 22; // bits behind the point of a coefficient (Pillow, Resample.c)

const FILTERS = {
  bilinear: {
    support: 1,
    weigh: (x) => Math.max(0, 1 - Math.abs(x)),
  },
  bicubic: {
    support: 2,
    weigh(x) {
      const a = -0.5;
      x = Math.abs(x);
      if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
      return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
    },
  },
};

/**
 * Return how an image is resized and cropped: {width, height} of the resized image, {left, top} of the crop, and its
 * {size}, all in pixels.
 */
export function planCrop(width, height, card) {
  const size = card.image_size;
  const shorter = Math.floor(size / card.crop_share + 1e-6);
  const least = Math.min(width, height);
  const resized = card.squash
    ? { width: shorter, height: shorter }
    : { width: Math.floor((shorter * width) / least), height: Math.floor((shorter * height) / least) };
  const centre = (side) => roundHalfEven((side - size) / 2);
  return { ...resized, left: centre(resized.width), top: centre(resized.height), size };
}

/** Return the crop of an ImageData, resized: a Uint8ClampedArray of size x size x 3. */
export function resizeAndCrop(image, card) {
  const plan = planCrop(image.width, image.height, card);
  const columns = sample(image.width, plan.width, plan.left, plan.size, card.interpolation);
  const rows = sample(image.height, plan.height, plan.top, plan.size, card.interpolation);
  // The rule of Pillow 13: the pass that removes more pixels comes first.
  const columnsFirst = image.height > plan.height && image.height - plan.height > 2 * (image.width - plan.width);
  const source = { pixels: image.data, width: image.width, height: image.height, channels: 4 };
  const passes = columnsFirst
    ? [(from) => resizeVertically(from, rows), (from) => resizeHorizontally(from, columns)]
    : [(from) => resizeHorizontally(from, columns, rows), (from) => resizeVertically(from, rows)];
  return passes[1](passes[0](source)).pixels;
}

/** Return Float32Array (pixel - mean) / std in float32, as the network is evaluated. */
export function normalise(pixels, mean, std) {
  const values = new Float32Array(pixels.length);
  const [means, stds] = [Float32Array.from(mean), Float32Array.from(std)];
  for (let i = 0; i < pixels.length; i++) {
    values[i] = Math.fround(pixels[i] - means[i % 3]) / stds[i % 3];
  }
  return values;
}

/** Return the places and the weights of the source pixels for each of `count` outputs from `start` on. */
function sample(from, to, start, count, interpolation) {
  if (interpolation === "nearest") return sampleNearest(from, to, start, count);
  const { support, weigh } = FILTERS[interpolation];
  const scale = from / to;
  const stretch = Math.max(1, scale);
  return Array.from({ length: count }, (_, i) => {
    const centre = (start + i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support * stretch + 0.5));
    const last = Math.min(from, Math.trunc(centre + support * stretch + 0.5));
    const weights = [];
    for (let x = first; x < last; x++) weights.push(weigh((x - centre + 0.5) * (1 / stretch)));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    return {
      first,
      weights: Int32Array.from(weights, (weight) => {
        const fixed = (weight / total) * 2 ** PRECISION;
        return Math.trunc(fixed < 0 ? fixed - 0.5 : fixed + 0.5);
      }),
    };
  });
}

function sampleNearest(from, to, start, count) {
  const places = [];
  const weights = Int32Array.of(2 ** PRECISION);
  // Pillow adds the scale up, so the sum has its rounding.
  for (let i = 0, x = (from / to) * 0.5; i < start + count; i++, x += from / to) {
    if (i >= start) places.push({ first: Math.min(from - 1, Math.trunc(x)), weights });
  }
  return places;
}

/** Resize the lines; only those that `rows` reads are computed. */
function resizeHorizontally(from, columns, rows) {
  const pixels = new Uint8ClampedArray(columns.length * from.height * 3);
  const top = rows ? rows[0].first : 0;
  const end = rows ? rows.at(-1).first + rows.at(-1).weights.length : from.height;
  for (let y = top; y < end; y++) {
    for (let i = 0; i < columns.length; i++) {
      const place = (y * from.width + columns[i].first) * from.channels;
      weighInto(pixels, (y * columns.length + i) * 3, from.pixels, place, from.channels, columns[i].weights);
    }
  }
  return { pixels, width: columns.length, height: from.height, channels: 3 };
}

function resizeVertically(from, rows) {
  const pixels = new Uint8ClampedArray(from.width * rows.length * 3);
  for (let i = 0; i < rows.length; i++) {
    for (let x = 0; x < from.width; x++) {
      const place = (rows[i].first * from.width + x) * from.channels;
      weighInto(pixels, (i * from.width + x) * 3, from.pixels, place, from.width * from.channels, rows[i].weights);
    }
  }
  return { pixels, width: from.width, height: rows.length, channels: 3 };
}

/** Write one RGB pixel: the weighted sum of pixels that lie `step` apart. */
function weighInto(out, at, pixels, place, step, weights) {
  let red = 2 ** (PRECISION - 1); // a half, so that the shift rounds
  let green = red;
  let blue = red;
  for (let k = 0; k < weights.length; k++, place += step) {
    red += pixels[place] * weights[k];
    green += pixels[place + 1] * weights[k];
    blue += pixels[place + 2] * weights[k];
  }
  out[at] = red >> PRECISION;
  out[at + 1] = green >> PRECISION;
  out[at + 2] = blue >> PRECISION;
}

/** Round as Python does: a half goes to the even neighbour. */
function roundHalfEven(x) {
  const floor = Math.floor(x);
  if (x - floor !== 0.5) return Math.round(x);
  return floor % 2 === 0 ? floor : floor + 1;
}
