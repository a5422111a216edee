/* smmla multiplies two tokens by two output channels over 8 input channels, twice the products
 * of sdot. Weights of a block are unpacked to 2 channels x 2 quads per register, and codes are
 * paired to 2 tokens x 2 quads. A single token would waste half the work, so sdot takes small
 * batches. */
#include "kernels.h"

#if defined(MQ_NEON)
#define TARGET MQ_NEON_I8MM
#define KERNEL(name) name##_neoni8mm
enum { FEW_ROWS = 2 };

#include "multiply_neon.h"

TARGET static MQ_INLINE void unpack_vector(ints packed, ints *even, ints *odd) {
    const ints first = even_quad(packed), second = odd_quad(packed);
    *even = vzip1q_s32(first, second); /* output channels 0 and 1 of 4 */
    *odd = vzip2q_s32(first, second);  /* 2 and 3 */
}

/* Sums of 2 tokens x 2 output channels: `low` for channels 0 and 1 of each vector's 4, `high`
 * for 2 and 3 */
typedef struct squares {
    ints low[PART_ROWS / 2][VECTORS], high[PART_ROWS / 2][VECTORS];
} squares;

TARGET static MQ_INLINE ints add_square(ints sums, ints codes, ints weights) {
    return vmmlaq_s32(sums, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(weights));
}

TARGET static MQ_INLINE void add_block(const int pairs, squares *sums, quad_codes even,
                                       quad_codes odd, const ints weights[2 * VECTORS]) {
    ints both[PART_ROWS / 2]; /* 2 tokens x 2 quads */
    EACH_ROW (i, pairs)
        both[i] = i % 2 ? vzip2q_s32(even.tokens[i / 2], odd.tokens[i / 2])
                        : vzip1q_s32(even.tokens[i / 2], odd.tokens[i / 2]);
    EACH_VECTOR (v, VECTORS) {
        EACH_ROW (i, pairs) sums->low[i][v] = add_square(sums->low[i][v], both[i], weights[v]);
        EACH_ROW (i, pairs)
            sums->high[i][v] = add_square(sums->high[i][v], both[i], weights[VECTORS + v]);
    }
}

TARGET static MQ_INLINE void segment_dots(const int rows, const part *p, const panels *w,
                                          const ints *unpacked, int64_t quad0, int64_t quad1,
                                          ints dots[PART_ROWS][VECTORS]) {
    if (!unpacked) {
        packed_dots(rows, p, w, quad0, quad1, dots);
        return;
    }
    const int pairs = (rows + 1) / 2;
    const int64_t stride = p->h * MQ_QUAD;
    const quad_codes zeros = {{vdupq_n_s32(0), vdupq_n_s32(0)}}; /* replaces a quad of another
                                                                  * group */
    const int8_t *codes = p->codes;
    squares sums;
    EACH_ROW (i, pairs) {
        const int32_t second = 2 * i + 1 < rows ? p->starts[2 * i + 1] : 0;
        const ints starts = vcombine_s32(vdup_n_s32(p->starts[2 * i]), vdup_n_s32(second));
        EACH_VECTOR (v, VECTORS) sums.low[i][v] = sums.high[i][v] = starts;
    }
    const ints *weights = unpacked + quad0 / 2 * 2 * VECTORS;
    int64_t quad = quad0;
    if (quad % 2) {
        add_block(pairs, &sums, zeros, load_codes(rows, codes), weights);
        quad++, codes += stride, weights += 2 * VECTORS;
    }
    for (; quad + 2 <= quad1; quad += 2, codes += 2 * stride, weights += 2 * VECTORS)
        add_block(pairs, &sums, load_codes(rows, codes), load_codes(rows, codes + stride), weights);
    if (quad < quad1) add_block(pairs, &sums, load_codes(rows, codes), zeros, weights);
    EACH_ROW (r, rows)
        EACH_VECTOR (v, VECTORS) {
            const int64x2_t a = vreinterpretq_s64_s32(sums.low[r / 2][v]);
            const int64x2_t b = vreinterpretq_s64_s32(sums.high[r / 2][v]);
            dots[r][v] = vreinterpretq_s32_s64(r % 2 ? vzip2q_s64(a, b) : vzip1q_s64(a, b));
        }
}

#include "multiply.h"
#endif
