/* A fuzz target over mixedquant.h. An input is read as the arguments of one call: mostly small and
 * valid ones, some wrong, some sizes at the end of int64_t. Then
 *   - arguments outside their ranges, and only these, are refused;
 *   - sizes are computed again in 128 bits: what is refused must not fit, and the reverse;
 *   - every array is a heap block of its exact size, so ASan sees each access outside it; an array
 *     too large to allocate is NULL;
 *   - every supported instruction set gives the scalar kernels' bits.
 *
 * fuzz_main.c runs it on random inputs. For libFuzzer, compile this file and the C files of csrc/cpu
 * with clang -g -O1 -fsanitize=fuzzer,address,undefined -DMQ_CHECK_ASSUMPTIONS. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/mixedquant.h"
#include "check.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef __int128 wide;

enum { MOST_BYTES = 1 << 20 };
static const wide TOO_LARGE = (wide)1 << 63;

/* ---- The input as a stream of choices; zeros after its end ---- */

static const uint8_t *input;
static size_t input_left;

static uint64_t take(size_t bytes) {
    uint64_t value = 0;
    const size_t n = bytes < input_left ? bytes : input_left;
    memcpy(&value, input, n);
    input += n, input_left -= n;
    return value;
}

static int64_t below(int64_t bound) { return bound > 0 ? (int64_t)(take(4) % (uint64_t)bound) : 0; }

static int rarely(void) { return take(1) % 32 == 31; }

/* A size that is negative, huge or INT64_MAX. */
static int64_t extreme_size(void) {
    static const int bits[] = {31, 32, 40, 58, 59, 60, 61, 62, 63};
    if (rarely()) return -(int64_t)(1 + take(4));
    const int64_t near = (int64_t)(((uint64_t)1 << bits[below(9)]) - 1);
    return near - below(40) + (near < INT64_MAX - 40 ? below(40) : 0);
}

/* A size in [0, most]; rarely an extreme one. */
static int64_t any_size(int64_t most) { return rarely() ? extreme_size() : below(most + 1); }

/* A stride for rows of `cols` elements; rarely too small or extreme. */
static int64_t any_stride(int64_t cols) {
    if (rarely()) return below(2) ? extreme_size() : below(cols < 4000 ? cols + 1 : 9);
    return cols < INT64_MAX - 3 ? cols + below(3) : cols;
}

static int small_choice(int valid) { return rarely() ? valid + (int)below(2) : (int)below(valid); }

static float any_clip(void) {
    static const float wrong[] = {0,      -0.0f,         -1, 0x1.fffffep-11f,
                                  1e-12f, 0x1.000002p0f, 2,  INFINITY};
    static const float right[] = {1, 0x1p-10f, 0.9f, 0.7f, 0.01f};
    if (!rarely()) return right[below(5)];
    const int64_t i = below(9);
    return i < 8 ? wrong[i] : NAN;
}

static int is_clip(float clip) { return clip >= 0x1p-10f && clip <= 1; }

/* ---- Arrays of exact size ---- */

typedef enum kind { F32 = MQ_F32, F16 = MQ_F16, BF16 = MQ_BF16, I8 = MQ_I8, I32, I64, F64 } kind;

typedef struct array {
    kind of;
    wide count;
    void *data; /* NULL if too large */
} array;

static void *blocks[64];
static int used;

static size_t bytes_of(kind of) {
    return of == I8 ? 1 : of == F16 || of == BF16 ? 2 : of == I64 || of == F64 ? 8 : 4;
}

static int too_large(wide count) { return count >= TOO_LARGE / 8; }

static array array_of(kind of, wide count) {
    array a = {of, count, NULL};
    if (count < 0 || count > MOST_BYTES / (wide)bytes_of(of)) return a;
    a.data = malloc((size_t)count * bytes_of(of));
    CHECK(a.data && used < 64);
    memset(a.data, 0x5a, (size_t)count * bytes_of(of));
    blocks[used++] = a.data;
    return a;
}

static uint32_t random_state;

static uint32_t random_bits(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state;
}

static float random_float(int special) {
    static const float odd[] = {0, -0.0f, 1e-45f, 1e-38f, 3e38f, -3e38f, INFINITY, NAN};
    const uint32_t bits = random_bits();
    if (special && bits % 16 == 0) return odd[bits / 16 % 8];
    return ((float)(bits >> 8) * 0x1p-23f - 1) * powf(10, (float)(bits % 9) - 4);
}

/* Random values. special: some are not finite, subnormal or huge. */
static array values(kind of, wide count, int special) {
    array a = array_of(of, count);
    random_state = (uint32_t)take(4) | 1;
    for (int64_t i = 0; a.data && i < (int64_t)count; i++) {
        const uint32_t bits = random_bits();
        const uint32_t small = of == F16 ? bits & 0xbfff : (bits & 0x80ff) | 0x3f00;
        switch (of) {
            case F32: ((float *)a.data)[i] = random_float(special); break;
            case F64: ((double *)a.data)[i] = random_float(special); break;
            case F16:
            case BF16: ((uint16_t *)a.data)[i] = (uint16_t)(special ? bits : small); break;
            case I8: ((int8_t *)a.data)[i] = (int8_t)bits; break;
            case I32: ((int32_t *)a.data)[i] = (int32_t)bits; break;
            case I64: ((int64_t *)a.data)[i] = (int64_t)bits; break;
        }
    }
    return a;
}

static int is_nan_at(kind of, const void *x, int64_t i) {
    if (of == F32) return isnan(((const float *)x)[i]);
    if (of == F64) return isnan(((const double *)x)[i]);
    const int magnitude = of == F16 || of == BF16 ? ((const uint16_t *)x)[i] & 0x7fff : 0;
    return magnitude > (of == F16 ? 0x7c00 : 0x7f80);
}

static void check_same(array a, array b) {
    const size_t size = bytes_of(a.of);
    CHECK(a.of == b.of && a.count == b.count);
    for (int64_t i = 0; a.data && i < (int64_t)a.count; i++) {
        const size_t at = (size_t)i * size;
        CHECK(memcmp((char *)a.data + at, (char *)b.data + at, size) == 0 ||
              (is_nan_at(a.of, a.data, i) && is_nan_at(a.of, b.data, i)));
    }
}

/* Elements from the first to the last of [rows][cols]. */
static wide extent(wide rows, wide cols, wide stride) {
    return rows > 0 && cols > 0 ? (rows - 1) * stride + cols : 0;
}

static wide ceil_div(wide a, wide b) { return (a + b - 1) / b; }

static const mq_isa *supported_isas(int *count) {
    static mq_isa isas[MQ_ISA_COUNT];
    *count = 0;
    for (int isa = 0; isa < MQ_ISA_COUNT; isa++)
        if (mq_isa_supported((mq_isa)isa)) isas[(*count)++] = (mq_isa)isa;
    return isas;
}

/* What a call must return, of which the sizes and then the pointers are checked last. valid:
 * everything but the arrays' sizes. empty: there is nothing to compute. */
static void check_status(mq_status status, int valid, int empty, int fits, int allocated) {
    if (!valid)
        CHECK(status != MQ_OK);
    else if (empty)
        CHECK(status == MQ_OK);
    else if (!fits)
        CHECK(status == MQ_INVALID_SIZE);
    else
        CHECK(status == (allocated ? MQ_OK : MQ_INVALID_POINTER));
}

/* ---- Groups and nibbles ---- */

static mq_status run_groups(int64_t entry, const mq_group_format *format, mq_dtype dtype, array x,
                            int64_t rows, int64_t cols, int64_t stride, int64_t rotation, array q,
                            array scales, array out) {
    switch (entry) {
        case 0:
            return mq_group_quantize(format, dtype, x.data, rows, cols, stride, q.data,
                                     scales.data);
        case 1:
            return mq_group_dequantize(format, x.data, scales.data, rows, cols, dtype, out.data);
        case 2: return mq_group_fake_quantize(format, dtype, x.data, rows, cols, stride, out.data);
        default:
            return mq_group_hadamard(format->group_size, rotation, dtype, x.data, rows, cols,
                                     stride, out.data);
    }
}

static void fuzz_groups(void) {
    const int64_t entry = below(4), rows = any_size(5), cols = any_size(below(2) ? 40 : 1200);
    const int64_t stride = entry == 1 ? cols : any_stride(cols);
    const mq_dtype dtype = (mq_dtype)small_choice(3);
    mq_group_format format = {any_size(below(2) ? 40 : 1500), small_choice(9),
                              (mq_act_format)small_choice(3), any_clip()};
    if (!rarely() && format.group_size == 0) format.group_size = 1;
    if (!rarely() && format.num_bits < 2) format.num_bits = 4;
    if (!rarely() && entry < 2) format.act_format = (mq_act_format)below(2);
    const int64_t rotation = rarely() ? any_size(600) : below(2) ? 1 << below(10) : 0;

    int valid = rows >= 0 && cols >= 0 && (unsigned)dtype <= MQ_BF16 && format.group_size >= 1;
    if (entry == 3)
        valid = valid && rotation >= 0 && rotation <= 512 && (rotation & (rotation - 1)) == 0;
    else
        valid = valid && format.num_bits >= 2 &&
                format.num_bits <= (format.act_format == MQ_ACT_ZERO_POINT ? 7 : 8) &&
                (unsigned)format.act_format <= (entry == 2 ? MQ_ACT_ZERO_POINT : MQ_ACT_UNSIGNED) &&
                is_clip(format.clip);
    const int empty = rows == 0 || cols == 0;
    if (!empty) valid = valid && stride >= cols;
    const wide read = valid ? extent(rows, cols, stride) : 0;
    const wide groups = valid ? ceil_div(cols, format.group_size) : 0;
    const wide written = valid ? (wide)rows * cols : 0, scale_count = valid ? rows * groups : 0;
    const kind of = valid ? (kind)dtype : F32;

    const array x = values(entry == 1 ? I8 : of, read, below(2) == 0);
    const array given = values(F32, entry == 1 ? scale_count : 0, below(2) == 0);
    const int allocated = x.data && given.data && (entry != 0 || scale_count < MOST_BYTES / 4);
    array first[3] = {{I8, 0, NULL}};
    int count;
    const mq_isa *isas = supported_isas(&count);
    for (int i = 0; i < count; i++) {
        const array q = array_of(I8, entry == 0 && allocated ? written : 0);
        const array scales = entry == 1 ? given : array_of(F32, entry == 0 ? scale_count : 0);
        const array out = array_of(of, entry > 0 && allocated ? written : 0);
        const int all = allocated && q.data && scales.data && out.data;
        CHECK(mq_isa_set(isas[i]) == MQ_OK);
        /* without memory for all arrays, none is given */
        const array none = {I8, 0, NULL};
        const mq_status status =
            run_groups(entry, &format, dtype, all ? x : none, rows, cols, stride, rotation,
                       all ? q : none, all ? scales : none, all ? out : none);
        check_status(status, valid, empty, !too_large(read), all);
        if (status != MQ_OK || !all) continue;
        if (i == 0) first[0] = q, first[1] = scales, first[2] = out;
        check_same(first[0], q), check_same(first[1], scales), check_same(first[2], out);
    }
}

static void fuzz_nibbles(void) {
    const int64_t rows = any_size(6), cols = any_size(200);
    const int is_unsigned = small_choice(2), valid = rows >= 0 && cols >= 0;
    const int empty = rows == 0 || cols == 0;
    const wide codes = valid ? (wide)rows * cols : 0;
    const array q = values(I8, codes, 0);
    array first[2] = {{I8, 0, NULL}};
    int count;
    const mq_isa *isas = supported_isas(&count);
    for (int i = 0; i < count; i++) {
        CHECK(mq_isa_set(isas[i]) == MQ_OK);
        /* without memory for the codes there is none for the others */
        const array packed = array_of(I8, !valid ? 0 : q.data ? rows * ceil_div(cols, 2) : -1);
        const array back = array_of(I8, q.data ? codes : -1);
        mq_status status = mq_pack_nibbles(q.data, rows, cols, packed.data);
        check_status(status, valid, empty, !too_large(codes), q.data != NULL);
        status = mq_unpack_nibbles(packed.data, rows, cols, is_unsigned, back.data);
        check_status(status, valid && is_unsigned <= 1, empty, !too_large(codes), q.data != NULL);
        if (status != MQ_OK || !q.data) continue;
        if (i == 0) first[0] = packed, first[1] = back;
        check_same(first[0], packed), check_same(first[1], back);
        for (int64_t e = 0; e < (int64_t)codes; e++) {
            const int code = ((int8_t *)q.data)[e] & 15, got = ((int8_t *)back.data)[e];
            CHECK(got == (is_unsigned || code < 8 ? code : code - 16));
        }
    }
}

/* ---- Statistics and sorting ---- */

static void fuzz_stats(void) {
    const mq_dtype dtype = (mq_dtype)small_choice(3);
    const int64_t rows = any_size(6), col0 = any_size(20),
                  col1 = rarely() ? any_size(90) : col0 + (col0 < 100 ? below(70) : 0);
    const int64_t stride = any_stride(col1);
    const int64_t seen = any_size(below(2) ? 2 : 1000);
    const int valid = (unsigned)dtype <= MQ_BF16 && rows >= 0 && col0 >= 0 && col0 <= col1 &&
                      stride >= col1 && seen >= 0 && (wide)seen + rows < TOO_LARGE;
    const int empty = rows == 0 || col0 == col1;
    const wide read = valid ? extent(rows, col1, stride) : 0, channels = valid ? col1 : 0;
    const array x = values(valid ? (kind)dtype : F32, read, below(2) == 0);
    static const kind kinds[5] = {F32, F32, F64, F64, I64};
    const mq_sort_key key = (mq_sort_key)small_choice(4);
    array first[6] = {{I8, 0, NULL}};
    int count;
    const mq_isa *isas = supported_isas(&count);
    for (int i = 0; i < count; i++) {
        CHECK(mq_isa_set(isas[i]) == MQ_OK);
        array fields[6];
        int all = x.data != NULL;
        for (int f = 0; f < 6; f++) {
            fields[f] = array_of(f < 5 ? kinds[f] : F64, channels);
            all = all && fields[f].data;
        }
        if (all)
            for (int f = 0; f < 5; f++)
                memset(fields[f].data, 0, (size_t)channels * bytes_of(kinds[f]));
        const mq_channel_stats stats = {fields[0].data, fields[1].data, fields[2].data,
                                        fields[3].data, fields[4].data};
        const mq_status status = mq_channel_stats_update(dtype, all ? x.data : NULL, rows, stride,
                                                         col0, col1, seen, &stats);
        check_status(status, valid, empty, !too_large(read), all);
        if (status != MQ_OK || !all) continue;
        const mq_status sorted = mq_sort_keys(key, col1, seen, &stats, fields[5].data);
        CHECK(sorted == ((unsigned)key <= MQ_KEY_RMS ? MQ_OK : MQ_INVALID_KEY));
        if (i == 0) memcpy(first, fields, sizeof first);
        for (int f = 0; f < 6; f++) check_same(first[f], fields[f]);
    }
}

static void fuzz_argsort(void) {
    const int64_t k = any_size(300);
    const int valid = k >= 0, descending = (int)below(2);
    const array keys = values(F64, valid ? k : 0, 1);
    const array indices = array_of(I64, valid ? k : 0), scratch = array_of(I64, valid ? k : 0);
    const mq_status status = mq_argsort(keys.data, k, descending, indices.data, scratch.data);
    check_status(status, valid, k == 0, !too_large(k), keys.data && indices.data && scratch.data);
    if (status != MQ_OK || k == 0) return;
    const double *x = keys.data;
    const int64_t *order = indices.data;
    for (int64_t i = 0; i + 1 < k; i++) {
        const double a = x[order[i]], b = x[order[i + 1]];
        CHECK(isnan(b) || (descending ? a >= b : a <= b));
        if (a == b || (isnan(a) && isnan(b))) CHECK(order[i] < order[i + 1]);
    }
}

/* ---- The column loops ---- */

static void fuzz_columns(void) {
    const int q_max = small_choice(8), descend = (int)below(2);
    const int64_t rows = any_size(5), cols = any_size(40), col0 = any_size(60);
    int64_t group_size = any_size(50);
    if (!rarely() && group_size == 0) group_size = 1;
    int valid = q_max >= 1 && q_max <= 7 && rows >= 0 && cols >= 0 && col0 >= 0 && group_size >= 1;
    wide needed = valid && cols > 0 ? ((wide)col0 + cols - 1) / group_size + 1 : 0;
    int64_t groups = rarely() ? any_size(70)
                              : (int64_t)(needed < TOO_LARGE - 9 ? needed + below(3) : needed / 2);
    /* the sum itself must fit, too */
    valid = valid && (cols == 0 || (wide)col0 + cols - 1 < TOO_LARGE) &&
            (cols == 0 || needed <= groups);
    const int empty = rows == 0 || cols == 0;
    const wide size = valid ? (wide)rows * cols : 0, square = valid ? (wide)cols * cols : 0;
    const wide scale_count = valid && !empty ? (wide)rows * groups : 0;
    const int special = below(2) == 0;
    const array scales = values(F32, scale_count, special), matrix = values(F32, square, special);
    const array w = values(F32, size, special), other = values(F32, size, special);
    const int all = scales.data && matrix.data && w.data && other.data;
    const mq_status status = descend
                                 ? mq_descend_block(q_max, rows, cols, col0, group_size, groups,
                                                    scales.data, matrix.data, other.data, w.data)
                                 : mq_gptq_block(q_max, rows, cols, col0, group_size, groups,
                                                 scales.data, matrix.data, w.data, other.data);
    check_status(status, valid, empty,
                 !too_large(size) && !too_large(square) && !too_large(scale_count), all);
    if (status != MQ_OK || empty) return;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < cols; i++) {
            const float value = ((float *)w.data)[r * cols + i];
            const float scale = fabsf(((float *)scales.data)[r * groups + (col0 + i) / group_size]);
            CHECK(isnan(value) || fabsf(value) <= (float)q_max * scale);
        }
}

/* ---- The linear ---- */

static array any_perm(int64_t k, int *valid) {
    const array perm = array_of(I32, k);
    int32_t *order = perm.data;
    if (!order) return perm;
    random_state = (uint32_t)take(4) | 1;
    for (int32_t i = 0; i < k; i++) order[i] = i;
    for (int64_t i = k - 1; i > 0; i--) {
        const int64_t j = random_bits() % (uint32_t)(i + 1);
        const int32_t swap = order[i];
        order[i] = order[j], order[j] = swap;
    }
    *valid = 1;
    if (k > 0 && rarely()) order[below(k)] = (int32_t)(below(2) ? k : -1 - below(9)), *valid = 0;
    return perm;
}

/* A range [*first, *last) of whole steps in [0, end]; rarely a wrong one. Returns whether it is
 * right. */
static int any_range(int64_t end, int64_t step, int64_t *first, int64_t *last) {
    const int64_t steps = end / step + (end % step != 0);
    *first = below(2) ? 0 : below(steps + 1);
    *last = below(2) ? steps : *first + below(steps - *first + 1);
    *first = *first == steps ? end : *first * step;
    *last = *last == steps ? end : *last * step;
    if (*first == end && end % step) *first -= end % step;
    if (rarely()) *first = any_size(end + 2);
    if (rarely()) *last = any_size(end + 2);
    return 0 <= *first && *first <= *last && *last <= end && *first % step == 0 &&
           (*last % step == 0 || *last == end);
}

static void fuzz_linear(void) {
    mq_linear lin = {.n = any_size(50),
                     .k = any_size(take(1) % 8 ? 150 : 2600),
                     .group_size = any_size(below(2) ? 48 : 2600),
                     .salient_dtype = (mq_dtype)(1 + small_choice(3)),
                     .rotation = rarely()   ? (int)below(600)
                                 : below(2) ? 1 << below(10)
                                            : 0,
                     .act_bits = 2 + small_choice(7),
                     .act_format = (mq_act_format)small_choice(3),
                     .per_token = (int)below(2),
                     .clip = any_clip()};
    lin.k_salient = rarely() ? any_size(200) : below(lin.k < 0 ? 0 : lin.k < 3000 ? lin.k + 1 : 9);
    if (!rarely() && lin.group_size == 0) lin.group_size = 1;
    int64_t m = any_size(50);
    const int q_max = small_choice(8), with_scales = rarely();
    const mq_dtype dtype = (mq_dtype)small_choice(3);

    const int is_shape = lin.n >= 0 && lin.k >= 0 && lin.k_salient >= 0 && lin.k_salient <= lin.k &&
                         lin.group_size >= 1;
    mq_shape shape = {0};
    const mq_status shaped = mq_shape_of(lin.n, lin.k, lin.k_salient, lin.group_size, &shape);
    if (!is_shape) CHECK(shaped != MQ_OK);
    if (!is_shape) return;
    const wide k4 = lin.k - lin.k_salient, panels = ceil_div(lin.n, MQ_PANEL);
    const wide groups = ceil_div(k4, lin.group_size);
    const wide group_quads = ceil_div(lin.group_size < k4 ? lin.group_size : k4, MQ_QUAD);
    const wide last = groups ? ceil_div(k4 - (groups - 1) * lin.group_size, MQ_QUAD) : 0;
    const wide quads = groups ? (groups - 1) * group_quads + last : 0;
    const wide row = 4 * (ceil_div(quads, 2) + groups + lin.k_salient + 1);
    const int fits = panels * MQ_PANEL * row < TOO_LARGE && row < TOO_LARGE &&
                     panels * MQ_PANEL < TOO_LARGE && (wide)lin.k * 4 < TOO_LARGE;
    CHECK(shaped == (fits ? MQ_OK : MQ_INVALID_SIZE));
    size_t bytes = 0;
    if (!fits) CHECK(mq_linear_workspace_size(&lin, 1, &bytes) == MQ_INVALID_SIZE);
    if (!fits) return;
    CHECK(shape.panels == panels && shape.groups == groups && shape.quads == quads);

    const int64_t w_stride = any_stride(lin.k);
    const int64_t x_stride = any_stride(lin.k);
    const int64_t y_stride = any_stride(lin.n);
    const int is_layer = (unsigned)lin.salient_dtype - 1 < MQ_I8 && lin.rotation >= 0 &&
                         lin.rotation <= 512 && (lin.rotation & (lin.rotation - 1)) == 0;
    const int is_dtype = (unsigned)dtype <= MQ_BF16;
    int is_perm = 1;
    lin.perm = below(4) ? any_perm(lin.k, &is_perm).data : NULL;
    const kind of = is_dtype ? (kind)dtype : F32;
    const kind salient_kind = is_layer ? (kind)lin.salient_dtype : I8;
    const array w = values(of, w_stride >= lin.k ? extent(lin.n, lin.k, w_stride) : 0, rarely());
    const array x =
        values(of, x_stride >= lin.k && m >= 0 ? extent(m, lin.k, x_stride) : 0, below(2) == 0);
    const array bias = values(of, lin.n, 0);
    const array given = values(F32, with_scales ? lin.n * groups : 0, 0);
    for (int64_t i = 0; given.data && i < (int64_t)given.count; i++)
        ((float *)given.data)[i] = fabsf(((float *)given.data)[i]);
    if (below(3)) lin.bias = bias.data;
    lin.bias_dtype = (mq_dtype)of;

    const int64_t layer_panels = shape.panels;
    int64_t panel0, panel1, row0 = 0, row1 = 0;
    const int is_panels = any_range(layer_panels, 1, &panel0, &panel1);
    const uint8_t *choices = input;
    const size_t choices_left = input_left;
    array first[5] = {{I8, 0, NULL}};
    int count, packed_once = 0, multiplied_once = 0;
    const mq_isa *isas = supported_isas(&count);
    for (int i = 0; i < count; i++) {
        lin.isa = isas[i];
        input = choices, input_left = choices_left; /* the same choices for each set */
        const array qweight = array_of(I8, panels * shape.blocks * MQ_BLOCK_BYTES);
        const array scales = array_of(BF16, panels * groups * MQ_PANEL);
        const array salient = array_of(salient_kind, panels * lin.k_salient * MQ_PANEL);
        const array salient_scales =
            array_of(BF16, lin.salient_dtype == MQ_I8 ? panels * MQ_PANEL : 0);
        const int has_weight = qweight.data && scales.data && salient.data && salient_scales.data;

        const int can_pack = w.data && given.data && has_weight;
        const int to_pack = is_layer && is_dtype && q_max >= 1 && q_max <= 7 && w_stride >= lin.k;
        /* packed whole: each part is packed alike, which check_kernels.c looks at */
        const mq_status packed = mq_pack_weight(
            &lin, q_max, dtype, can_pack ? w.data : NULL, w_stride, with_scales ? given.data : NULL,
            0, layer_panels, qweight.data, scales.data, salient.data, salient_scales.data);
        const int no_weight = lin.n == 0 || lin.k == 0;
        if (packed == MQ_NON_FINITE || packed == MQ_INVALID_SCALE)
            CHECK(to_pack && can_pack);
        else if (to_pack && can_pack && !no_weight && !is_perm)
            CHECK(packed == MQ_INVALID_PERM);
        else
            check_status(packed, to_pack, no_weight, !too_large(extent(lin.n, lin.k, w_stride)),
                         can_pack);
        const int is_packed = packed == MQ_OK && can_pack;
        if (i == 0) packed_once = is_packed;
        CHECK(is_packed == packed_once);
        lin.qweight = NULL, lin.scales = NULL, lin.salient = NULL, lin.salient_scales = NULL;
        if (is_packed && !no_weight) {
            lin.qweight = qweight.data, lin.scales = scales.data;
            lin.salient = salient.data, lin.salient_scales = salient_scales.data;
            const array unpacked = array_of(F32, (wide)lin.n * lin.k);
            const mq_status status = mq_unpack_weight(&lin, panel0, panel1, unpacked.data);
            check_status(status, is_panels, panel0 == panel1, 1, unpacked.data != NULL);
            const int64_t chosen[2] = {panel0, lin.n - 1};
            const array rows = array_of(F32, (wide)2 * lin.k);
            const mq_status read = mq_unpack_rows(&lin, chosen, 2, rows.data);
            if (chosen[0] < 0 || chosen[0] >= lin.n)
                CHECK(read == MQ_INVALID_ROW || !rows.data);
            else
                CHECK(read == (rows.data ? MQ_OK : MQ_INVALID_POINTER));
            if (i == 0)
                first[0] = qweight, first[1] = scales, first[2] = salient, first[3] = unpacked;
            check_same(first[0], qweight), check_same(first[1], scales);
            check_same(first[2], salient), check_same(first[3], unpacked);
        }
        if (!is_layer) continue;

        int64_t tile = 0;
        const mq_status sized = mq_linear_workspace_size(&lin, m, &bytes);
        const wide token = 4 * ((wide)shape.quads + shape.groups + shape.segments + lin.k_salient);
        /* up to 16 more tokens fill a tile, and up to 63 bytes follow each part */
        const int may_fit = m >= 0 && (m == 0 || token <= (TOO_LARGE - 1) / m);
        const int must_fit = m >= 0 && token <= (TOO_LARGE - 257) / ((wide)m + 16);
        if (sized == MQ_OK)
            CHECK(may_fit && bytes >= m * token && bytes < ((wide)m + 16) * token + 256);
        else
            CHECK(sized == MQ_INVALID_SIZE && !must_fit);
        CHECK(mq_linear_tile_rows(&lin, m, &tile) == sized);
        if (sized != MQ_OK) continue;
        const int is_rows = any_range(m, tile, &row0, &row1);
        void *space = NULL;
        if (bytes <= MOST_BYTES) {
            space = aligned_alloc(64, bytes); /* a multiple of 64 */
            CHECK(bytes % 64 == 0 && space && used < 64);
            blocks[used++] = space;
            memset(space, 0x5a, bytes);
        }
        const int has_activations = (unsigned)lin.act_format <= MQ_ACT_ZERO_POINT &&
                                    lin.act_bits >= 2 &&
                                    lin.act_bits <= (lin.act_format == MQ_ACT_SYMMETRIC ? 8 : 7) &&
                                    (lin.group_size <= INT32_MAX / (8 << lin.act_bits) ||
                                     lin.k - lin.k_salient <= INT32_MAX / (8 << lin.act_bits));
        const int to_quantize =
            has_activations && is_dtype && is_clip(lin.clip) && x_stride >= lin.k && is_rows;
        mq_status status =
            mq_linear_quantize(&lin, dtype, space ? x.data : NULL, x_stride, m, row0, row1, space);
        const int no_tokens = row0 == row1 || lin.k == 0;
        if (to_quantize && !no_tokens && space && x.data && !is_perm)
            CHECK(status == MQ_INVALID_PERM);
        else
            check_status(status, to_quantize, no_tokens, !too_large(extent(m, lin.k, x_stride)),
                         space && x.data);
        if (status != MQ_OK || !is_packed || no_weight) continue;
        const array y = array_of(of, y_stride >= lin.n ? extent(m, lin.n, y_stride) : 0);
        status =
            mq_linear_multiply(&lin, m, row0, row1, panel0, panel1, space, dtype, y.data, y_stride);
        check_status(status, is_panels && y_stride >= lin.n, row0 == row1 || panel0 == panel1,
                     !too_large(extent(m, lin.n, y_stride)), y.data != NULL);
        /* ranges of rows depend on the tile: compare those of all rows */
        if (status != MQ_OK || row0 != 0 || row1 != m) continue;
        if (!multiplied_once) first[4] = y, multiplied_once = 1;
        check_same(first[4], y);
    }
}

/* ---- Attention ---- */

static void fuzz_attend(void) {
    const mq_dtype dtype = (mq_dtype)small_choice(3);
    mq_attention of = {.kv_heads = any_size(3),
                       .head_dim = any_size(below(4) ? 40 : 520),
                       .tokens = any_size(40),
                       .scale = rarely() ? (below(2) ? INFINITY : NAN) : 0.2f};
    const int64_t group = 1 + below(9), is_multiple = !rarely();
    of.heads = of.kv_heads < 1000 ? of.kv_heads * group + !is_multiple : of.kv_heads;
    mq_kv_blocks *blocks = &of.blocks;
    blocks->bits = rarely() ? (int)below(10) : below(2) ? 4 : 8;
    blocks->count = below(3) ? any_size(4) : 0;
    blocks->group_size = any_size(9);
    if (!rarely() && of.head_dim > 0 && of.head_dim < 600)
        while (blocks->group_size < 1 || of.head_dim % blocks->group_size)
            blocks->group_size = 1 + below(of.head_dim);
    const int is_dtype = (unsigned)dtype <= MQ_BF16;
    const int is_head = of.head_dim >= 1 && of.head_dim <= 512;
    const int is_blocks =
        blocks->count == 0 || (blocks->count > 0 && (blocks->bits == 4 || blocks->bits == 8) &&
                               blocks->group_size >= 1 && of.head_dim % blocks->group_size == 0);
    int valid = is_dtype && is_head && is_blocks && of.kv_heads >= 1 && of.heads >= 1 &&
                of.heads % of.kv_heads == 0 && of.tokens >= 1 && isfinite(of.scale);
    const wide element = (wide)bytes_of(is_dtype ? (kind)dtype : F32);
    const wide d = is_head ? of.head_dim : 1, row = blocks->bits == 8 ? d : ceil_div(d, 2);
    const wide key_bytes = 32 * row + 2 * d * element;
    const wide value_bytes =
        valid && blocks->count ? 32 * row + 64 * (d / blocks->group_size) * element : key_bytes;
    size_t sizes[2];
    const mq_status sized = mq_kv_block_sizes(blocks->bits, blocks->group_size, dtype, of.head_dim,
                                              &sizes[0], &sizes[1]);
    if (valid && blocks->count)
        CHECK(sized == MQ_OK && sizes[0] == (size_t)key_bytes && sizes[1] == (size_t)value_bytes);
    const wide key_head = valid ? blocks->count * key_bytes : 0;
    const wide value_head = valid ? blocks->count * value_bytes : 0;
    const wide plain_head = valid ? (wide)of.tokens * d : 0;
    of.head_stride = rarely() ? any_size(900) : plain_head < TOO_LARGE ? (int64_t)plain_head : 8;
    const int64_t gap = 4 * below(3) + (rarely() ? 1 : 0);
    blocks->key_stride = key_head < TOO_LARGE - 16 ? (int64_t)key_head + gap : 4 * below(40);
    blocks->value_stride = value_head < TOO_LARGE - 16 ? (int64_t)value_head + 4 : 4 * below(40);
    const wide all = valid ? (wide)32 * blocks->count + of.tokens : 0;
    int fits = of.head_stride >= plain_head &&
               !too_large(extent(of.kv_heads, plain_head, of.head_stride)) &&
               !too_large((wide)of.heads * all);
    if (blocks->count)
        fits = fits && gap % 4 == 0 && blocks->key_stride >= key_head &&
               blocks->value_stride >= value_head &&
               !too_large(extent(of.kv_heads, key_head, blocks->key_stride)) &&
               !too_large(extent(of.kv_heads, value_head, blocks->value_stride));
    const kind of_kind = is_dtype ? (kind)dtype : F32;
    const int possible = valid && fits;
    const int special = below(4) == 0;
    const wide plain = possible ? extent(of.kv_heads, plain_head, of.head_stride) : 0;
    const array keys = values(of_kind, plain, special), vs = values(of_kind, plain, special);
    const array q = values(of_kind, possible ? (wide)of.heads * d : 0, special);
    const array key_blocks = values(
        I8, possible && blocks->count ? extent(of.kv_heads, key_head, blocks->key_stride) : 0, 0);
    const array value_blocks = values(
        I8, possible && blocks->count ? extent(of.kv_heads, value_head, blocks->value_stride) : 0,
        0);
    const array mask = values(I8, possible ? all : 0, 0);
    if (mask.data && all > 0) ((uint8_t *)mask.data)[0] = 1;
    int64_t kv0, kv1;
    const int is_range = any_range(possible ? of.kv_heads : 0, 1, &kv0, &kv1);
    const array scores = array_of(F32, possible ? of.heads / of.kv_heads * all : 0);
    int have = keys.data && vs.data && q.data && key_blocks.data && value_blocks.data &&
               mask.data && scores.data;
    of.mask = have && below(2) ? mask.data : NULL;
    array first = {I8, 0, NULL};
    int count;
    const mq_isa *isas = supported_isas(&count);
    for (int i = 0; i < count; i++) {
        CHECK(mq_isa_set(isas[i]) == MQ_OK);
        const array out = array_of(of_kind, have && possible ? (wide)of.heads * d : 0);
        const int all_data = have && out.data;
        if (out.data) memset(out.data, 0, (size_t)out.count * bytes_of(of_kind));
        of.keys = all_data ? keys.data : NULL, of.values = vs.data;
        blocks->keys = key_blocks.data, blocks->values = value_blocks.data;
        const mq_status status = mq_attend(&of, dtype, q.data, kv0, kv1, scores.data, out.data);
        if (!possible || !is_range)
            CHECK(status != MQ_OK);
        else
            CHECK(status == (all_data ? MQ_OK : MQ_INVALID_POINTER));
        if (status != MQ_OK) continue;
        if (i == 0) first = out;
        check_same(first, out);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static void (*const targets[])(void) = {fuzz_groups,  fuzz_nibbles, fuzz_stats,  fuzz_argsort,
                                            fuzz_columns, fuzz_linear,  fuzz_linear, fuzz_attend};
    input = data, input_left = size;
    targets[take(1) % (sizeof targets / sizeof *targets)]();
    while (used > 0) free(blocks[--used]);
    return 0;
}
