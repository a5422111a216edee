/* The multiplication, once for all instruction sets with vectors, in tiles of tokens x one or
 * two panels of output channels. multiply_<isa>.c includes this header last. Defined before it
 * are
 *   by multiply_<isa>.c
 *     KERNEL(name)    name_<isa>
 *     FEW_ROWS        the most tokens for which weights are unpacked on the fly, not stored
 *     HOLD_SUMS       whether fp32 sums stay in registers between groups
 *     GROUPS_ONLY     (a macro, optional) leaves out multiply_salient
 *   by tiles.h        panels, part, load_packed and tile sizes
 *   by the family (multiply_x86.h, multiply_neon.h)
 *     set_floats      a float in all lanes
 *     fused           a * b + c, rounded once
 *     scaled          float(dots) * scales
 *     widen_scales    bf16 scales to fp32, one per lane
 *     add_ints        a + b
 *   by the family or multiply_<isa>.c
 *     unpack_vector   a vector of packed weights to the codes + 8 of its even and odd quad; the two
 *                     outputs may mix the quads in any way that segment_dots understands
 *     segment_dots    the exact int32 dot products of quads [quad0, quad1), at most a segment.
 *                     unpacked: the output of `unpack`, in which quads are counted; NULL: weights
 *                     are read from w.
 * Dot products are exact: `starts` (kernels.h) cancels the + 8 of the weights. */
#ifndef MQ_CPU_MULTIPLY_H
#define MQ_CPU_MULTIPLY_H

#include "tiles.h"

enum {
    SCALES_AHEAD = 1024, /* prefetch distance in bytes, for short groups' scales */
    SUMS_STRIDE = MQ_ROW_CHUNK * MQ_PANEL
};

_Static_assert((int)TILE_ROWS == (int)(BITS == 512 ? MQ_TILE_ROWS_512 : MQ_TILE_ROWS),
               "must equal tile_rows in dispatch.c");
_Static_assert(MQ_PANELS_AT_ONCE % PANELS == 0, "sums must have room for a pair of panels");

/* Calls tile(rows, ...) with a constant for rows, so that its loops unroll. */
#define CASE_OF_ROWS(n, most, tile, ...)     \
    case n:                                  \
        if (n <= most) tile(n, __VA_ARGS__); \
        break;
#define WITH_CONSTANT_ROWS(rows, most, tile, ...) \
    switch (rows) {                               \
        CASE_OF_ROWS(1, most, tile, __VA_ARGS__)  \
        CASE_OF_ROWS(2, most, tile, __VA_ARGS__)  \
        CASE_OF_ROWS(3, most, tile, __VA_ARGS__)  \
        CASE_OF_ROWS(4, most, tile, __VA_ARGS__)  \
        CASE_OF_ROWS(5, most, tile, __VA_ARGS__)  \
        CASE_OF_ROWS(6, most, tile, __VA_ARGS__)  \
        CASE_OF_ROWS(7, most, tile, __VA_ARGS__)  \
        CASE_OF_ROWS(8, most, tile, __VA_ARGS__)  \
        CASE_OF_ROWS(9, most, tile, __VA_ARGS__)  \
        CASE_OF_ROWS(10, most, tile, __VA_ARGS__) \
        CASE_OF_ROWS(11, most, tile, __VA_ARGS__) \
        CASE_OF_ROWS(12, most, tile, __VA_ARGS__) \
    }

/* ---- Vectors --------------------------------------------------------------------------------- */

TARGET static MQ_INLINE floats load_floats(const float *from) {
    floats v;
    memcpy(&v, from, sizeof v);
    return v;
}

/* Offset of vector v in an array [panels][stride]; the vectors of a panel are contiguous. */
static MQ_INLINE int64_t vector_at(int v, int64_t stride) {
    return v / PANEL_VECTORS * stride + v % PANEL_VECTORS * LANES;
}

TARGET static MQ_INLINE floats *sum_at(float *sums, int r, int v) {
    return (floats *)(void *)(sums + r * MQ_PANEL + vector_at(v, SUMS_STRIDE));
}

#if !defined(GROUPS_ONLY)
/* ---- Salient channels ------------------------------------------------------------------------ */

TARGET static MQ_INLINE void salient_tile(const int rows, const float *x, int64_t h, const float *w,
                                          int64_t channels, float *sums) {
    floats acc[TILE_ROWS][PANEL_VECTORS];
    EACH_ROW (r, rows)
        EACH_VECTOR (v, PANEL_VECTORS) acc[r][v] = *sum_at(sums, r, v);
    for (int64_t s = 0; s < channels; s++, x += h, w += MQ_PANEL) {
        floats weights[PANEL_VECTORS];
        EACH_VECTOR (v, PANEL_VECTORS) weights[v] = load_floats(w + v * LANES);
        EACH_ROW (r, rows) {
            const floats value = set_floats(x[r]);
            EACH_VECTOR (v, PANEL_VECTORS) acc[r][v] = fused(value, weights[v], acc[r][v]);
        }
    }
    EACH_ROW (r, rows)
        EACH_VECTOR (v, PANEL_VECTORS) *sum_at(sums, r, v) = acc[r][v];
}

TARGET void KERNEL(mq_multiply_salient)(const mq_activations *act, int64_t k_salient, int64_t tile0,
                                        int64_t tile1, int64_t s0, int64_t s1, const float *w,
                                        float *sums) {
    mq_assume_multiply_salient(act, k_salient, tile0, tile1, s0, s1, sums);
    for (int64_t tile = tile0; tile < tile1; tile++, sums += act->h * MQ_PANEL) {
        const float *x = act->salient + (tile * k_salient + s0) * act->h;
        WITH_CONSTANT_ROWS(mq_min(act->h, act->m - tile * act->h), TILE_ROWS, salient_tile, x,
                           act->h, w, s1 - s0, sums)
    }
}

#endif

/* ---- Groups ---------------------------------------------------------------------------------- */

/* Prefetches blocks [block0, block1) of all panels. Past the end of a panel, skips to the next
 * panels to be multiplied. */
static MQ_INLINE void prefetch(const panels *w, int64_t blocks, int64_t block0, int64_t block1) {
    for (int64_t block = block0; block < block1; block++) {
        const int64_t skip = block < blocks ? 0 : (PANELS - 1) * w->qweight_stride;
        for (int v = 0; v < VECTORS; v += PANEL_VECTORS)
            __builtin_prefetch(packed_at(w, block, v) + skip);
    }
}

/* Unpacks the blocks that hold quads [quad0, quad1). */
TARGET static MQ_INLINE void unpack(const panels *w, int64_t quad0, int64_t quad1,
                                    ints (*to)[VECTORS]) {
    for (int64_t block = quad0 / 2; block < mq_ceil_div(quad1, 2); block++, to += 2)
        EACH_VECTOR (v, VECTORS) unpack_vector(load_packed(w, block, v), &to[0][v], &to[1][v]);
}

static MQ_INLINE void next_segment(part *p, int64_t quads) {
    p->codes += quads * p->h * MQ_QUAD;
    p->starts += p->h;
}

/* The dot products of a group of any size, from packed weights. Advances p past the group. */
TARGET static MQ_INLINE void group_dots(const int rows, part *p, const panels *w, int64_t quad0,
                                        int64_t quad1, ints dots[PART_ROWS][VECTORS]) {
    int64_t end = mq_min(quad0 + MQ_SEGMENT_QUADS, quad1);
    segment_dots(rows, p, w, NULL, quad0, end, dots);
    next_segment(p, end - quad0);
    for (int64_t quad = end; quad < quad1; quad = end) {
        end = mq_min(quad + MQ_SEGMENT_QUADS, quad1);
        ints more[PART_ROWS][VECTORS];
        segment_dots(rows, p, w, NULL, quad, end, more);
        next_segment(p, end - quad);
        EACH_ROW (r, rows)
            EACH_VECTOR (v, VECTORS) dots[r][v] = add_ints(dots[r][v], more[r][v]);
    }
}

/* sums += dots * weight scale * activation scale. The sums are in `held` or, if that is NULL, in
 * p->sums. */
TARGET static MQ_INLINE void add_scaled(const int rows, const part *p, const panels *w,
                                        ints dots[PART_ROWS][VECTORS], floats (*held)[VECTORS]) {
    floats sw[VECTORS];
    EACH_VECTOR (v, VECTORS) sw[v] = widen_scales(w->scales + vector_at(v, w->scales_stride));
    EACH_ROW (r, rows) {
        const floats sa = set_floats(p->scales[r]);
        EACH_VECTOR (v, VECTORS) {
            floats *sum = held ? &held[r][v] : sum_at(p->sums, r, v);
            *sum = fused(scaled(dots[r][v], sw[v]), sa, *sum);
        }
    }
}

/* Adds the groups of quads [quad0, quad1). If unpacked is not NULL, each is at most a segment. */
TARGET static MQ_INLINE void add_groups(const int rows, part p, panels w, const ints *unpacked,
                                        int64_t group_quads, int64_t quad0, int64_t quad1) {
    floats held[PART_ROWS][VECTORS];
    if (HOLD_SUMS)
        EACH_ROW (r, rows)
            EACH_VECTOR (v, VECTORS) held[r][v] = *sum_at(p.sums, r, v);
    for (int64_t quad = quad0, end; quad < quad1; quad = end) {
        end = mq_min(quad + group_quads, quad1);
        ints dots[PART_ROWS][VECTORS];
        if (unpacked) {
            segment_dots(rows, &p, &w, unpacked, quad, end, dots);
            next_segment(&p, end - quad);
        } else {
            EACH_VECTOR (v, VECTORS)
                __builtin_prefetch((const char *)(w.scales + vector_at(v, w.scales_stride)) +
                                   SCALES_AHEAD);
            group_dots(rows, &p, &w, quad, end, dots);
        }
        add_scaled(rows, &p, &w, dots, HOLD_SUMS ? held : NULL);
        /* Hides the pointer from gcc, which would store sums twice to keep the next group's at
         * hand, and spill dots for that. */
        if (!HOLD_SUMS) __asm__("" : "+r"(p.sums));
        p.scales += p.h;
        w.scales += MQ_PANEL;
    }
    if (HOLD_SUMS)
        EACH_ROW (r, rows)
            EACH_VECTOR (v, VECTORS) *sum_at(p.sums, r, v) = held[r][v];
}

/* Multiplies one segment of a longer group: adds its dot products to totals, and scales them
 * after the last segment. */
TARGET static MQ_INLINE void add_segment(const int rows, part p, panels w, const ints *unpacked,
                                         int64_t quad0, int64_t quad1, int first, int last,
                                         ints (*totals)[VECTORS]) {
    ints dots[PART_ROWS][VECTORS];
    segment_dots(rows, &p, &w, unpacked, quad0, quad1, dots);
    EACH_ROW (r, rows)
        EACH_VECTOR (v, VECTORS) {
            if (!first) dots[r][v] = add_ints(dots[r][v], totals[r][v]);
            if (!last) totals[r][v] = dots[r][v];
        }
    if (last) add_scaled(rows, &p, &w, dots, NULL);
}

/* Runs the statement that follows for each part of tiles [tile0, tile1). The part has `rows`
 * tokens and starts at token `at` of its tile, row `row` of the sums. */
#define EACH_PART(act, tile, at, rows, row)                                       \
    for (int64_t tile = tile0; tile < tile1; tile++)                              \
        for (int64_t at = 0, row = (tile - tile0) * act->h, rows;                 \
             (rows = part_rows(mq_min(act->h, act->m - tile * act->h) - at)) > 0; \
             at += rows, row += rows)

/* The tokens of the next part if `left` remain in the tile. The parts of a tile differ by at
 * most one token. */
static MQ_INLINE int64_t part_rows(int64_t left) {
    return left ? mq_ceil_div(left, mq_ceil_div(left, PART_ROWS)) : 0;
}

/* The part that starts at token `at` of a tile, seen from quad quad0, segment `segment` and
 * group j. */
static MQ_INLINE part part_at(const mq_activations *act, const mq_shape *shape, int64_t tile,
                              int64_t at, int64_t quad0, int64_t segment, int64_t j, float *sums) {
    return (part){
        .h = act->h,
        .codes = act->codes + ((tile * shape->quads + quad0) * act->h + at) * MQ_QUAD,
        .starts = act->starts + (tile * shape->segments + segment) * act->h + at,
        .scales = act->scales + (tile * shape->groups + j) * act->h + at,
        .sums = sums,
    };
}

/* Prefetches one of `parts` shares of the segment after quad1, from block `ahead` on. Returns
 * the block after it. The prefetches are spread over the work on the current segment because few
 * loads can be in flight at once. */
static MQ_INLINE int64_t prefetch_part(const panels *w, const mq_shape *shape, int64_t ahead,
                                       int64_t quad1, int64_t parts) {
    const int64_t end = mq_min(ahead + mq_ceil_div(AHEAD, parts), quad1 / 2 + AHEAD);
    prefetch(w, shape->blocks, ahead, end);
    return end;
}

/* Groups longer than a segment, one by one. The totals stay in memory between segments. */
TARGET static void multiply_long_groups(const mq_activations *act, const mq_shape *shape,
                                        int64_t tile0, int64_t tile1, panels w, float *sums) {
    ints buffer[MQ_SEGMENT_QUADS + 2][VECTORS], totals[MQ_ROW_CHUNK][VECTORS];
    int64_t segment = 0;
    for (int64_t j = 0; j < shape->groups; j++, w.scales += MQ_PANEL) {
        const int64_t group0 = j * shape->group_quads;
        const int64_t group1 = mq_min(group0 + shape->group_quads, shape->quads);
        for (int64_t quad0 = group0, quad1; quad0 < group1; quad0 = quad1, segment++) {
            quad1 = mq_min(quad0 + MQ_SEGMENT_QUADS, group1);
            unpack(&w, quad0, quad1, buffer);
            int64_t ahead = quad1 / 2;
            EACH_PART (act, tile, at, rows, row) {
                ahead = prefetch_part(&w, shape, ahead, quad1, tile1 - tile0);
                const part p =
                    part_at(act, shape, tile, at, quad0, segment, j, sums + row * MQ_PANEL);
                WITH_CONSTANT_ROWS(rows, PART_ROWS, add_segment, p, w, buffer[0], quad0 % 2,
                                   quad0 % 2 + quad1 - quad0, quad0 == group0, quad1 == group1,
                                   totals + row)
            }
        }
    }
}

/* Groups of at most a segment. Weights are unpacked a segment at a time and used for all tokens. */
TARGET static void multiply_groups(const mq_activations *act, const mq_shape *shape, int64_t tile0,
                                   int64_t tile1, panels w, float *sums) {
    ints buffer[MQ_SEGMENT_QUADS + 2][VECTORS];
    const int64_t groups_at_once = MQ_SEGMENT_QUADS / shape->group_quads;
    for (int64_t j = 0; j < shape->groups; j += groups_at_once) {
        const int64_t quad0 = j * shape->group_quads;
        const int64_t quad1 = mq_min(quad0 + groups_at_once * shape->group_quads, shape->quads);
        unpack(&w, quad0, quad1, buffer);
        int64_t ahead = quad1 / 2;
        EACH_PART (act, tile, at, rows, row) {
            ahead = prefetch_part(&w, shape, ahead, quad1, tile1 - tile0);
            const part p = part_at(act, shape, tile, at, quad0, j, j, sums + row * MQ_PANEL);
            WITH_CONSTANT_ROWS(rows, PART_ROWS, add_groups, p, w, buffer[0], shape->group_quads,
                               quad0 % 2, quad0 % 2 + quad1 - quad0)
        }
        w.scales += groups_at_once * MQ_PANEL;
    }
}

/* Groups of any size for few tokens. Weights are unpacked on the fly. */
TARGET static void multiply_few(const mq_activations *act, const mq_shape *shape, int64_t tile0,
                                int64_t tile1, panels w, float *sums) {
    EACH_PART (act, tile, at, rows, row) {
        const part p = part_at(act, shape, tile, at, 0, 0, 0, sums + row * MQ_PANEL);
        WITH_CONSTANT_ROWS(rows, PART_ROWS, add_groups, p, w, NULL, shape->group_quads, 0,
                           shape->quads)
    }
}

TARGET void KERNEL(mq_multiply_groups)(const mq_activations *act, const mq_shape *shape,
                                       int64_t tile0, int64_t tile1, int64_t count,
                                       const uint8_t *qweight, const uint16_t *scales,
                                       float *sums) {
    mq_assume_multiply_groups(act, shape, tile0, tile1, count, sums);
    if (shape->groups == 0) return;
    const int64_t qweight_stride = shape->blocks * MQ_BLOCK_BYTES;
    const int64_t scales_stride = shape->groups * MQ_PANEL;
    for (int64_t panel = 0; panel < count; panel += PANELS, sums += PANELS * SUMS_STRIDE) {
        panels w = {qweight + panel * qweight_stride, scales + panel * scales_stride, 0, 0};
        if (panel + PANELS <= count) { /* a single last panel is paired with itself */
            w.qweight_stride = qweight_stride;
            w.scales_stride = scales_stride;
        }
        if (act->m <= FEW_ROWS)
            multiply_few(act, shape, tile0, tile1, w, sums);
        else if (shape->group_quads > MQ_SEGMENT_QUADS)
            multiply_long_groups(act, shape, tile0, tile1, w, sums);
        else
            multiply_groups(act, shape, tile0, tile1, w, sums);
    }
}

#endif
