/* Tiles of tokens x output channels: the base of a family's vector operations and of the
 * template (multiply.h). The includer defines first
 *   BITS          the vector size
 *   TARGET        the instruction set's attribute
 *   floats, ints  the vector types
 *   ACCUMULATORS  registers for sums, enough to hide the latency of a product
 *   PANELS        panels multiplied together, so that each code is loaded once for all of them */
#ifndef MQ_CPU_TILES_H
#define MQ_CPU_TILES_H

#include <string.h>

#include "kernels.h"

/* Loops over a constant number of tokens or vectors, unrolled */
#if defined(__clang__)
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 12")
#endif
#define EACH_ROW(r, rows) UNROLLED for (int r = 0; r < rows; r++)
#define EACH_VECTOR(v, vectors) UNROLLED for (int v = 0; v < vectors; v++)

enum {
    LANES = BITS / 32,
    PANEL_VECTORS = MQ_PANEL / LANES,
    VECTORS = PANELS * PANEL_VECTORS,
    TILE_ROWS = ACCUMULATORS / PANEL_VECTORS, /* tokens per tile, for one panel's salient
                                               * channels */
    PART_ROWS = ACCUMULATORS / VECTORS,       /* tokens per part of a tile, for all panels'
                                               * groups */
    AHEAD = MQ_SEGMENT_QUADS / 2              /* prefetch distance in blocks */
};

/* The panels multiplied together: pointers into the first one, at some group, and strides to the
 * next. */
typedef struct panels {
    const uint8_t *qweight;
    const uint16_t *scales;
    int64_t qweight_stride, scales_stride;
} panels;

/* A part of a tile's h tokens: pointers to its first token's entries in the workspace, at some
 * group. */
typedef struct part {
    int64_t h;
    const int8_t *codes;
    const int32_t *starts;
    const float *scales;
    float *sums;
} part;

static MQ_INLINE const uint8_t *packed_at(const panels *w, int64_t block, int v) {
    return w->qweight + v / PANEL_VECTORS * w->qweight_stride + block * MQ_BLOCK_BYTES +
           v % PANEL_VECTORS * (int)sizeof(ints);
}

TARGET static MQ_INLINE ints load_packed(const panels *w, int64_t block, int v) {
    ints packed;
    memcpy(&packed, packed_at(w, block, v), sizeof packed);
    return packed;
}

#endif
