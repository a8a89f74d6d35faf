/* The loops of the trust modes, compiled: what shmbroker/trust/python_loops.py says, bit for bit.
 *
 * Addresses come as numbers: shmbroker/trust/loops.py has looked at shapes, dtypes and strides. All of them run without the interpreter lock.
 * Floating-point numbers are added in one order only (eight lanes), and never contracted: the same input gives the same integers everywhere.
 */

#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define WIDE __attribute__((target("avx2")))
static int wide; /* whether this processor has AVX2, and nobody asked for none */
#else
static const int wide = 0;
#endif

enum { LANES = 8, ROWS_AT_ONCE = 64, LINE_BYTES = 64 };

static void *at(unsigned long long address)
{
    return (void *)(uintptr_t)address;
}

/* --- ChaCha20, RFC 8439 -------------------------------------------------------------------------------------------------------------- */

#define ROTATE(v, n) (((v) << (n)) | ((v) >> (32 - (n))))
#define QUARTER(BY_16, BY_8, a, b, c, d)                                                                                                   \
    a += b, d ^= a, d = BY_16(d), c += d, b ^= c, b = ROTATE(b, 12), a += b, d ^= a, d = BY_8(d), c += d, b ^= c, b = ROTATE(b, 7)
#define ROUNDS(x, BY_16, BY_8)                                                                                                                          \
    for (int round = 0; round < 10; round++) {                                                                                             \
        QUARTER(BY_16, BY_8, x[0], x[4], x[8], x[12]);                                                                                                  \
        QUARTER(BY_16, BY_8, x[1], x[5], x[9], x[13]);                                                                                                  \
        QUARTER(BY_16, BY_8, x[2], x[6], x[10], x[14]);                                                                                                 \
        QUARTER(BY_16, BY_8, x[3], x[7], x[11], x[15]);                                                                                                 \
        QUARTER(BY_16, BY_8, x[0], x[5], x[10], x[15]);                                                                                                 \
        QUARTER(BY_16, BY_8, x[1], x[6], x[11], x[12]);                                                                                                 \
        QUARTER(BY_16, BY_8, x[2], x[7], x[8], x[13]);                                                                                                  \
        QUARTER(BY_16, BY_8, x[3], x[4], x[9], x[14]);                                                                                                  \
    }

static void chacha_block(const uint32_t state[16], uint32_t *out)
{
    uint32_t x[16];
    memcpy(x, state, sizeof x);
#define BY_16(v) ROTATE(v, 16)
#define BY_8(v) ROTATE(v, 8)
    ROUNDS(x, BY_16, BY_8)
    for (int i = 0; i < 16; i++)
        out[i] = x[i] + state[i];
}

#if defined(__x86_64__)
typedef uint32_t Eight __attribute__((vector_size(32)));

/* Eight blocks at once: word i of each lies in lane 0 to 7 of x[i]. */
WIDE static void chacha_eight(const uint32_t state[16], uint32_t *out)
{
    Eight start[16], x[16];
    for (int i = 0; i < 16; i++)
        for (int lane = 0; lane < 8; lane++)
            start[i][lane] = state[i] + (i == 12 ? (uint32_t)lane : 0);
    memcpy(x, start, sizeof x);
    const __m256i by_16 = _mm256_set_epi64x(0x0d0c0f0e09080b0a, 0x0504070601000302, 0x0d0c0f0e09080b0a, 0x0504070601000302);
    const __m256i by_8 = _mm256_set_epi64x(0x0e0d0c0f0a09080b, 0x0605040702010003, 0x0e0d0c0f0a09080b, 0x0605040702010003);
#define SHUFFLED_16(v) (Eight)_mm256_shuffle_epi8((__m256i)v, by_16)
#define SHUFFLED_8(v) (Eight)_mm256_shuffle_epi8((__m256i)v, by_8)
    ROUNDS(x, SHUFFLED_16, SHUFFLED_8)
    for (int i = 0; i < 16; i++)
        x[i] += start[i];
    for (int half = 0; half < 16; half += 8) { /* 8 x 8 words, turned: then a block lies in one piece */
        __m256i a[8], b[8];
        for (int i = 0; i < 8; i += 2) {
            a[i] = _mm256_unpacklo_epi32((__m256i)x[half + i], (__m256i)x[half + i + 1]);
            a[i + 1] = _mm256_unpackhi_epi32((__m256i)x[half + i], (__m256i)x[half + i + 1]);
        }
        for (int i = 0; i < 8; i += 4)
            for (int j = 0; j < 2; j++) {
                b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + j + 2]);
                b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + j + 2]);
            }
        for (int j = 0; j < 4; j++) {
            _mm256_storeu_si256((__m256i *)(out + 16 * j + half), _mm256_permute2x128_si256(b[j], b[j + 4], 0x20));
            _mm256_storeu_si256((__m256i *)(out + 16 * (j + 4) + half), _mm256_permute2x128_si256(b[j], b[j + 4], 0x31));
        }
    }
    explicit_bzero(start, sizeof start);
}
#endif

static void keystream(const uint8_t *key, const uint8_t *nonce, uint32_t counter, uint8_t *out, size_t nbytes)
{
    uint32_t state[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
    memcpy(state + 4, key, 32); /* little-endian, as every machine that torch runs on */
    memcpy(state + 13, nonce, 12);
    state[12] = counter;
    uint32_t block[128];
    size_t done = 0;
#if defined(__x86_64__)
    while (wide && nbytes - done >= sizeof block) {
        chacha_eight(state, block);
        memcpy(out + done, block, sizeof block);
        done += sizeof block;
        state[12] += 8;
    }
#endif
    while (done < nbytes) {
        chacha_block(state, block);
        size_t part = nbytes - done < 64 ? nbytes - done : 64;
        memcpy(out + done, block, part);
        done += part;
        state[12]++;
    }
    explicit_bzero(state, sizeof state);
    explicit_bzero(block, sizeof block);
}

/* --- rows to integers, masked, with the first sum of the check ------------------------------------------------------------------------ */

static double squares(const float *x, size_t columns)
{
    double lane[LANES] = {0};
    size_t k = 0;
    for (; k + LANES <= columns; k += LANES)
        for (int i = 0; i < LANES; i++) {
            double v = x[k + i];
            lane[i] += v * v;
        }
    for (int i = 0; k + i < columns; i++) {
        double v = x[k + i];
        lane[i] += v * v;
    }
    return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

static void seal_row(const float *x, double scale, size_t columns, uint32_t *pad, uint32_t *out, const int64_t *s, uint64_t sums[2])
{
    uint64_t first = 0, second = 0;
    for (size_t k = 0; k < columns; k++) {
        int64_t value = (int64_t)rint((double)x[k] * scale);
        first += (uint64_t)value * (uint64_t)s[k];
        second += (uint64_t)value * (uint64_t)s[columns + k];
        uint32_t masked = (uint32_t)value;
        if (pad != NULL) {
            masked += pad[k];
            pad[k] = 0;
        }
        out[k] = masked;
    }
    sums[0] = first;
    sums[1] = second;
}

#if defined(__x86_64__)
WIDE static double squares_wide(const float *x, size_t columns)
{
    __m256d low = _mm256_setzero_pd(), high = low;
    size_t k = 0;
    for (; k + LANES <= columns; k += LANES) {
        __m256d a = _mm256_cvtps_pd(_mm_loadu_ps(x + k)), b = _mm256_cvtps_pd(_mm_loadu_ps(x + k + 4));
        low = _mm256_add_pd(low, _mm256_mul_pd(a, a));
        high = _mm256_add_pd(high, _mm256_mul_pd(b, b));
    }
    double lane[LANES];
    _mm256_storeu_pd(lane, low);
    _mm256_storeu_pd(lane + 4, high);
    for (int i = 0; k + i < columns; i++) {
        double v = x[k + i];
        lane[i] += v * v;
    }
    return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

WIDE static uint64_t sum_of(__m256i v)
{
    uint64_t lane[4];
    _mm256_storeu_si256((__m256i *)lane, v);
    return lane[0] + lane[1] + lane[2] + lane[3];
}

/* A secret S of 64 bits is l + 2^32 h with l signed: two products of 32 bits each, of which the second counts by its low half. */
WIDE static void seal_row_wide(const float *x, double scale, size_t columns, uint32_t *pad, uint32_t *out, const int64_t *s, uint64_t sums[2])
{
    const __m256d factor = _mm256_set1_pd(scale);
    const __m256i half = _mm256_set1_epi64x(INT64_C(1) << 31);
    __m256i low[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()}, high[2] = {low[0], low[0]};
    size_t k = 0;
    for (; k + 4 <= columns; k += 4) {
        __m128i value = _mm256_cvtpd_epi32(_mm256_mul_pd(_mm256_cvtps_pd(_mm_loadu_ps(x + k)), factor));
        __m256i value64 = _mm256_cvtepi32_epi64(value);
        for (int i = 0; i < 2; i++) {
            __m256i secret = _mm256_loadu_si256((const __m256i *)(s + i * columns + k));
            low[i] = _mm256_add_epi64(low[i], _mm256_mul_epi32(value64, secret));
            high[i] = _mm256_add_epi64(high[i], _mm256_mul_epi32(value64, _mm256_srli_epi64(_mm256_add_epi64(secret, half), 32)));
        }
        if (pad != NULL) {
            value = _mm_add_epi32(value, _mm_loadu_si128((const __m128i *)(pad + k)));
            _mm_storeu_si128((__m128i *)(pad + k), _mm_setzero_si128());
        }
        _mm_storeu_si128((__m128i *)(out + k), value);
    }
    uint64_t rest[2] = {0, 0};
    for (; k < columns; k++) {
        int64_t value = (int64_t)rint((double)x[k] * scale);
        rest[0] += (uint64_t)value * (uint64_t)s[k];
        rest[1] += (uint64_t)value * (uint64_t)s[columns + k];
        uint32_t masked = (uint32_t)value;
        if (pad != NULL) {
            masked += pad[k];
            pad[k] = 0;
        }
        out[k] = masked;
    }
    for (int i = 0; i < 2; i++)
        sums[i] = rest[i] + sum_of(low[i]) + (sum_of(high[i]) << 32);
}
#endif

static int seal(const float *x, size_t rows, size_t columns, double limit, uint32_t *pads, uint32_t *out, const int64_t *s, uint64_t *sums, double *scales)
{
    for (size_t row = 0; row < rows; row++) {
        const float *one = x + row * columns;
        double total =
#if defined(__x86_64__)
            wide ? squares_wide(one, columns) :
#endif
                 squares(one, columns);
        if (!isfinite(total))
            return 0;
        scales[row] = total > 0 ? limit / sqrt(total) : 1.0;
    }
    for (size_t row = 0; row < rows; row++) {
        size_t first = row * columns;
        uint32_t *pad = pads == NULL ? NULL : pads + first;
#if defined(__x86_64__)
        if (wide) {
            seal_row_wide(x + first, scales[row], columns, pad, out + first, s, sums + 2 * row);
            continue;
        }
#endif
        seal_row(x + first, scales[row], columns, pad, out + first, s, sums + 2 * row);
    }
    return 1;
}

/* --- results, copied once, unmasked, checked, and back to floating point ---------------------------------------------------------------- */

static void open_row(const uint32_t *y, size_t columns, const uint32_t *pad, const int32_t *r, float inverse, const float *scales, const float *bias, float *out, uint64_t sums[2])
{
    uint64_t first = 0, second = 0;
    for (size_t n = 0; n < columns; n++) {
        int64_t value = (int32_t)(pad == NULL ? y[n] : y[n] - pad[n]);
        first += (uint64_t)(value * r[n]);
        second += (uint64_t)(value * r[columns + n]);
        float result = (float)value * (scales[n] * inverse);
        out[n] = bias == NULL ? result : result + bias[n];
    }
    sums[0] = first;
    sums[1] = second;
}

#if defined(__x86_64__)
WIDE static void open_row_wide(const uint32_t *y, size_t columns, const uint32_t *pad, const int32_t *r, float inverse, const float *scales, const float *bias, float *out, uint64_t sums[2])
{
    const __m256 factor = _mm256_set1_ps(inverse);
    __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    size_t n = 0;
    for (; n + LANES <= columns; n += LANES) {
        __m256i value = _mm256_loadu_si256((const __m256i *)(y + n));
        if (pad != NULL)
            value = _mm256_sub_epi32(value, _mm256_loadu_si256((const __m256i *)(pad + n)));
        __m256i odd = _mm256_srli_epi64(value, 32); /* of each pair, the low one is multiplied where it lies */
        for (int i = 0; i < 2; i++) {
            __m256i random = _mm256_loadu_si256((const __m256i *)(r + i * columns + n));
            sum[i] = _mm256_add_epi64(sum[i], _mm256_mul_epi32(value, random));
            sum[i] = _mm256_add_epi64(sum[i], _mm256_mul_epi32(odd, _mm256_srli_epi64(random, 32)));
        }
        __m256 result = _mm256_mul_ps(_mm256_cvtepi32_ps(value), _mm256_mul_ps(_mm256_loadu_ps(scales + n), factor));
        if (bias != NULL)
            result = _mm256_add_ps(result, _mm256_loadu_ps(bias + n));
        _mm256_storeu_ps(out + n, result);
    }
    uint64_t rest[2] = {0, 0};
    for (; n < columns; n++) {
        int64_t value = (int32_t)(pad == NULL ? y[n] : y[n] - pad[n]);
        rest[0] += (uint64_t)(value * r[n]);
        rest[1] += (uint64_t)(value * r[columns + n]);
        float result = (float)value * (scales[n] * inverse);
        out[n] = bias == NULL ? result : result + bias[n];
    }
    for (int i = 0; i < 2; i++)
        sums[i] = rest[i] + sum_of(sum[i]);
}
#endif

/* The first row that is not the product, or -1. */
static Py_ssize_t open_rows(const uint32_t *shared, uint32_t *y, size_t rows, size_t columns, uint32_t *pads, const int32_t *r, const uint64_t *expected, const double *row_scales, const float *scales, const float *bias, float *out)
{
    Py_ssize_t wrong = -1;
    for (size_t row = 0; row < rows; row++) {
        size_t first = row * columns;
        uint32_t *pad = pads == NULL ? NULL : pads + first;
        memcpy(y, shared + first, 4 * columns);
        __asm__ volatile("" : : "r"(y) : "memory"); /* what is checked is the copy, also in the eyes of the compiler */
        uint64_t sums[2];
        float inverse = (float)(1.0 / row_scales[row]);
#if defined(__x86_64__)
        if (wide)
            open_row_wide(y, columns, pad, r, inverse, scales, bias, out + first, sums);
        else
#endif
            open_row(y, columns, pad, r, inverse, scales, bias, out + first, sums);
        if (pad != NULL)
            explicit_bzero(pad, 4 * columns);
        if (wrong < 0 && (sums[0] != expected[2 * row] || sums[1] != expected[2 * row + 1]))
            wrong = (Py_ssize_t)row;
    }
    return wrong;
}

/* --- products modulo 2^32 ------------------------------------------------------------------------------------------------------------ */

static void product_row(const uint32_t *x, const int16_t *w, size_t columns, size_t outputs, uint32_t *y)
{
    for (size_t n = 0; n < outputs; n++) {
        uint32_t sum = 0;
        for (size_t k = 0; k < columns; k++)
            sum += x[k] * (uint32_t)(int32_t)w[n * columns + k];
        y[n] = sum;
    }
}

#if defined(__x86_64__)
/* A row is low + 2^16 high, each signed 16 bits. whole: the columns, down to a multiple of 16. */
WIDE static void product_four(const int16_t *low, const int16_t *high, const int16_t *w, size_t columns, size_t whole, uint32_t sums[4])
{
    __m256i a[4], b[4];
    for (int i = 0; i < 4; i++)
        a[i] = b[i] = _mm256_setzero_si256();
    for (size_t k = 0; k < whole; k += 16) {
        __m256i l = _mm256_loadu_si256((const __m256i *)(low + k)), h = _mm256_loadu_si256((const __m256i *)(high + k));
        for (int i = 0; i < 4; i++) {
            __m256i weights = _mm256_loadu_si256((const __m256i *)(w + i * columns + k));
            a[i] = _mm256_add_epi32(a[i], _mm256_madd_epi16(weights, l));
            b[i] = _mm256_add_epi32(b[i], _mm256_madd_epi16(weights, h));
        }
    }
    for (int i = 0; i < 4; i++)
        a[i] = _mm256_add_epi32(a[i], _mm256_slli_epi32(b[i], 16));
    __m256i sum = _mm256_hadd_epi32(_mm256_hadd_epi32(a[0], a[1]), _mm256_hadd_epi32(a[2], a[3]));
    _mm_storeu_si128((__m128i *)sums, _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1)));
    for (int i = 0; i < 4; i++)
        for (size_t k = whole; k < columns; k++)
            sums[i] += (uint32_t)(int32_t)w[i * columns + k] * ((uint32_t)(int32_t)low[k] + ((uint32_t)(int32_t)high[k] << 16));
}

WIDE static int product_wide(const uint32_t *x, size_t rows, size_t columns, const int16_t *w, size_t outputs, uint32_t *y, size_t stride)
{
    size_t whole = columns & ~(size_t)15, at_once = rows < ROWS_AT_ONCE ? rows : ROWS_AT_ONCE;
    size_t nbytes = (2 * at_once * columns * sizeof(int16_t) + LINE_BYTES) & ~(size_t)(LINE_BYTES - 1);
    int16_t *low = aligned_alloc(LINE_BYTES, nbytes);
    if (low == NULL)
        return 0;
    int16_t *high = low + at_once * columns;
    for (size_t first = 0; first < rows; first += at_once) {
        size_t count = rows - first < at_once ? rows - first : at_once;
        for (size_t i = 0; i < count * columns; i++) {
            uint32_t value = x[first * columns + i];
            low[i] = (int16_t)(uint16_t)value;
            high[i] = (int16_t)(uint16_t)((value - (uint32_t)(int32_t)low[i]) >> 16);
        }
        size_t n = 0;
        for (; n + 4 <= outputs; n += 4)
            for (size_t row = 0; row < count; row++)
                product_four(low + row * columns, high + row * columns, w + n * columns, columns, whole, y + (first + row) * stride + n);
        for (size_t row = 0; row < count && n < outputs; row++)
            product_row(x + (first + row) * columns, w + n * columns, columns, outputs - n, y + (first + row) * stride + n);
    }
    explicit_bzero(low, nbytes);
    free(low);
    return 1;
}
#endif

/* --- sums under Gaussian vectors, for products of floating-point numbers ------------------------------------------------------------------ */

enum { TOGETHER = 64 }; /* numbers summed in float32, before the sum is added to those in float64 */

/* Adds to sums the row times vectors of float64, [columns, 8]. */
static void weigh(const float *row, size_t columns, const double *vectors, double *sums)
{
    for (size_t n = 0; n < columns; n++)
        for (int i = 0; i < LANES; i++)
            sums[i] += (double)row[n] * vectors[LANES * n + i];
}

/* Takes from sums the row, less the bias, times vectors of float32. */
static void weigh_off(const float *row, size_t columns, const float *vectors, const float *bias, double *sums)
{
    for (size_t first = 0; first < columns; first += TOGETHER) {
        float part[LANES] = {0};
        for (size_t n = first; n < columns && n < first + TOGETHER; n++) {
            float value = bias == NULL ? row[n] : row[n] - bias[n];
            for (int i = 0; i < LANES; i++)
                part[i] += value * vectors[LANES * n + i];
        }
        for (int i = 0; i < LANES; i++)
            sums[i] -= (double)part[i];
    }
}

#if defined(__x86_64__)
WIDE static void weigh_wide(const float *row, size_t columns, const double *vectors, double *sums)
{
    __m256d sum[4][2];
    for (int i = 0; i < 4; i++)
        sum[i][0] = sum[i][1] = _mm256_setzero_pd();
    for (size_t n = 0; n < columns; n += 4)
        for (size_t i = 0; i < 4 && n + i < columns; i++) { /* sums of their own: an addition need not wait for the last one */
            __m256d value = _mm256_set1_pd((double)row[n + i]);
            const double *vector = vectors + LANES * (n + i);
            sum[i][0] = _mm256_add_pd(sum[i][0], _mm256_mul_pd(value, _mm256_loadu_pd(vector)));
            sum[i][1] = _mm256_add_pd(sum[i][1], _mm256_mul_pd(value, _mm256_loadu_pd(vector + 4)));
        }
    for (int half = 0; half < 2; half++) {
        __m256d all = _mm256_add_pd(_mm256_add_pd(sum[0][half], sum[1][half]), _mm256_add_pd(sum[2][half], sum[3][half]));
        _mm256_storeu_pd(sums + 4 * half, _mm256_add_pd(_mm256_loadu_pd(sums + 4 * half), all));
    }
}

WIDE static void weigh_off_wide(const float *row, size_t columns, const float *vectors, const float *bias, double *sums)
{
    __m256d low = _mm256_loadu_pd(sums), high = _mm256_loadu_pd(sums + 4);
    for (size_t first = 0; first < columns; first += TOGETHER) {
        __m256 part[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        size_t last = columns < first + TOGETHER ? columns : first + TOGETHER, n = first;
        for (; n + 4 <= last; n += 4)
            for (int i = 0; i < 4; i++) {
                float value = bias == NULL ? row[n + i] : row[n + i] - bias[n + i];
                part[i] = _mm256_add_ps(part[i], _mm256_mul_ps(_mm256_set1_ps(value), _mm256_loadu_ps(vectors + LANES * (n + i))));
            }
        for (; n < last; n++) {
            float value = bias == NULL ? row[n] : row[n] - bias[n];
            part[0] = _mm256_add_ps(part[0], _mm256_mul_ps(_mm256_set1_ps(value), _mm256_loadu_ps(vectors + LANES * n)));
        }
        __m256 all = _mm256_add_ps(_mm256_add_ps(part[0], part[1]), _mm256_add_ps(part[2], part[3]));
        low = _mm256_sub_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(all)));
        high = _mm256_sub_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(all, 1)));
    }
    _mm256_storeu_pd(sums, low);
    _mm256_storeu_pd(sums + 4, high);
}
#endif

enum { MOST_PRODUCTS = 16 };

typedef struct {
    const float *shared;
    float *own;
    size_t columns;
    const float *vectors, *bias;
} Product;

/* The first row whose residue is beyond its tolerance, or is no number; -1 for none; -2 where an input is not finite. */
static Py_ssize_t residues(const float *x, size_t rows, size_t columns, const double *inputs, const Product *products, size_t count, double factor, double *tolerances)
{
    Py_ssize_t wrong = -1;
    for (size_t row = 0; row < rows; row++) {
        const float *one = x + row * columns;
        double sums[LANES] = {0}, total;
#if defined(__x86_64__)
        if (wide) {
            total = squares_wide(one, columns);
            weigh_wide(one, columns, inputs, sums);
        } else
#endif
        {
            total = squares(one, columns);
            weigh(one, columns, inputs, sums);
        }
        for (size_t i = 0; i < count; i++) {
            const Product *product = products + i;
            float *own = product->own + row * product->columns;
            memcpy(own, product->shared + row * product->columns, product->columns * sizeof *own);
            __asm__ volatile("" : : "r"(own) : "memory"); /* what is checked is the copy */
#if defined(__x86_64__)
            if (wide)
                weigh_off_wide(own, product->columns, product->vectors, product->bias, sums);
            else
#endif
                weigh_off(own, product->columns, product->vectors, product->bias, sums);
        }
        if (!isfinite(total))
            return -2;
        tolerances[row] = factor * sqrt(total);
        for (int i = 0; i < LANES; i++)
            if (!(fabs(sums[i]) <= tolerances[row]) && wrong < 0) /* also what is no number */
                wrong = (Py_ssize_t)row;
    }
    return wrong;
}

/* --- the module ---------------------------------------------------------------------------------------------------------------------- */

typedef unsigned long long Address;

static PyObject *loops_keystream(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer key, nonce;
    unsigned int counter;
    Address out;
    Py_ssize_t nbytes;
    if (!PyArg_ParseTuple(args, "y*y*IKn", &key, &nonce, &counter, &out, &nbytes))
        return NULL;
    int fits = key.len == 32 && nonce.len == 12 && nbytes >= 0;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        keystream(key.buf, nonce.buf, counter, at(out), (size_t)nbytes);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&key);
    PyBuffer_Release(&nonce);
    if (!fits)
        return PyErr_Format(PyExc_ValueError, "a key has 32 bytes and a nonce 12");
    Py_RETURN_NONE;
}

static PyObject *loops_seal(PyObject *module, PyObject *args)
{
    (void)module;
    Address x, pads, out, s, sums, scales;
    Py_ssize_t rows, columns;
    double limit;
    if (!PyArg_ParseTuple(args, "KnndKKKKK", &x, &rows, &columns, &limit, &pads, &out, &s, &sums, &scales))
        return NULL;
    int finite;
    Py_BEGIN_ALLOW_THREADS
    finite = seal(at(x), (size_t)rows, (size_t)columns, limit, at(pads), at(out), at(s), at(sums), at(scales));
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(finite);
}

static PyObject *loops_open(PyObject *module, PyObject *args)
{
    (void)module;
    Address shared, row, pads, r, expected, row_scales, scales, bias, out;
    Py_ssize_t rows, columns, wrong;
    if (!PyArg_ParseTuple(args, "KKnnKKKKKKK", &shared, &row, &rows, &columns, &pads, &r, &expected, &row_scales, &scales, &bias, &out))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    wrong = open_rows(at(shared), at(row), (size_t)rows, (size_t)columns, at(pads), at(r), at(expected), at(row_scales), at(scales), at(bias), at(out));
    Py_END_ALLOW_THREADS
    return PyLong_FromSsize_t(wrong);
}

static PyObject *loops_product(PyObject *module, PyObject *args)
{
    (void)module;
    Address x, w, y;
    Py_ssize_t rows, columns, outputs, stride;
    if (!PyArg_ParseTuple(args, "KnnKnKn", &x, &rows, &columns, &w, &outputs, &y, &stride))
        return NULL;
    int done = 1;
    Py_BEGIN_ALLOW_THREADS
#if defined(__x86_64__)
    if (wide)
        done = rows == 0 || product_wide(at(x), (size_t)rows, (size_t)columns, at(w), (size_t)outputs, at(y), (size_t)stride);
    else
#endif
        for (Py_ssize_t row = 0; row < rows; row++)
            product_row((uint32_t *)at(x) + row * columns, at(w), (size_t)columns, (size_t)outputs, (uint32_t *)at(y) + row * stride);
    Py_END_ALLOW_THREADS
    return done ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

static PyObject *loops_residues(PyObject *module, PyObject *args)
{
    (void)module;
    Address x, inputs, tolerances;
    Py_ssize_t rows, columns, wrong;
    PyObject *given;
    double factor;
    if (!PyArg_ParseTuple(args, "KnnKO!dK", &x, &rows, &columns, &inputs, &PyTuple_Type, &given, &factor, &tolerances))
        return NULL;
    Product products[MOST_PRODUCTS];
    Py_ssize_t count = PyTuple_GET_SIZE(given);
    if (count > MOST_PRODUCTS)
        return PyErr_Format(PyExc_ValueError, "at most %d products at once", MOST_PRODUCTS);
    for (Py_ssize_t i = 0; i < count; i++) {
        Address shared, own, vectors, bias;
        Py_ssize_t width;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(given, i), "KKnKK", &shared, &own, &width, &vectors, &bias))
            return NULL;
        products[i] = (Product){at(shared), at(own), (size_t)width, at(vectors), at(bias)};
    }
    Py_BEGIN_ALLOW_THREADS
    wrong = residues(at(x), (size_t)rows, (size_t)columns, at(inputs), products, (size_t)count, factor, at(tolerances));
    Py_END_ALLOW_THREADS
    return PyLong_FromSsize_t(wrong);
}

static PyObject *loops_use_wide(PyObject *module, PyObject *wanted)
{
    (void)module;
    int asked = PyObject_IsTrue(wanted);
    if (asked < 0)
        return NULL;
#if defined(__x86_64__)
    wide = asked && __builtin_cpu_supports("avx2");
#endif
    return PyBool_FromLong(wide);
}

static PyObject *loops_uses_wide(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyBool_FromLong(wide);
}

static PyMethodDef loops_methods[] = {
    {"keystream", loops_keystream, METH_VARARGS, "keystream(key, nonce, counter, out, nbytes): ChaCha20's."},
    {"seal", loops_seal, METH_VARARGS, "seal(x, rows, columns, limit, pads, out, s, sums, scales): whether all numbers were finite."},
    {"open_rows", loops_open, METH_VARARGS, "open_rows(shared, row, rows, columns, pads, r, expected, row_scales, scales, bias, out): the first wrong row, or -1."},
    {"product", loops_product, METH_VARARGS, "product(x, rows, columns, w, outputs, y, stride): modulo 2^32."},
    {"residues", loops_residues, METH_VARARGS, "residues(x, rows, columns, inputs, products, factor, tolerances): the first wrong row, or -1."},
    {"uses_wide", loops_uses_wide, METH_NOARGS, "Whether AVX2 is used."},
    {"use_wide", loops_use_wide, METH_O, "use_wide(wanted): whether AVX2 is used from now on."},
    {NULL},
};

static int module_exec(PyObject *module)
{
    (void)module;
#if defined(__x86_64__)
    wide = __builtin_cpu_supports("avx2");
#endif
    return 0;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};
static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shmbroker.trust._loops",
    .m_doc = "The loops of the trust modes, compiled. Used through shmbroker.trust.loops.",
    .m_methods = loops_methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__loops(void)
{
    return PyModuleDef_Init(&module_def);
}
