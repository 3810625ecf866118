/* Decodes and resizes a crop of a JPEG, with the same pixels, to the bit, that Pillow makes of the whole image.

It is compiled if the installation finds a C compiler and the headers of libjpeg-turbo; decode.py works without it. The
image above and beside the crop is parsed but not turned into pixels; the image below the crop is not parsed. The resize
is the antialiased one of Pillow 13: weights have double precision and are rounded to 22 bits; lines are resized before
columns or columns before lines, and both results are rounded to uint8. Everything that libjpeg reports, including
warnings, is a failure here, and the caller lets Pillow decode the image.

libjpeg can decode an image at a half, a quarter or an eighth of its size: it then computes fewer pixels of each block of
8 x 8. The crop is a rectangle of the image of that size. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2001000
#error "libjpeg-turbo 2.1 or newer is needed: jpeg_crop_scanline and jpeg_skip_scanlines had faults before"
#endif

/* Functions are compiled for two instruction sets; the loader of the module chooses one. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("avx2", "default")))
#else
#define VECTORISED
#endif

#define BITS 22  /* of a weight's fraction; a pixel's 8, a sign and an overshoot make 32 */
#define MARGIN 2 /* pixels decoded beside the crop, so that chroma is interpolated as in the whole image */

typedef int32_t Pixel __attribute__((vector_size(16)));
typedef int32_t TwoPixels __attribute__((vector_size(32)));

typedef struct {
  int *start, *count; /* [outputs] the range of inputs of each output */
  int32_t *weights;   /* [outputs, taps, 4] each weight is repeated for the channels of RGBX */
  int taps;           /* weights of each output, padded with 0; even, because they are used in pairs */
} Filter;

typedef struct {
  struct jpeg_error_mgr errors; /* must be first: `leave` casts its address to a Job */
  jmp_buf escape;
  struct jpeg_decompress_struct decoder;
  Py_buffer data;
  int denominator;              /* 1, 2, 4 or 8: the image is decoded at 1 / denominator of its size */
  int left, top, width, height; /* of the crop, pixels of the image of that size */
  int size, bicubic, mirrored;  /* of the result */
  Py_buffer out;                /* uint8 [size, size, 3] */
  uint8_t *line;                /* a decoded line, later a line of the second pass, RGBX */
  uint8_t *lines;               /* [height] lines of the crop after the first pass, RGBX */
  int32_t *wide, *sums;         /* the pixels of a line and their weighted sums, RGBX */
  Filter across, down;
} Job;

static void leave(j_common_ptr decoder) { longjmp(((Job *)decoder->err)->escape, 1); }

static void keep_quiet(j_common_ptr decoder) { (void)decoder; }

/* Makes a decoder and reads the header; the caller has called setjmp. */
static void read_header(Job *job) {
  jpeg_create_decompress(&job->decoder);
  jpeg_save_markers(&job->decoder, JPEG_APP0 + 1, 1);
  jpeg_mem_src(&job->decoder, job->data.buf, (unsigned long)job->data.len);
  jpeg_read_header(&job->decoder, TRUE);
}

static void set_error_handlers(Job *job) {
  job->decoder.err = jpeg_std_error(&job->errors);
  job->errors.error_exit = leave;
  job->errors.output_message = keep_quiet;
}

static double kernel(double x, int bicubic) {
  x = fabs(x);
  if (!bicubic) return x < 1 ? 1 - x : 0;
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1; /* Keys 1981 with a = -1/2 */
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

/* For antialiasing, the kernel is stretched to the step between outputs if that is longer than one input. */
static int make_filter(Filter *filter, int inputs, int outputs, int bicubic, int mirrored) {
  double step = (double)inputs / outputs, stretch = step < 1 ? 1 : step, support = (bicubic ? 2 : 1) * stretch;
  int taps = filter->taps = ((int)(2 * support) + 2) & ~1;
  double *exact = malloc(taps * sizeof(double));
  filter->start = malloc(outputs * sizeof(int));
  filter->count = malloc(outputs * sizeof(int));
  filter->weights = calloc((size_t)outputs * taps * 4, sizeof(int32_t));
  int made = exact && filter->start && filter->count && filter->weights;
  for (int i = 0; made && i < outputs; i++) {
    double centre = (i + 0.5) * step, sum = 0;
    int start = (int)(centre - support + 0.5), end = (int)(centre + support + 0.5);
    start = start < 0 ? 0 : start;
    end = end > inputs ? inputs : end;
    for (int t = 0; t < end - start; t++) sum += exact[t] = kernel((t + start - centre + 0.5) / stretch, bicubic);
    int place = mirrored ? outputs - 1 - i : i;
    filter->start[place] = start;
    filter->count[place] = end - start;
    for (int t = 0; t < end - start; t++) {
      double scaled = exact[t] / sum * (1 << BITS);
      for (int c = 0; c < 4; c++)
        filter->weights[((size_t)place * taps + t) * 4 + c] = (int32_t)(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    }
  }
  free(exact);
  return made;
}

VECTORISED static void round_sums(const int32_t *restrict sums, size_t values, uint8_t *restrict out) {
  for (size_t x = 0; x < values; x++) {
    int32_t value = (sums[x] + (1 << (BITS - 1))) >> BITS;
    value = value < 0 ? 0 : value;
    out[x] = value > 255 ? 255 : value;
  }
}

/* Resizes the crop's part of a line to `size` pixels; `out` may be `line`. */
VECTORISED static void resize_line(const Job *job, const uint8_t *line, uint8_t *out) {
  const Filter filter = job->across;
  const size_t size = job->size, values = 4 * (size_t)job->width, row = 4 * (size_t)filter.taps;
  int32_t *restrict wide = job->wide, *restrict sums = job->sums;
  for (size_t x = 0; x < values; x++) wide[x] = line[x];
  for (size_t i = 0; i < size; i++) {
    const int32_t *pixels = wide + 4 * filter.start[i], *weights = filter.weights + i * row;
    TwoPixels both = {0}, pixel, weight;
    for (size_t x = 0; x < row; x += 8) {
      memcpy(&pixel, pixels + x, sizeof pixel);
      memcpy(&weight, weights + x, sizeof weight);
      both += pixel * weight;
    }
    Pixel sum, other;
    memcpy(&sum, &both, sizeof sum);
    memcpy(&other, (const char *)&both + sizeof sum, sizeof other);
    sum += other;
    memcpy(sums + 4 * i, &sum, sizeof sum);
  }
  round_sums(sums, 4 * size, out);
}

/* Makes line `i` of the result from lines of `pixels` pixels. */
VECTORISED static void resize_columns(const Job *job, int i, int pixels, uint8_t *out) {
  const size_t values = 4 * (size_t)pixels;
  int32_t *restrict sums = job->sums;
  memset(sums, 0, values * sizeof *sums);
  for (int t = 0; t < job->down.count[i]; t++) {
    const uint8_t *restrict line = job->lines + (job->down.start[i] + t) * values;
    const int32_t weight = job->down.weights[4 * ((size_t)i * job->down.taps + t)];
    for (size_t x = 0; x < values; x++) sums[x] += weight * line[x];
  }
  round_sums(sums, values, out);
}

/* Packs RGBX to RGB. Copying four bytes is faster than three, but not for the last pixel, which ends the buffer. */
static void pack(const uint8_t *restrict pixels, size_t size, uint8_t *restrict out) {
  for (size_t x = 0; x < size - 1; x++) memcpy(out + 3 * x, pixels + 4 * x, 4);
  memcpy(out + 3 * (size - 1), pixels + 4 * (size - 1), 3);
}

/* Returns whether nothing but restarts interrupts the only scan before the end of the image. Below a crop, other markers
are not parsed; Pillow, which parses them, may refuse the file. */
static int is_unbroken(struct jpeg_decompress_struct *decoder) {
  const uint8_t *place = decoder->src->next_input_byte, *end = place + decoder->src->bytes_in_buffer;
  while ((place = memchr(place, 0xff, end - place)) && ++place < end) {
    if (*place == 0xd9) return 1;
    if (*place != 0x00 && *place != 0xff && (*place < 0xd0 || *place > 0xd7)) return 0;
  }
  return 0;
}

/* Returns whether a progressive image has all bits of its coefficients. If not, libjpeg smooths what is there, and
smooths a crop in another way than the whole image. */
static int is_complete(struct jpeg_decompress_struct *decoder) {
  if (!decoder->progressive_mode || !decoder->coef_bits) return 1;
  for (int i = 0; i < decoder->num_components; i++)
    for (int k = 0; k < DCTSIZE2; k++)
      if (decoder->coef_bits[i][k] != 0) return 0;
  return 1;
}

/* The two jobs. They return whether they succeeded; the caller frees their memory. */
static int run_measure(Job *job) {
  set_error_handlers(job);
  if (setjmp(job->escape)) return 0;
  read_header(job);
  J_COLOR_SPACE space = job->decoder.jpeg_color_space;
  if (!jpeg_has_multiple_scans(&job->decoder) && !is_unbroken(&job->decoder)) return 0;
  return (space == JCS_GRAYSCALE || space == JCS_YCbCr || space == JCS_RGB) && job->errors.num_warnings == 0;
}

static int run_read_crop(Job *job) {
  struct jpeg_decompress_struct *decoder = &job->decoder;
  set_error_handlers(job);
  if (setjmp(job->escape)) return 0;
  read_header(job);
  decoder->scale_num = 1;
  decoder->scale_denom = job->denominator;
  jpeg_calc_output_dimensions(decoder); /* each side is divided and rounded up */
  int right = (int)decoder->output_width - job->left, below = (int)decoder->output_height - job->top;
  if (job->left < 0 || job->top < 0 || job->width < 1 || job->height < 1) return 0;
  if (job->width > right || job->height > below) return 0;
  decoder->out_color_space = JCS_EXT_RGBX;
  jpeg_start_decompress(decoder); /* parses all scans if there are several */
  if (!is_complete(decoder)) return 0;
  JDIMENSION first = job->left < MARGIN ? 0 : job->left - MARGIN, last = job->left + job->width + MARGIN;
  JDIMENSION count = (last < decoder->output_width ? last : decoder->output_width) - first;
  jpeg_crop_scanline(decoder, &first, &count); /* moves `first` to the left, to the start of a block */
  int size = job->size, longest = (int)count > size ? (int)count : size;
  int columns_first = job->height > size && job->height - size > 2 * (job->width - size); /* the rule of Pillow 13 */
  int pixels = columns_first ? job->width : size;
  job->line = malloc((size_t)longest * 4);
  job->lines = malloc((size_t)job->height * pixels * 4);
  job->sums = malloc((size_t)longest * 4 * sizeof(int32_t));
  if (!make_filter(&job->across, job->width, size, job->bicubic, job->mirrored)) return 0;
  if (!make_filter(&job->down, job->height, size, job->bicubic, 0)) return 0;
  job->wide = calloc((size_t)(job->width + job->across.taps) * 4, sizeof(int32_t)); /* zeros for taps past the end */
  if (!job->line || !job->lines || !job->sums || !job->wide) return 0;
  jpeg_skip_scanlines(decoder, job->top);
  for (int y = 0; y < job->height; y++) {
    if (jpeg_read_scanlines(decoder, &job->line, 1) != 1) return 0;
    uint8_t *part = job->line + 4 * (job->left - first), *kept = job->lines + (size_t)y * pixels * 4;
    if (columns_first) memcpy(kept, part, (size_t)pixels * 4);
    else resize_line(job, part, kept);
  }
  for (int i = 0; i < size; i++) {
    uint8_t *out = (uint8_t *)job->out.buf + (size_t)i * size * 3;
    resize_columns(job, i, pixels, job->line);
    if (columns_first) resize_line(job, job->line, job->line);
    pack(job->line, size, out);
  }
  return job->errors.num_warnings == 0;
}

static void free_job(Job *job) {
  jpeg_destroy_decompress(&job->decoder);
  free(job->line), free(job->lines), free(job->wide), free(job->sums);
  free(job->across.start), free(job->across.count), free(job->across.weights);
  free(job->down.start), free(job->down.count), free(job->down.weights);
  PyBuffer_Release(&job->data);
  PyBuffer_Release(&job->out);
}

static PyObject *measure(PyObject *module, PyObject *args) {
  Job job = {0};
  (void)module;
  if (!PyArg_ParseTuple(args, "y*", &job.data)) return NULL;
  int known = run_measure(&job), height = job.decoder.image_height, width = job.decoder.image_width;
  int tagged = job.decoder.marker_list != NULL;
  free_job(&job);
  if (!known) Py_RETURN_NONE;
  return Py_BuildValue("iiN", height, width, PyBool_FromLong(tagged));
}

static PyObject *read_crop(PyObject *module, PyObject *args) {
  Job job = {0};
  int done = 0;
  (void)module;
  if (!PyArg_ParseTuple(args, "y*i(iiii)ippw*", &job.data, &job.denominator, &job.left, &job.top, &job.width,
                        &job.height, &job.size, &job.bicubic, &job.mirrored, &job.out))
    return NULL;
  if (job.denominator != 1 && job.denominator != 2 && job.denominator != 4 && job.denominator != 8) {
    free_job(&job);
    return PyErr_Format(PyExc_ValueError, "the denominator is %d; valid: 1, 2, 4, 8", job.denominator);
  }
  if (job.size < 1 || job.out.len != (Py_ssize_t)job.size * job.size * 3) {
    free_job(&job);
    return PyErr_Format(PyExc_ValueError, "the result of a crop of %d pixels must be uint8[%d, %d, 3]", job.size, job.size,
                        job.size);
  }
  Py_BEGIN_ALLOW_THREADS
  done = run_read_crop(&job);
  Py_END_ALLOW_THREADS
  free_job(&job);
  return PyBool_FromLong(done);
}

static PyMethodDef methods[] = {
    {"measure", measure, METH_VARARGS,
     "measure(data) -> (height, width, whether it has Exif or XMP), or None if only Pillow can read it."},
    {"read_crop", read_crop, METH_VARARGS,
     "read_crop(data, denominator, (left, top, width, height), size, bicubic, mirrored, out) -> whether out, "
     "uint8[size, size, 3], was filled. The rectangle lies in the image at 1 / denominator of its size."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_jpeg", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__jpeg(void) { return PyModule_Create(&definition); }
