/* The multiplication's vector operations on x86, for 256 or 512 bits. multiply_<isa>.c includes
 * this header after vectors_x86.h, PANELS and
 *   accumulate   sums + a quad's weights + 8 (unsigned bytes) times codes (signed bytes)
 *   dots_of      a whole segment's sums to int32 dot products, or a span's
 *   SPAN_QUADS   (a macro, optional) the quads whose sums `accumulate` holds, if not a segment's.
 *                Then the dot products begin with the segment's start, not the sums. */
#ifndef MQ_CPU_MULTIPLY_X86_H
#define MQ_CPU_MULTIPLY_X86_H

#include "vectors_x86.h"

#define AND_INTS CONCAT(V(and_si), BITS)

enum { ACCUMULATORS = 12 };

#include "tiles.h"

TARGET static MQ_INLINE floats set_floats(float x) { return V(set1_ps)(x); }

TARGET static MQ_INLINE floats fused(floats a, floats b, floats c) { return V(fmadd_ps)(a, b, c); }

TARGET static MQ_INLINE floats scaled(ints dots, floats scales) {
    return V(mul_ps)(V(cvtepi32_ps)(dots), scales);
}

TARGET static MQ_INLINE floats widen_scales(const uint16_t *scales) {
#if BITS == 512
    const __m256i bits = _mm256_loadu_si256((const __m256i *)(const void *)scales);
#else
    const __m128i bits = _mm_loadu_si128((const __m128i *)(const void *)scales);
#endif
    return CONCAT(V(castsi), CONCAT(BITS, _ps))(V(slli_epi32)(V(cvtepu16_epi32)(bits), 16));
}

TARGET static MQ_INLINE ints add_ints(ints a, ints b) { return V(add_epi32)(a, b); }

TARGET static MQ_INLINE void unpack_vector(ints packed, ints *even, ints *odd) {
    *even = AND_INTS(packed, V(set1_epi8)(15));
    *odd = AND_INTS(V(srli_epi16)(packed, 4), V(set1_epi8)(15));
}

TARGET static MQ_INLINE void load_quad(const panels *w, const ints *unpacked, int64_t quad,
                                       ints weights[VECTORS]) {
    EACH_VECTOR (v, VECTORS) {
        if (unpacked) {
            weights[v] = unpacked[quad * VECTORS + v];
        } else {
            const __m128i shift = _mm_cvtsi32_si128((int)(quad % 2) * 4);
            const ints packed = load_packed(w, quad / 2, v);
            if (v % PANEL_VECTORS == 0) __builtin_prefetch(packed_at(w, quad / 2 + AHEAD, v));
            weights[v] = AND_INTS(V(srl_epi16)(packed, shift), V(set1_epi8)(15));
        }
    }
}

/* acc += the products of quads [quad0, quad1). Returns the codes of the quad after them. */
TARGET static MQ_INLINE const int8_t *add_quads(const int rows, const int8_t *codes, int64_t stride,
                                                const panels *w, const ints *unpacked,
                                                int64_t quad0, int64_t quad1,
                                                ints acc[PART_ROWS][VECTORS]) {
    for (int64_t quad = quad0; quad < quad1; quad++, codes += stride) {
        ints weights[VECTORS];
        load_quad(w, unpacked, quad, weights);
        EACH_ROW (r, rows) {
            int32_t four;
            memcpy(&four, codes + r * MQ_QUAD, sizeof four);
            const ints a = V(set1_epi32)(four);
            EACH_VECTOR (v, VECTORS) acc[r][v] = accumulate(acc[r][v], weights[v], a);
        }
    }
    return codes;
}

#if defined(SPAN_QUADS)
TARGET static MQ_INLINE void segment_dots(const int rows, const part *p, const panels *w,
                                          const ints *unpacked, int64_t quad0, int64_t quad1,
                                          ints dots[PART_ROWS][VECTORS]) {
    const int8_t *codes = p->codes;
    EACH_ROW (r, rows)
        EACH_VECTOR (v, VECTORS) dots[r][v] = V(set1_epi32)(p->starts[r]);
    for (int64_t quad = quad0, end; quad < quad1; quad = end) {
        end = mq_min(quad + SPAN_QUADS, quad1);
        ints acc[PART_ROWS][VECTORS];
        EACH_ROW (r, rows)
            EACH_VECTOR (v, VECTORS) acc[r][v] = V(set1_epi32)(0);
        codes = add_quads(rows, codes, p->h * MQ_QUAD, w, unpacked, quad, end, acc);
        EACH_ROW (r, rows)
            EACH_VECTOR (v, VECTORS) {
                MQ_IN_REGISTER(acc[r][v]);
                dots[r][v] = add_ints(dots[r][v], dots_of(acc[r][v]));
            }
    }
}
#else
TARGET static MQ_INLINE void segment_dots(const int rows, const part *p, const panels *w,
                                          const ints *unpacked, int64_t quad0, int64_t quad1,
                                          ints dots[PART_ROWS][VECTORS]) {
    ints acc[PART_ROWS][VECTORS];
    EACH_ROW (r, rows)
        EACH_VECTOR (v, VECTORS) acc[r][v] = V(set1_epi32)(p->starts[r]);
    add_quads(rows, p->codes, p->h * MQ_QUAD, w, unpacked, quad0, quad1, acc);
    EACH_ROW (r, rows)
        EACH_VECTOR (v, VECTORS) {
            MQ_IN_REGISTER(acc[r][v]);
            dots[r][v] = dots_of(acc[r][v]);
        }
}
#endif

#endif
