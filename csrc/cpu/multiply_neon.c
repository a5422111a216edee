/* sdot sums four products in int32: 4 output channels times one token's codes, taken from any
 * lane of a register. 24 accumulators, 4 weight registers and 2 registers of codes use 30 of the
 * 32 registers. */
#include "kernels.h"

#if defined(MQ_NEON)
#define TARGET MQ_NEON_DOT
#define KERNEL(name) name##_neon
enum { FEW_ROWS = 6 };

#include "multiply_neon.h"

TARGET static MQ_INLINE void unpack_vector(ints packed, ints *even, ints *odd) {
    *even = even_quad(packed), *odd = odd_quad(packed);
}

TARGET static MQ_INLINE void segment_dots(const int rows, const part *p, const panels *w,
                                          const ints *unpacked, int64_t quad0, int64_t quad1,
                                          ints dots[PART_ROWS][VECTORS]) {
    if (!unpacked) {
        packed_dots(rows, p, w, quad0, quad1, dots);
        return;
    }
    const int8_t *codes = p->codes;
    EACH_ROW (r, rows)
        EACH_VECTOR (v, VECTORS) dots[r][v] = vdupq_n_s32(p->starts[r]);
    for (int64_t quad = quad0; quad < quad1; quad++, codes += p->h * MQ_QUAD)
        add_quad(rows, dots, unpacked + quad * VECTORS, codes);
}

#include "multiply.h"
#endif
