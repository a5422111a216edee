/* Tiles of tokens x output channels: what a family's vector operations and the template (multiply.h)
 * both build on. The includer defines first
 *   BITS          the vector size
 *   TARGET        the instruction set's attribute
 *   floats, ints  the vector types
 *   ACCUMULATORS  registers for sums: enough to hide the latency of a product
 *   PANELS        panels multiplied together: each code is loaded once for all of them */
#ifndef MQ_CPU_TILES_H
#define MQ_CPU_TILES_H

#include <string.h>

#include "kernels.h"

/* Unrolled loops over a constant number of tokens, of vectors */
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
    TILE_ROWS = ACCUMULATORS / PANEL_VECTORS, /* tokens of a tile: x one panel's salient channels */
    PART_ROWS = ACCUMULATORS / VECTORS,       /* tokens of a part of it: x all panels' groups */
    AHEAD = MQ_SEGMENT_QUADS / 2 /* blocks from one being read to one being asked for */
};

/* The panels multiplied at once: the first one's arrays from some group on, and the distance to the
 * next one's. */
typedef struct panels {
    const uint8_t *qweight;
    const uint16_t *scales;
    int64_t qweight_stride, scales_stride;
} panels;

/* Some of the h tokens of a tile: the first one's entries in the workspace from some group on. */
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
