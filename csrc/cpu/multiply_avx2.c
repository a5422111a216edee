/* A tile is up to 6 tokens x 16 output channels: 12 accumulators, 2 weight registers, a broadcast
 * and a temporary fill the 16 ymm registers.
 *
 * 4-bit codes allow what 8-bit ones do not: maddubs(weight + 8 as u8, activation as s8) sums two
 * products of at most 15 * 15 in int16, and int16 sums of a whole segment stay exact: they wrap
 * modulo 2^16 on the way, but start at -8 * sum(activations), so the last value is the plain dot
 * product, at most 2 * 128 * 8 * 15 < 2^15 in magnitude. */
#include "kernels.h"

#if defined(__x86_64__)
#include <string.h>

#include "x86.h"

enum { TILE_ROWS = 6 };

/* Calls tile(rows, ...) with a constant first argument, so that its loops over rows unroll. */
#define WITH_CONSTANT_ROWS(rows, tile, ...)    \
    switch (rows) {                            \
        case 1: tile(1, __VA_ARGS__); break;   \
        case 2: tile(2, __VA_ARGS__); break;   \
        case 3: tile(3, __VA_ARGS__); break;   \
        case 4: tile(4, __VA_ARGS__); break;   \
        case 5: tile(5, __VA_ARGS__); break;   \
        default: tile(TILE_ROWS, __VA_ARGS__); \
    }

MQ_AVX2 static MQ_INLINE void salient_tile(const int rows, const float *x, int64_t h,
                                           const float *w, int64_t channels, float *sums) {
    __m256 acc[TILE_ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        acc[r][0] = _mm256_loadu_ps(sums + r * MQ_PANEL);
        acc[r][1] = _mm256_loadu_ps(sums + r * MQ_PANEL + 8);
    }
    for (int64_t s = 0; s < channels; s++, x += h, w += MQ_PANEL) {
        __m256 w0 = _mm256_loadu_ps(w), w1 = _mm256_loadu_ps(w + 8);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            __m256 value = _mm256_broadcast_ss(x + r);
            acc[r][0] = _mm256_fmadd_ps(value, w0, acc[r][0]);
            acc[r][1] = _mm256_fmadd_ps(value, w1, acc[r][1]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        _mm256_storeu_ps(sums + r * MQ_PANEL, acc[r][0]);
        _mm256_storeu_ps(sums + r * MQ_PANEL + 8, acc[r][1]);
    }
}

MQ_AVX2 void mq_multiply_salient_avx2(const mq_activations *act, int64_t k_salient, int64_t tile0,
                                      int64_t tile1, int64_t s0, int64_t s1, const float *w,
                                      float *sums) {
    for (int64_t tile = tile0; tile < tile1; tile++) {
        const float *x = act->salient + (tile * k_salient + s0) * act->h;
        float *tile_sums = sums + (tile - tile0) * act->h * MQ_PANEL;
        WITH_CONSTANT_ROWS(mq_min(act->h, act->m - tile * act->h), salient_tile, x, act->h, w,
                           s1 - s0, tile_sums);
    }
}

/* Codes + 8 of quads [quad0, quad1) as bytes: w [quads][16][4]. quad0 need not be even. */
MQ_AVX2 static MQ_INLINE const uint8_t *unpack(const uint8_t *qweight, int64_t quad0, int64_t quad1,
                                               uint8_t *w) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const int64_t block0 = quad0 / 2;
    for (int64_t block = block0; block < mq_ceil_div(quad1, 2); block++) {
        const uint8_t *from = qweight + block * MQ_BLOCK_BYTES;
        uint8_t *to = w + (block - block0) * 2 * MQ_BLOCK_BYTES;
        for (int half = 0; half < MQ_BLOCK_BYTES; half += 32) {
            __m256i bytes = _mm256_loadu_si256((const __m256i *)(const void *)(from + half));
            __m256i low = _mm256_and_si256(bytes, nibble);
            __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
            _mm256_store_si256((__m256i *)(void *)(to + half), low);
            _mm256_store_si256((__m256i *)(void *)(to + MQ_BLOCK_BYTES + half), high);
        }
    }
    return w + (quad0 - 2 * block0) * MQ_BLOCK_BYTES;
}

/* dots [rows][2] = exact int32 dot products of `quads` <= MQ_SEGMENT_QUADS quads */
MQ_AVX2 static MQ_INLINE void segment_tile(const int rows, const int8_t *codes, int64_t h,
                                           const int32_t *starts, const uint8_t *w, int64_t quads,
                                           __m256i dots[TILE_ROWS][2]) {
    __m256i acc[TILE_ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = _mm256_set1_epi32(starts[r]);
    for (int64_t quad = 0; quad < quads; quad++) {
        __m256i w0 = _mm256_load_si256((const __m256i *)(const void *)w);
        __m256i w1 = _mm256_load_si256((const __m256i *)(const void *)(w + 32));
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, codes + r * MQ_QUAD, sizeof four);
            __m256i a = _mm256_set1_epi32(four);
            acc[r][0] = _mm256_add_epi16(acc[r][0], _mm256_maddubs_epi16(w0, a));
            acc[r][1] = _mm256_add_epi16(acc[r][1], _mm256_maddubs_epi16(w1, a));
        }
        codes += h * MQ_QUAD;
        w += MQ_BLOCK_BYTES;
    }
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        dots[r][0] = _mm256_madd_epi16(acc[r][0], ones);
        dots[r][1] = _mm256_madd_epi16(acc[r][1], ones);
    }
}

MQ_AVX2 static MQ_INLINE __m256 widen_scales(const uint16_t *scales) {
    __m128i bits = _mm_loadu_si128((const __m128i *)(const void *)scales);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

/* sums += dots * weight scale * activation scale */
MQ_AVX2 static MQ_INLINE void scale_tile(const int rows, __m256i dots[TILE_ROWS][2],
                                         const uint16_t *weight_scales, const float *act_scales,
                                         float *sums) {
    const __m256 sw0 = widen_scales(weight_scales), sw1 = widen_scales(weight_scales + 8);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        __m256 sa = _mm256_broadcast_ss(act_scales + r);
        float *sum = sums + r * MQ_PANEL;
        __m256 scaled0 = _mm256_mul_ps(_mm256_cvtepi32_ps(dots[r][0]), sw0);
        __m256 scaled1 = _mm256_mul_ps(_mm256_cvtepi32_ps(dots[r][1]), sw1);
        _mm256_storeu_ps(sum, _mm256_fmadd_ps(scaled0, sa, _mm256_loadu_ps(sum)));
        _mm256_storeu_ps(sum + 8, _mm256_fmadd_ps(scaled1, sa, _mm256_loadu_ps(sum + 8)));
    }
}

/* Consecutive groups of one tile whose quads, `quads` in all, are unpacked; a group is one segment
 */
MQ_AVX2 static MQ_INLINE void groups_tile(const int rows, const int8_t *codes, int64_t h,
                                          const int32_t *starts, const float *act_scales,
                                          const uint8_t *w, const uint16_t *weight_scales,
                                          int64_t group_quads, int64_t quads, float *sums) {
    for (int64_t n; quads > 0; quads -= n) {
        n = mq_min(group_quads, quads);
        __m256i dots[TILE_ROWS][2];
        segment_tile(rows, codes, h, starts, w, n, dots);
        scale_tile(rows, dots, weight_scales, act_scales, sums);
        codes += n * h * MQ_QUAD;
        starts += h;
        act_scales += h;
        w += n * MQ_BLOCK_BYTES;
        weight_scales += MQ_PANEL;
    }
}

/* One segment of a group of several: adds the dot products to totals, scales them after the last */
MQ_AVX2 static MQ_INLINE void long_group_tile(const int rows, const int8_t *codes, int64_t h,
                                              const int32_t *starts, const float *act_scales,
                                              const uint8_t *w, const uint16_t *weight_scales,
                                              int64_t quads, int first, int last, int32_t *totals,
                                              float *sums) {
    __m256i dots[TILE_ROWS][2];
    segment_tile(rows, codes, h, starts, w, quads, dots);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        for (int half = 0; half < 2; half++) {
            __m256i *total = (__m256i *)(void *)(totals + r * MQ_PANEL + 8 * half);
            if (!first) dots[r][half] = _mm256_add_epi32(dots[r][half], _mm256_loadu_si256(total));
            if (!last) _mm256_storeu_si256(total, dots[r][half]);
        }
    }
    if (last) scale_tile(rows, dots, weight_scales, act_scales, sums);
}

/* Groups longer than a segment, group by group; the totals wait in memory between segments. */
MQ_AVX2 static void multiply_long_groups(const mq_activations *act, const mq_shape *shape,
                                         int64_t tile0, int64_t tile1, const uint8_t *qweight,
                                         const uint16_t *scales, float *sums) {
    _Alignas(32) uint8_t buffer[(MQ_SEGMENT_QUADS + 2) * MQ_BLOCK_BYTES];
    int32_t totals[MQ_ROW_CHUNK * MQ_PANEL];
    const int64_t h = act->h;
    int64_t segment = 0;
    for (int64_t j = 0; j < shape->groups; j++) {
        const int64_t group0 = j * shape->group_quads;
        const int64_t group1 = mq_min(group0 + shape->group_quads, shape->quads);
        for (int64_t quad0 = group0, quad1; quad0 < group1; quad0 = quad1, segment++) {
            quad1 = mq_min(quad0 + MQ_SEGMENT_QUADS, group1);
            const uint8_t *w = unpack(qweight, quad0, quad1, buffer);
            for (int64_t tile = tile0; tile < tile1; tile++) {
                const int64_t at = (tile - tile0) * h * MQ_PANEL;
                WITH_CONSTANT_ROWS(mq_min(h, act->m - tile * h), long_group_tile,
                                   act->codes + (tile * shape->quads + quad0) * h * MQ_QUAD, h,
                                   act->starts + (tile * shape->segments + segment) * h,
                                   act->scales + (tile * shape->groups + j) * h, w,
                                   scales + j * MQ_PANEL, quad1 - quad0, quad0 == group0,
                                   quad1 == group1, totals + at, sums + at);
            }
        }
    }
}

MQ_AVX2 void mq_multiply_groups_avx2(const mq_activations *act, const mq_shape *shape,
                                     int64_t tile0, int64_t tile1, const uint8_t *qweight,
                                     const uint16_t *scales, float *sums) {
    if (shape->group_quads > MQ_SEGMENT_QUADS) {
        multiply_long_groups(act, shape, tile0, tile1, qweight, scales, sums);
        return;
    }
    if (shape->groups == 0) return;
    _Alignas(32) uint8_t buffer[(MQ_SEGMENT_QUADS + 2) * MQ_BLOCK_BYTES];
    const int64_t h = act->h, groups_at_once = MQ_SEGMENT_QUADS / shape->group_quads;
    for (int64_t j = 0; j < shape->groups; j += groups_at_once) {
        const int64_t quad0 = j * shape->group_quads;
        const int64_t quad1 = mq_min(quad0 + groups_at_once * shape->group_quads, shape->quads);
        const uint8_t *w = unpack(qweight, quad0, quad1, buffer);
        for (int64_t tile = tile0; tile < tile1; tile++) {
            WITH_CONSTANT_ROWS(mq_min(h, act->m - tile * h), groups_tile,
                               act->codes + (tile * shape->quads + quad0) * h * MQ_QUAD, h,
                               act->starts + (tile * shape->segments + j) * h,
                               act->scales + (tile * shape->groups + j) * h, w,
                               scales + j * MQ_PANEL, shape->group_quads, quad1 - quad0,
                               sums + (tile - tile0) * h * MQ_PANEL);
        }
    }
}
#endif
