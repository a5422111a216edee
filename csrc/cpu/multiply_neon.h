/* The multiplication's vector operations on NEON: all that multiply.h needs except unpack_vector
 * and segment_dots. multiply_<isa>.c includes this header after TARGET and defines those two. */
#ifndef MQ_CPU_MULTIPLY_NEON_H
#define MQ_CPU_MULTIPLY_NEON_H

#include "neon.h"

#define BITS 128

typedef float32x4_t floats;
typedef int32x4_t ints;

enum { PANELS = 1, ACCUMULATORS = 24, HOLD_SUMS = 0 };

#include "tiles.h"

TARGET static MQ_INLINE floats set_floats(float x) { return vdupq_n_f32(x); }

TARGET static MQ_INLINE floats fused(floats a, floats b, floats c) { return vfmaq_f32(c, a, b); }

TARGET static MQ_INLINE floats scaled(ints dots, floats scales) {
    return vmulq_f32(vcvtq_f32_s32(dots), scales);
}

TARGET static MQ_INLINE floats widen_scales(const uint16_t *scales) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(scales), 16));
}

TARGET static MQ_INLINE ints add_ints(ints a, ints b) { return vaddq_s32(a, b); }

/* The codes + 8 of a vector's even and odd quad. At most 15, so they are valid signed bytes. */
TARGET static MQ_INLINE ints even_quad(ints packed) {
    return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(packed), vdupq_n_u8(15)));
}

TARGET static MQ_INLINE ints odd_quad(ints packed) {
    return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(packed), 4));
}

/* A quad's codes, one token per lane */
typedef struct quad_codes {
    ints tokens[2];
} quad_codes;

TARGET static MQ_INLINE ints load_lanes(const int rows, const int32_t *from) {
    switch (rows) {
        case 0: return vdupq_n_s32(0);
        case 1: return vld1q_dup_s32(from);
        case 2: return vcombine_s32(vld1_s32(from), vdup_n_s32(0));
        case 3: return vld1q_lane_s32(from + 2, vcombine_s32(vld1_s32(from), vdup_n_s32(0)), 2);
        default: return vld1q_s32(from);
    }
}

TARGET static MQ_INLINE quad_codes load_codes(const int rows, const int8_t *codes) {
    const int32_t *from = (const int32_t *)(const void *)codes;
    return (quad_codes){{load_lanes(rows, from), load_lanes(rows < 4 ? 0 : rows - 4, from + 4)}};
}

/* sums + a quad's weights times the codes of token r. Lane numbers must be constants. */
TARGET static MQ_INLINE ints add_products(ints sums, ints weights, quad_codes codes, int r) {
    const int8x16_t w = vreinterpretq_s8_s32(weights);
    const int8x16_t a = vreinterpretq_s8_s32(codes.tokens[r / 4]);
    switch (r % 4) {
        case 0: return vdotq_laneq_s32(sums, w, a, 0);
        case 1: return vdotq_laneq_s32(sums, w, a, 1);
        case 2: return vdotq_laneq_s32(sums, w, a, 2);
        default: return vdotq_laneq_s32(sums, w, a, 3);
    }
}

TARGET static MQ_INLINE void add_quad(const int rows, ints sums[PART_ROWS][VECTORS],
                                      const ints weights[VECTORS], const int8_t *codes) {
    const quad_codes a = load_codes(rows, codes);
    EACH_ROW (r, rows)
        EACH_VECTOR (v, VECTORS) sums[r][v] = add_products(sums[r][v], weights[v], a, r);
}

/* segment_dots for packed weights */
TARGET static MQ_INLINE void packed_dots(const int rows, const part *p, const panels *w,
                                         int64_t quad0, int64_t quad1,
                                         ints dots[PART_ROWS][VECTORS]) {
    const int64_t stride = p->h * MQ_QUAD;
    const int8_t *codes = p->codes;
    EACH_ROW (r, rows)
        EACH_VECTOR (v, VECTORS) dots[r][v] = vdupq_n_s32(p->starts[r]);
    for (int64_t block = quad0 / 2; block < mq_ceil_div(quad1, 2); block++) {
        ints even[VECTORS], odd[VECTORS];
        __builtin_prefetch(packed_at(w, block + AHEAD, 0));
        EACH_VECTOR (v, VECTORS) {
            const ints packed = load_packed(w, block, v);
            even[v] = even_quad(packed), odd[v] = odd_quad(packed);
        }
        if (2 * block >= quad0) add_quad(rows, dots, even, codes), codes += stride;
        if (2 * block + 1 < quad1) add_quad(rows, dots, odd, codes), codes += stride;
    }
}

#endif
