/* The public entries. Every argument is checked here, or in shape.c, and nowhere else. */
#include <math.h>

#include "ops.h"

#define REQUIRE(condition, status)       \
    do {                                 \
        if (!(condition)) return status; \
    } while (0)

#define TRY(call)                                   \
    do {                                            \
        mq_status try_status = (call);              \
        if (try_status != MQ_OK) return try_status; \
    } while (0)

static const mq_kernels *active_kernels(void) { return mq_kernels_of(mq_isa_active()); }

static int is_dtype(mq_dtype dtype) { return (unsigned)dtype <= MQ_BF16; }

static int is_clip(float clip) { return clip >= MQ_MIN_CLIP && clip <= 1; }

mq_status mq_channel_stats_update(mq_dtype dtype, const void *x, int64_t rows, int64_t stride,
                                  int64_t col0, int64_t col1, int64_t count,
                                  const mq_channel_stats *stats) {
    REQUIRE(is_dtype(dtype), MQ_INVALID_DTYPE);
    REQUIRE(rows >= 0 && 0 <= col0 && col0 <= col1 && stride >= col1, MQ_INVALID_SIZE);
    REQUIRE(mq_size_sum(count, rows) >= 0, MQ_INVALID_SIZE);
    if (rows == 0 || col0 == col1) return MQ_OK;
    REQUIRE(mq_matrix_fits(rows, col1, stride), MQ_INVALID_SIZE);
    REQUIRE(x && stats && stats->abs_max && stats->minimum && stats->abs_sum && stats->sq_sum &&
                stats->argmax,
            MQ_INVALID_POINTER);
    active_kernels()->channel_stats(dtype, x, rows, stride, col0, col1, count, stats);
    return MQ_OK;
}

mq_status mq_sort_keys(mq_sort_key key, int64_t k, int64_t count, const mq_channel_stats *stats,
                       double *keys) {
    REQUIRE((unsigned)key <= MQ_KEY_RMS, MQ_INVALID_KEY);
    REQUIRE(k >= 0 && count >= 0, MQ_INVALID_SIZE);
    if (k == 0) return MQ_OK;
    REQUIRE(mq_matrix_fits(1, k, k), MQ_INVALID_SIZE);
    REQUIRE(stats && keys, MQ_INVALID_POINTER);
    REQUIRE(key != MQ_KEY_ARGMAX || stats->argmax, MQ_INVALID_POINTER);
    REQUIRE(key != MQ_KEY_MAX || stats->abs_max, MQ_INVALID_POINTER);
    REQUIRE(key != MQ_KEY_MEAN3STD || (stats->abs_sum && stats->sq_sum), MQ_INVALID_POINTER);
    REQUIRE(key != MQ_KEY_RMS || stats->sq_sum, MQ_INVALID_POINTER);
    if (count == 0)
        for (int64_t i = 0; i < k; i++) keys[i] = 0;
    else
        active_kernels()->sort_keys(key, k, count, stats, keys);
    return MQ_OK;
}

mq_status mq_argsort(const double *keys, int64_t k, int descending, int64_t *indices,
                     int64_t *scratch) {
    REQUIRE(k >= 0, MQ_INVALID_SIZE);
    if (k == 0) return MQ_OK;
    REQUIRE(mq_matrix_fits(1, k, k), MQ_INVALID_SIZE);
    REQUIRE(keys && indices && scratch, MQ_INVALID_POINTER);
    mq_run_argsort(keys, k, descending, indices, scratch);
    return MQ_OK;
}

static mq_status check_format(const mq_group_format *format, mq_dtype dtype, int64_t rows,
                              int64_t cols) {
    REQUIRE(format, MQ_INVALID_POINTER);
    REQUIRE(format->group_size >= 1, MQ_INVALID_GROUP_SIZE);
    REQUIRE(format->num_bits >= 2 && format->num_bits <= 8, MQ_INVALID_BITS);
    REQUIRE((unsigned)format->act_format <= MQ_ACT_ZERO_POINT, MQ_INVALID_FORMAT);
    /* 8-bit codes minus a zero-point would not fit a byte */
    REQUIRE(format->act_format != MQ_ACT_ZERO_POINT || format->num_bits <= 7, MQ_INVALID_BITS);
    REQUIRE(is_clip(format->clip), MQ_INVALID_SCALE);
    REQUIRE(is_dtype(dtype), MQ_INVALID_DTYPE);
    REQUIRE(rows >= 0 && cols >= 0, MQ_INVALID_SIZE);
    return MQ_OK;
}

mq_status mq_group_quantize(const mq_group_format *format, mq_dtype dtype, const void *x,
                            int64_t rows, int64_t cols, int64_t stride, int8_t *q, float *scales) {
    TRY(check_format(format, dtype, rows, cols));
    REQUIRE(format->act_format != MQ_ACT_ZERO_POINT, MQ_INVALID_FORMAT);
    if (rows == 0 || cols == 0) return MQ_OK;
    REQUIRE(stride >= cols && mq_matrix_fits(rows, cols, stride), MQ_INVALID_SIZE);
    REQUIRE(x && q && scales, MQ_INVALID_POINTER);
    mq_run_group_quantize(active_kernels(), format, dtype, x, rows, cols, stride, q, scales);
    return MQ_OK;
}

mq_status mq_group_dequantize(const mq_group_format *format, const int8_t *q, const float *scales,
                              int64_t rows, int64_t cols, mq_dtype dtype, void *out) {
    TRY(check_format(format, dtype, rows, cols));
    REQUIRE(format->act_format != MQ_ACT_ZERO_POINT, MQ_INVALID_FORMAT);
    if (rows == 0 || cols == 0) return MQ_OK;
    REQUIRE(mq_matrix_fits(rows, cols, cols), MQ_INVALID_SIZE);
    REQUIRE(q && scales && out, MQ_INVALID_POINTER);
    mq_run_group_dequantize(active_kernels(), format, q, scales, rows, cols, dtype, out);
    return MQ_OK;
}

mq_status mq_group_fake_quantize(const mq_group_format *format, mq_dtype dtype, const void *x,
                                 int64_t rows, int64_t cols, int64_t stride, void *out) {
    TRY(check_format(format, dtype, rows, cols));
    if (rows == 0 || cols == 0) return MQ_OK;
    REQUIRE(stride >= cols && mq_matrix_fits(rows, cols, stride), MQ_INVALID_SIZE);
    REQUIRE(x && out, MQ_INVALID_POINTER);
    mq_run_group_fake_quantize(active_kernels(), format, dtype, x, rows, cols, stride, out);
    return MQ_OK;
}

static int is_rotation(int64_t rotation) {
    return rotation >= 0 && rotation <= MQ_MAX_ROTATION && (rotation & (rotation - 1)) == 0;
}

mq_status mq_group_hadamard(int64_t group_size, int64_t rotation, mq_dtype dtype, const void *x,
                            int64_t rows, int64_t cols, int64_t stride, void *out) {
    REQUIRE(group_size >= 1, MQ_INVALID_GROUP_SIZE);
    REQUIRE(is_rotation(rotation), MQ_INVALID_ROTATION);
    REQUIRE(is_dtype(dtype), MQ_INVALID_DTYPE);
    REQUIRE(rows >= 0 && cols >= 0, MQ_INVALID_SIZE);
    if (rows == 0 || cols == 0) return MQ_OK;
    REQUIRE(stride >= cols && mq_matrix_fits(rows, cols, stride), MQ_INVALID_SIZE);
    REQUIRE(x && out, MQ_INVALID_POINTER);
    mq_run_group_hadamard(active_kernels(), group_size, rotation, dtype, x, rows, cols, stride,
                          out);
    return MQ_OK;
}

mq_status mq_pack_nibbles(const int8_t *q, int64_t rows, int64_t cols, uint8_t *packed) {
    REQUIRE(rows >= 0 && cols >= 0, MQ_INVALID_SIZE);
    if (rows == 0 || cols == 0) return MQ_OK;
    REQUIRE(mq_matrix_fits(rows, cols, cols), MQ_INVALID_SIZE);
    REQUIRE(q && packed, MQ_INVALID_POINTER);
    const mq_kernels *kernels = active_kernels();
    for (int64_t r = 0; r < rows; r++)
        kernels->pack_nibbles(q + r * cols, cols, packed + r * mq_ceil_div(cols, 2));
    return MQ_OK;
}

mq_status mq_unpack_nibbles(const uint8_t *packed, int64_t rows, int64_t cols, int is_unsigned,
                            int8_t *q) {
    REQUIRE(rows >= 0 && cols >= 0, MQ_INVALID_SIZE);
    REQUIRE((unsigned)is_unsigned <= 1, MQ_INVALID_BITS);
    if (rows == 0 || cols == 0) return MQ_OK;
    REQUIRE(mq_matrix_fits(rows, cols, cols), MQ_INVALID_SIZE);
    REQUIRE(q && packed, MQ_INVALID_POINTER);
    const mq_kernels *kernels = active_kernels();
    for (int64_t r = 0; r < rows; r++)
        kernels->unpack_nibbles(packed + r * mq_ceil_div(cols, 2), cols, is_unsigned, q + r * cols);
    return MQ_OK;
}

/* Copies lin; replaces a perm that is the identity by NULL, so that kernels read channels in
 * place. */
static mq_status resolve_perm(const mq_linear *lin, mq_linear *resolved) {
    /* Flags for the whole array and a bound of the same type let the loop vectorize. */
    uint32_t wrong = 0, moved = 0;
    const int32_t last = (int32_t)mq_min(lin->k - 1, INT32_MAX);
    if (lin->perm)
        for (int64_t i = 0; i < lin->k; i++) {
            wrong |= (uint32_t)((lin->perm[i] < 0) | (lin->perm[i] > last));
            moved |= (uint32_t)lin->perm[i] ^ (uint32_t)i;
        }
    *resolved = *lin;
    if (!moved) resolved->perm = NULL;
    return wrong ? MQ_INVALID_PERM : MQ_OK;
}

/* Checks what pack, unpack, quantize and multiply all need. */
static mq_status check_layer(const mq_linear *lin, mq_shape *shape) {
    REQUIRE(lin, MQ_INVALID_POINTER);
    TRY(mq_shape_of(lin->n, lin->k, lin->k_salient, lin->group_size, shape));
    REQUIRE(lin->salient_dtype > MQ_F32 && lin->salient_dtype <= MQ_I8, MQ_INVALID_DTYPE);
    REQUIRE((unsigned)lin->isa < MQ_ISA_COUNT && mq_isa_supported(lin->isa), MQ_INVALID_ISA);
    REQUIRE(is_rotation(lin->rotation), MQ_INVALID_ROTATION);
    return MQ_OK;
}

static mq_status check_panels(const mq_shape *shape, int64_t panel0, int64_t panel1) {
    return 0 <= panel0 && panel0 <= panel1 && panel1 <= shape->panels ? MQ_OK : MQ_INVALID_SIZE;
}

mq_status mq_pack_weight(const mq_linear *lin, int q_max, mq_dtype dtype, const void *w,
                         int64_t stride, const float *group_scales, int64_t panel0, int64_t panel1,
                         uint8_t *qweight, uint16_t *scales, void *salient,
                         uint16_t *salient_scales) {
    mq_shape shape;
    TRY(check_layer(lin, &shape));
    REQUIRE(q_max >= 1 && q_max <= 7, MQ_INVALID_BITS);
    REQUIRE(is_dtype(dtype), MQ_INVALID_DTYPE);
    REQUIRE(stride >= lin->k, MQ_INVALID_SIZE);
    TRY(check_panels(&shape, panel0, panel1));
    if (panel0 == panel1 || lin->k == 0) return MQ_OK;
    REQUIRE(mq_matrix_fits(lin->n, lin->k, stride), MQ_INVALID_SIZE);
    REQUIRE(w && (!shape.groups || (qweight && scales)) && (!lin->k_salient || salient),
            MQ_INVALID_POINTER);
    REQUIRE(lin->salient_dtype != MQ_I8 || salient_scales, MQ_INVALID_POINTER);
    mq_linear resolved;
    TRY(resolve_perm(lin, &resolved));
    return mq_run_pack_weight(mq_kernels_of(lin->isa), &shape, &resolved, q_max, dtype, w, stride,
                              group_scales, panel0, panel1, qweight, scales, salient,
                              salient_scales);
}

/* Checks the arguments that both column loops take. */
static mq_status check_columns(int q_max, int64_t rows, int64_t cols, int64_t col0,
                               int64_t group_size, int64_t groups) {
    REQUIRE(q_max >= 1 && q_max <= 7, MQ_INVALID_BITS);
    REQUIRE(group_size >= 1, MQ_INVALID_GROUP_SIZE);
    REQUIRE(rows >= 0 && cols >= 0 && col0 >= 0, MQ_INVALID_SIZE);
    if (cols == 0) return MQ_OK;
    const int64_t last = mq_size_sum(col0, cols - 1);
    REQUIRE(last >= 0 && last / group_size < groups, MQ_INVALID_SIZE);
    REQUIRE(rows == 0 || (mq_matrix_fits(rows, cols, cols) && mq_matrix_fits(cols, cols, cols) &&
                          mq_matrix_fits(rows, groups, groups)),
            MQ_INVALID_SIZE);
    return MQ_OK;
}

mq_status mq_gptq_block(int q_max, int64_t rows, int64_t cols, int64_t col0, int64_t group_size,
                        int64_t groups, const float *scales, const float *u, float *w,
                        float *errors) {
    const mq_status status = check_columns(q_max, rows, cols, col0, group_size, groups);
    if (status != MQ_OK || rows == 0 || cols == 0) return status;
    REQUIRE(scales && u && w && errors, MQ_INVALID_POINTER);
    mq_run_gptq_block(q_max, rows, cols, col0, group_size, groups, scales, u, w, errors);
    return MQ_OK;
}

mq_status mq_descend_block(int q_max, int64_t rows, int64_t cols, int64_t col0, int64_t group_size,
                           int64_t groups, const float *scales, const float *h, float *gradient,
                           float *w) {
    const mq_status status = check_columns(q_max, rows, cols, col0, group_size, groups);
    if (status != MQ_OK || rows == 0 || cols == 0) return status;
    REQUIRE(scales && h && gradient && w, MQ_INVALID_POINTER);
    mq_run_descend_block(q_max, rows, cols, col0, group_size, groups, scales, h, gradient, w);
    return MQ_OK;
}

static mq_status check_weights(const mq_linear *lin, const mq_shape *shape) {
    REQUIRE(!shape->panels || !shape->groups || (lin->qweight && lin->scales), MQ_INVALID_POINTER);
    REQUIRE(!shape->panels || !lin->k_salient || lin->salient, MQ_INVALID_POINTER);
    REQUIRE(!shape->panels || lin->salient_dtype != MQ_I8 || lin->salient_scales,
            MQ_INVALID_POINTER);
    return MQ_OK;
}

mq_status mq_unpack_weight(const mq_linear *lin, int64_t panel0, int64_t panel1, float *w) {
    mq_shape shape;
    TRY(check_layer(lin, &shape));
    TRY(check_weights(lin, &shape));
    TRY(check_panels(&shape, panel0, panel1));
    if (panel0 == panel1 || lin->k == 0) return MQ_OK;
    REQUIRE(mq_matrix_fits(lin->n, lin->k, lin->k), MQ_INVALID_SIZE);
    REQUIRE(w, MQ_INVALID_POINTER);
    mq_linear resolved;
    TRY(resolve_perm(lin, &resolved));
    mq_run_unpack_rows(mq_kernels_of(lin->isa), &shape, &resolved, NULL, panel0 * MQ_PANEL,
                       mq_min(panel1 * MQ_PANEL, lin->n), w);
    return MQ_OK;
}

mq_status mq_unpack_rows(const mq_linear *lin, const int64_t *rows, int64_t count, float *w) {
    mq_shape shape;
    TRY(check_layer(lin, &shape));
    TRY(check_weights(lin, &shape));
    REQUIRE(count >= 0, MQ_INVALID_SIZE);
    REQUIRE(count == 0 || mq_matrix_fits(count, 1, 1), MQ_INVALID_SIZE);
    REQUIRE(count == 0 || lin->k == 0 || mq_matrix_fits(count, lin->k, lin->k), MQ_INVALID_SIZE);
    if (count == 0) return MQ_OK;
    REQUIRE(rows && (w || lin->k == 0), MQ_INVALID_POINTER);
    for (int64_t r = 0; r < count; r++) REQUIRE(rows[r] >= 0 && rows[r] < lin->n, MQ_INVALID_ROW);
    if (lin->k == 0) return MQ_OK;
    mq_linear resolved;
    TRY(resolve_perm(lin, &resolved));
    mq_run_unpack_rows(mq_kernels_of(lin->isa), &shape, &resolved, rows, 0, count, w);
    return MQ_OK;
}

/* Finds the workspace of m tokens: its bytes, and the tokens per tile. */
static mq_status lay_out(const mq_linear *lin, const mq_shape *shape, int64_t m, int64_t *bytes,
                         int64_t *tile_rows) {
    REQUIRE(m >= 0, MQ_INVALID_SIZE);
    const int64_t most = mq_kernels_of(lin->isa)->tile_rows;
    *tile_rows = m == 0 ? 1 : mq_min(m, most);
    *bytes = mq_workspace_bytes(shape, lin->k_salient, m, most);
    return *bytes >= 0 ? MQ_OK : MQ_INVALID_SIZE;
}

mq_status mq_linear_workspace_size(const mq_linear *lin, int64_t m, size_t *bytes) {
    mq_shape shape;
    int64_t size, tile_rows;
    TRY(check_layer(lin, &shape));
    REQUIRE(bytes, MQ_INVALID_POINTER);
    TRY(lay_out(lin, &shape, m, &size, &tile_rows));
    *bytes = (size_t)size;
    return MQ_OK;
}

mq_status mq_linear_tile_rows(const mq_linear *lin, int64_t m, int64_t *rows) {
    mq_shape shape;
    int64_t bytes;
    TRY(check_layer(lin, &shape));
    REQUIRE(rows, MQ_INVALID_POINTER);
    return lay_out(lin, &shape, m, &bytes, rows);
}

static mq_status check_activations(const mq_linear *lin) {
    REQUIRE((unsigned)lin->act_format <= MQ_ACT_ZERO_POINT, MQ_INVALID_FORMAT);
    REQUIRE(mq_act_bits_fit(lin->act_bits, lin->act_format), MQ_INVALID_BITS);
    /* weights are at least -8 */
    const int64_t group = mq_min(lin->group_size, lin->k - lin->k_salient);
    REQUIRE(group <= INT32_MAX / (8 << lin->act_bits), MQ_INVALID_GROUP_SIZE);
    return MQ_OK;
}

/* row0 must start a tile; row1 must end one or be m. */
static mq_status check_rows(const mq_linear *lin, const mq_shape *shape, int64_t m, int64_t row0,
                            int64_t row1) {
    int64_t bytes, h;
    TRY(lay_out(lin, shape, m, &bytes, &h));
    REQUIRE(0 <= row0 && row0 <= row1 && row1 <= m, MQ_INVALID_SIZE);
    REQUIRE(row0 % h == 0 && (row1 % h == 0 || row1 == m), MQ_INVALID_SIZE);
    return MQ_OK;
}

mq_status mq_linear_quantize(const mq_linear *lin, mq_dtype dtype, const void *x, int64_t stride,
                             int64_t m, int64_t row0, int64_t row1, void *workspace) {
    mq_shape shape;
    TRY(check_layer(lin, &shape));
    TRY(check_activations(lin));
    REQUIRE(is_clip(lin->clip), MQ_INVALID_SCALE);
    REQUIRE(is_dtype(dtype), MQ_INVALID_DTYPE);
    REQUIRE(stride >= lin->k, MQ_INVALID_SIZE);
    TRY(check_rows(lin, &shape, m, row0, row1));
    if (row0 == row1 || lin->k == 0) return MQ_OK;
    REQUIRE(mq_matrix_fits(m, lin->k, stride), MQ_INVALID_SIZE);
    REQUIRE(x && workspace, MQ_INVALID_POINTER);
    mq_linear resolved;
    TRY(resolve_perm(lin, &resolved));
    mq_run_linear_quantize(mq_kernels_of(lin->isa), &shape, &resolved, dtype, x, stride, m, row0,
                           row1, workspace);
    return MQ_OK;
}

mq_status mq_linear_multiply(const mq_linear *lin, int64_t m, int64_t row0, int64_t row1,
                             int64_t panel0, int64_t panel1, const void *workspace, mq_dtype dtype,
                             void *out, int64_t stride) {
    mq_shape shape;
    TRY(check_layer(lin, &shape));
    TRY(check_weights(lin, &shape));
    TRY(check_activations(lin));
    REQUIRE(is_dtype(dtype) && (!lin->bias || is_dtype(lin->bias_dtype)), MQ_INVALID_DTYPE);
    REQUIRE(stride >= lin->n, MQ_INVALID_SIZE);
    TRY(check_rows(lin, &shape, m, row0, row1));
    TRY(check_panels(&shape, panel0, panel1));
    if (row0 == row1 || panel0 == panel1) return MQ_OK;
    REQUIRE(mq_matrix_fits(m, lin->n, stride), MQ_INVALID_SIZE);
    REQUIRE(out && (lin->k == 0 || workspace), MQ_INVALID_POINTER);
    mq_run_linear_multiply(mq_kernels_of(lin->isa), &shape, lin, m, row0, row1, panel0, panel1,
                           workspace, dtype, out, stride);
    return MQ_OK;
}

static int is_nonnegative(float value) { return value >= 0 && value < HUGE_VALF; }

mq_status mq_rms_norm(const mq_norm *norm, mq_dtype dtype, const void *x, int64_t rows,
                      int64_t stride, void *out) {
    REQUIRE(norm, MQ_INVALID_POINTER);
    REQUIRE(is_dtype(dtype), MQ_INVALID_DTYPE);
    REQUIRE(rows >= 0 && norm->k >= 1 && stride >= norm->k, MQ_INVALID_SIZE);
    REQUIRE(is_nonnegative(norm->eps) && is_nonnegative(norm->offset), MQ_INVALID_SCALE);
    if (rows == 0) return MQ_OK;
    REQUIRE(mq_matrix_fits(rows, norm->k, stride), MQ_INVALID_SIZE);
    REQUIRE(x && norm->weight && out, MQ_INVALID_POINTER);
    mq_run_rms_norm(active_kernels(), norm, dtype, x, rows, stride, out);
    return MQ_OK;
}

mq_status mq_gated(mq_activation activation, mq_dtype dtype, const void *gate_up, int64_t rows,
                   int64_t n, void *out) {
    REQUIRE((unsigned)activation <= MQ_RELU, MQ_INVALID_FORMAT);
    REQUIRE(is_dtype(dtype), MQ_INVALID_DTYPE);
    REQUIRE(rows >= 0 && n >= 0, MQ_INVALID_SIZE);
    if (rows == 0 || n == 0) return MQ_OK;
    const int64_t columns = mq_size_product(n, 2);
    REQUIRE(columns >= 0 && mq_matrix_fits(rows, columns, columns), MQ_INVALID_SIZE);
    REQUIRE(gate_up && out, MQ_INVALID_POINTER);
    mq_run_gated(active_kernels(), activation, dtype, gate_up, rows, n, out);
    return MQ_OK;
}

mq_status mq_add(mq_dtype dtype, const void *a, const void *b, int64_t count, void *out) {
    REQUIRE(is_dtype(dtype), MQ_INVALID_DTYPE);
    REQUIRE(count >= 0, MQ_INVALID_SIZE);
    if (count == 0) return MQ_OK;
    REQUIRE(mq_matrix_fits(1, count, count), MQ_INVALID_SIZE);
    REQUIRE(a && b && out, MQ_INVALID_POINTER);
    mq_run_add(active_kernels(), dtype, a, b, count, out);
    return MQ_OK;
}

mq_status mq_rotary(mq_dtype dtype, const void *cos, const void *sin, int64_t heads,
                    int64_t head_dim, void *x) {
    REQUIRE(is_dtype(dtype), MQ_INVALID_DTYPE);
    REQUIRE(heads >= 0 && head_dim > 0 && head_dim <= MQ_BUFFER && head_dim % 2 == 0,
            MQ_INVALID_SIZE);
    if (heads == 0) return MQ_OK;
    REQUIRE(mq_matrix_fits(heads, head_dim, head_dim), MQ_INVALID_SIZE);
    REQUIRE(cos && sin && x, MQ_INVALID_POINTER);
    mq_run_rotary(active_kernels(), dtype, cos, sin, heads, head_dim, x);
    return MQ_OK;
}

mq_status mq_kv_block_sizes(int bits, int64_t group_size, mq_dtype dtype, int64_t head_dim,
                            size_t *key_bytes, size_t *value_bytes) {
    REQUIRE(bits == 4 || bits == 8, MQ_INVALID_BITS);
    REQUIRE(is_dtype(dtype), MQ_INVALID_DTYPE);
    REQUIRE(head_dim >= 1 && head_dim <= MQ_BUFFER, MQ_INVALID_SIZE);
    REQUIRE(group_size >= 1 && head_dim % group_size == 0, MQ_INVALID_GROUP_SIZE);
    REQUIRE(key_bytes && value_bytes, MQ_INVALID_POINTER);
    const size_t codes = (size_t)(MQ_KV_BLOCK * mq_kv_row_bytes(bits, head_dim));
    const size_t element = mq_dtype_size(dtype);
    *key_bytes = codes + 2 * (size_t)head_dim * element;
    *value_bytes = codes + 2 * MQ_KV_BLOCK * (size_t)(head_dim / group_size) * element;
    return MQ_OK;
}

/* Of one head's blocks after the other */
static mq_status check_stride(int64_t heads, int64_t count, size_t block_bytes, int64_t stride) {
    const int64_t head = mq_size_product(count, (int64_t)block_bytes);
    REQUIRE(head >= 0 && stride >= head && stride % 4 == 0, MQ_INVALID_SIZE);
    return mq_matrix_fits(heads, head, stride) ? MQ_OK : MQ_INVALID_SIZE;
}

static mq_status check_blocks(const mq_attention *of, mq_dtype dtype) {
    const mq_kv_blocks *blocks = &of->blocks;
    size_t key_bytes, value_bytes;
    REQUIRE(blocks->count >= 0, MQ_INVALID_SIZE);
    if (blocks->count == 0) return MQ_OK;
    TRY(mq_kv_block_sizes(blocks->bits, blocks->group_size, dtype, of->head_dim, &key_bytes,
                          &value_bytes));
    TRY(check_stride(of->kv_heads, blocks->count, key_bytes, blocks->key_stride));
    TRY(check_stride(of->kv_heads, blocks->count, value_bytes, blocks->value_stride));
    REQUIRE(blocks->keys && blocks->values, MQ_INVALID_POINTER);
    return MQ_OK;
}

mq_status mq_attend(const mq_attention *attention, mq_dtype dtype, const void *q, int64_t kv0,
                    int64_t kv1, float *scores, void *out) {
    REQUIRE(attention, MQ_INVALID_POINTER);
    const mq_attention *of = attention;
    REQUIRE(is_dtype(dtype), MQ_INVALID_DTYPE);
    REQUIRE(of->kv_heads >= 1 && of->heads >= 1 && of->heads % of->kv_heads == 0, MQ_INVALID_SIZE);
    REQUIRE(of->head_dim >= 1 && of->head_dim <= MQ_BUFFER && of->tokens >= 1, MQ_INVALID_SIZE);
    const int64_t head = mq_size_product(of->tokens, of->head_dim);
    REQUIRE(head >= 0 && of->head_stride >= head, MQ_INVALID_SIZE);
    REQUIRE(mq_matrix_fits(of->kv_heads, head, of->head_stride), MQ_INVALID_SIZE);
    TRY(check_blocks(of, dtype));
    const int64_t all = mq_size_sum(mq_size_product(of->blocks.count, MQ_KV_BLOCK), of->tokens);
    REQUIRE(all >= 0 && mq_matrix_fits(of->heads, all, all), MQ_INVALID_SIZE);
    REQUIRE(0 <= kv0 && kv0 <= kv1 && kv1 <= of->kv_heads, MQ_INVALID_SIZE);
    REQUIRE(of->scale > -HUGE_VALF && of->scale < HUGE_VALF, MQ_INVALID_SCALE);
    REQUIRE(of->keys && of->values && q && scores && out, MQ_INVALID_POINTER);
    mq_run_attend(active_kernels(), of, dtype, q, kv0, kv1, scores, out);
    return MQ_OK;
}
