/* Runs every entry of mixedquant.h on random small problems and compares every supported
 * instruction set with scalar, bit for bit. Each array ends at an inaccessible page.
 * tests/test_csrc.py builds it with ASan and UBSan. Usage: check_kernels SEED CASES. Prints "N
 * cases:" and the instruction sets; aborts on any fault. */
#define _GNU_SOURCE
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../csrc/cpu/kernels.h"
#include "check.h"

typedef struct guarded {
    void *map, *data;
    size_t mapped, bytes;
} guarded;

/* Allocates `bytes` writable bytes. The next byte, rounded up to `alignment`, is in a guard
 * page. */
static guarded guarded_alloc(size_t bytes, size_t alignment) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE),
           rounded = (bytes + alignment - 1) / alignment * alignment;
    size_t pages = (rounded + page - 1) / page * page;
    guarded g = {.mapped = pages + 2 * page, .bytes = bytes};
    g.map = mmap(NULL, g.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(g.map != MAP_FAILED);
    CHECK(mprotect(g.map, page, PROT_NONE) == 0);
    CHECK(mprotect((char *)g.map + page + pages, page, PROT_NONE) == 0);
    g.data = (char *)g.map + page + pages - rounded;
    memset(g.data, 0x5a, rounded);
    return g;
}

static void guarded_free(guarded *g) { CHECK(munmap(g->map, g->mapped) == 0); }

static int64_t below(int64_t bound) { return bound > 0 ? rand() % bound : 0; }

static size_t size_of(mq_dtype dtype) { return dtype == MQ_F32 ? 4 : 2; }

/* Random values. If `special`, some are zero, subnormal, huge, Inf or NaN. */
static guarded random_values(mq_dtype dtype, int64_t count, int special) {
    guarded g = guarded_alloc((size_t)count * size_of(dtype), size_of(dtype));
    for (int64_t i = 0; i < count; i++) {
        if (dtype == MQ_F32) {
            float odd[] = {0, -0.0f, 1e-45f, 1e-38f, 3e38f, INFINITY, NAN, -1.5f};
            float value = ((float)rand() / (float)RAND_MAX - 0.5f) * powf(10, (float)below(9) - 4);
            ((float *)g.data)[i] = special && below(20) == 0 ? odd[below(8)] : value;
        } else {
            /* any bits with a small exponent, or any bits at all */
            uint16_t any = (uint16_t)rand();
            uint16_t small = dtype == MQ_F16 ? (any & 0xbfff) : (uint16_t)((any & 0x80ff) | 0x3f00);
            ((uint16_t *)g.data)[i] = special && below(20) == 0 ? any : small;
        }
    }
    return g;
}

/* Sets all values to 1, or to -1. */
static void set_to_one(mq_dtype dtype, guarded *x, int is_negative) {
    const uint16_t one = dtype == MQ_F16 ? 0x3c00 : 0x3f80;
    for (size_t i = 0; i < x->bytes / size_of(dtype); i++)
        if (dtype == MQ_F32)
            ((float *)x->data)[i] = is_negative ? -1 : 1;
        else
            ((uint16_t *)x->data)[i] = (uint16_t)(is_negative ? one | 0x8000 : one);
}

static int is_nan_at(mq_dtype dtype, const void *x, int64_t i) {
    if (dtype == MQ_F32) return isnan(((const float *)x)[i]);
    uint16_t bits = ((const uint16_t *)x)[i] & 0x7fff;
    return bits > (dtype == MQ_F16 ? 0x7c00 : 0x7f80);
}

static void check_same(mq_dtype dtype, const void *a, const void *b, int64_t count) {
    size_t size = size_of(dtype);
    for (int64_t i = 0; i < count; i++) {
        int same = memcmp((const char *)a + (size_t)i * size, (const char *)b + (size_t)i * size,
                          size) == 0;
        CHECK(same || (is_nan_at(dtype, a, i) && is_nan_at(dtype, b, i)));
    }
}

static void check_bytes(const guarded *a, const guarded *b) {
    CHECK(a->bytes == b->bytes && memcmp(a->data, b->data, a->bytes) == 0);
}

static void check_groups(void) {
    mq_dtype dtype = (mq_dtype)below(3);
    int64_t rows = below(4), cols = below(300), stride = cols + below(3);
    mq_group_format format = {1 + below(below(2) ? 40 : 2000), (int)(2 + below(7)),
                              (mq_act_format)below(2), below(2) ? 1.0f : 0.8f};
    int64_t groups = cols / format.group_size + (cols % format.group_size != 0);
    int64_t read = rows ? (rows - 1) * stride + cols : 0;
    int64_t rotation = below(2) ? 1 << below(10) : 0;
    guarded x = random_values(dtype, read, 1), q[2], scales[2], out[2], fake[2], packed[2],
            codes[2];
    int64_t packed_bytes = rows * (cols / 2 + cols % 2);
    for (int i = 0; i < 2; i++) {
        q[i] = guarded_alloc((size_t)(rows * cols), 1);
        scales[i] = guarded_alloc((size_t)(rows * groups) * 4, 4);
        out[i] = guarded_alloc((size_t)(rows * cols) * size_of(dtype), size_of(dtype));
        fake[i] = guarded_alloc((size_t)(rows * cols) * size_of(dtype), size_of(dtype));
        packed[i] = guarded_alloc((size_t)packed_bytes, 1);
        codes[i] = guarded_alloc((size_t)(rows * cols), 1);
    }
    for (int isa = 0; isa < MQ_ISA_COUNT; isa++) {
        if (!mq_isa_supported((mq_isa)isa)) continue;
        CHECK(mq_isa_set((mq_isa)isa) == MQ_OK);
        int i = isa > 0;
        CHECK(mq_group_quantize(&format, dtype, x.data, rows, cols, stride, q[i].data,
                                scales[i].data) == MQ_OK);
        CHECK(mq_group_dequantize(&format, q[i].data, scales[i].data, rows, cols, dtype,
                                  out[i].data) == MQ_OK);
        CHECK(mq_group_fake_quantize(&format, dtype, x.data, rows, cols, stride, fake[i].data) ==
              MQ_OK);
        CHECK(mq_pack_nibbles(q[i].data, rows, cols, packed[i].data) == MQ_OK);
        CHECK(mq_unpack_nibbles(packed[i].data, rows, cols, format.act_format == MQ_ACT_UNSIGNED,
                                codes[i].data) == MQ_OK);
        check_bytes(&q[i], &q[0]);
        check_same(MQ_F32, scales[i].data, scales[0].data, rows * groups);
        check_same(dtype, out[i].data, out[0].data, rows * cols);
        check_same(dtype, fake[i].data, out[0].data, rows * cols);
        check_bytes(&packed[i], &packed[0]);
        check_bytes(&codes[i], &codes[0]);
        CHECK(mq_group_hadamard(format.group_size, rotation, dtype, x.data, rows, cols, stride,
                                fake[i].data) == MQ_OK);
        check_same(dtype, fake[i].data, fake[0].data, rows * cols);
    }
    guarded_free(&x);
    for (int i = 0; i < 2; i++) {
        guarded_free(&q[i]), guarded_free(&scales[i]), guarded_free(&out[i]);
        guarded_free(&fake[i]), guarded_free(&packed[i]), guarded_free(&codes[i]);
    }
}

static void check_stats(void) {
    mq_dtype dtype = (mq_dtype)below(3);
    int64_t rows = below(5), cols = below(70), stride = cols + below(3);
    guarded x = random_values(dtype, rows ? (rows - 1) * stride + cols : 0, 0);
    guarded fields[2][5], keys[2], indices = guarded_alloc((size_t)cols * 8, 8);
    guarded scratch = guarded_alloc((size_t)cols * 8, 8);
    const size_t sizes[5] = {4, 4, 8, 8, 8};
    for (int i = 0; i < 2; i++) {
        for (int f = 0; f < 5; f++) fields[i][f] = guarded_alloc((size_t)cols * sizes[f], sizes[f]);
        keys[i] = guarded_alloc((size_t)cols * 8, 8);
    }
    for (int isa = 0; isa < MQ_ISA_COUNT; isa++) {
        if (!mq_isa_supported((mq_isa)isa)) continue;
        CHECK(mq_isa_set((mq_isa)isa) == MQ_OK);
        int i = isa > 0;
        for (int f = 0; f < 5; f++) memset(fields[i][f].data, 0, fields[i][f].bytes);
        for (int64_t c = 0; c < cols; c++) ((float *)fields[i][1].data)[c] = INFINITY;
        mq_channel_stats stats = {fields[i][0].data, fields[i][1].data, fields[i][2].data,
                                  fields[i][3].data, fields[i][4].data};
        int64_t split = below(cols + 1);
        CHECK(mq_channel_stats_update(dtype, x.data, rows, stride, 0, split, 7, &stats) == MQ_OK);
        CHECK(mq_channel_stats_update(dtype, x.data, rows, stride, split, cols, 7, &stats) ==
              MQ_OK);
        for (int f = 0; f < 5; f++) check_bytes(&fields[i][f], &fields[0][f]);
        for (int key = MQ_KEY_ARGMAX; key <= MQ_KEY_RMS; key++) {
            CHECK(mq_sort_keys((mq_sort_key)key, cols, rows, &stats, keys[i].data) == MQ_OK);
            mq_isa_set(MQ_ISA_SCALAR);
            CHECK(mq_sort_keys((mq_sort_key)key, cols, rows, &stats, keys[0].data) == MQ_OK);
            mq_isa_set((mq_isa)isa);
            check_bytes(&keys[i], &keys[0]);
            CHECK(mq_argsort(keys[i].data, cols, key % 2, indices.data, scratch.data) == MQ_OK);
        }
    }
    guarded_free(&x), guarded_free(&indices), guarded_free(&scratch);
    for (int i = 0; i < 2; i++) {
        for (int f = 0; f < 5; f++) guarded_free(&fields[i][f]);
        guarded_free(&keys[i]);
    }
}

static void check_linear(void) {
    mq_dtype dtype = (mq_dtype)below(3);
    int64_t m = below(60), n = below(50), k = below(below(8) ? 150 : 2600);
    mq_linear lin = {.n = n,
                     .k = k,
                     .k_salient = below(3) ? below(k / 4 + 1) : below(k + 1),
                     .group_size = 1 + below(below(2) ? 48 : 2600),
                     .salient_dtype = (mq_dtype)(MQ_F16 + below(3)),
                     .rotation = below(2) ? 1 << below(10) : 0,
                     .act_format = (mq_act_format)below(3),
                     .per_token = (int)below(2),
                     .clip = below(2) ? 1.0f : 0.7f};
    lin.act_bits = (int)(2 + below(lin.act_format == MQ_ACT_SYMMETRIC ? 7 : 6));
    mq_shape shape;
    CHECK(mq_shape_of(n, k, lin.k_salient, lin.group_size, &shape) == MQ_OK);
    int64_t x_stride = k + below(3), y_stride = n + below(3), w_stride = k + below(3);
    guarded x = random_values(dtype, m ? (m - 1) * x_stride + k : 0, below(2) == 0);
    /* all codes at an end of their range, for the largest sums */
    const int is_extreme = below(4) == 0, weights = below(2) ? 0xff : 0;
    if (is_extreme) set_to_one(dtype, &x, below(2) == 0);
    guarded w = random_values(dtype, n ? (n - 1) * w_stride + k : 0, 0);
    guarded bias = random_values(dtype, n, 0), perm = guarded_alloc((size_t)k * 4, 4);
    int32_t *order = perm.data;
    for (int32_t i = 0; i < k; i++) order[i] = i;
    for (int64_t i = k - 1; i > 0; i--) {
        int64_t j = below(i + 1);
        int32_t swap = order[i];
        order[i] = order[j], order[j] = swap;
    }
    lin.perm = below(4) ? order : NULL;
    lin.bias = below(3) ? bias.data : NULL;
    lin.bias_dtype = dtype;
    guarded qweight[2], scales[2], salient[2], salient_scales[2], y[2], unpacked[2];
    size_t salient_size = lin.salient_dtype == MQ_I8 ? 1 : 2;
    size_t salient_scale_bytes = lin.salient_dtype == MQ_I8 ? (size_t)shape.panels * 32 : 0;
    for (int i = 0; i < 2; i++) {
        qweight[i] = guarded_alloc((size_t)(shape.panels * shape.blocks * MQ_BLOCK_BYTES), 1);
        scales[i] = guarded_alloc((size_t)(shape.panels * shape.groups * MQ_PANEL) * 2, 2);
        salient[i] = guarded_alloc((size_t)(shape.panels * lin.k_salient * MQ_PANEL) * salient_size,
                                   salient_size);
        salient_scales[i] = guarded_alloc(salient_scale_bytes, 2);
        y[i] = guarded_alloc((size_t)(m ? (m - 1) * y_stride + n : 0) * size_of(dtype),
                             size_of(dtype));
        unpacked[i] = guarded_alloc((size_t)(n * k) * 4, 4);
    }
    for (int isa = 0; isa < MQ_ISA_COUNT; isa++) {
        lin.isa = (mq_isa)isa;
        if (!mq_isa_supported(lin.isa)) continue;
        int i = isa > 0;
        int64_t middle = below(shape.panels + 1), tile;
        CHECK(mq_pack_weight(&lin, 7, dtype, w.data, w_stride, NULL, 0, middle, qweight[i].data,
                             scales[i].data, salient[i].data, salient_scales[i].data) == MQ_OK);
        CHECK(mq_pack_weight(&lin, 7, dtype, w.data, w_stride, NULL, middle, shape.panels,
                             qweight[i].data, scales[i].data, salient[i].data,
                             salient_scales[i].data) == MQ_OK);
        if (is_extreme) memset(qweight[i].data, weights, qweight[i].bytes);
        lin.qweight = qweight[i].data, lin.scales = scales[i].data, lin.salient = salient[i].data;
        lin.salient_scales = salient_scales[i].data;
        CHECK(mq_unpack_weight(&lin, 0, shape.panels, unpacked[i].data) == MQ_OK);
        const int64_t chosen[2] = {n - 1, n ? below(n) : 0};
        guarded rows = guarded_alloc((size_t)(2 * k) * 4, 4);
        CHECK(mq_unpack_rows(&lin, chosen, 2, rows.data) == (n ? MQ_OK : MQ_INVALID_ROW));
        for (int64_t r = 0; n && k && r < 2; r++)
            CHECK(memcmp((float *)rows.data + r * k, (float *)unpacked[i].data + chosen[r] * k,
                         (size_t)k * 4) == 0);
        guarded_free(&rows);
        size_t bytes;
        CHECK(mq_linear_workspace_size(&lin, m, &bytes) == MQ_OK);
        CHECK(mq_linear_tile_rows(&lin, m, &tile) == MQ_OK);
        guarded workspace = guarded_alloc(bytes, 64), whole = guarded_alloc(bytes, 64);
        memset(workspace.data, 1, bytes), memset(whole.data, 2, bytes);
        int64_t split = below(m / tile + 1) * tile;
        CHECK(mq_linear_quantize(&lin, dtype, x.data, x_stride, m, split, m, workspace.data) ==
              MQ_OK);
        CHECK(mq_linear_quantize(&lin, dtype, x.data, x_stride, m, 0, split, workspace.data) ==
              MQ_OK);
        CHECK(mq_linear_quantize(&lin, dtype, x.data, x_stride, m, 0, m, whole.data) == MQ_OK);
        CHECK(memcmp(workspace.data, whole.data, bytes) == 0);
        CHECK(mq_linear_multiply(&lin, m, split, m, 0, shape.panels, workspace.data, dtype,
                                 y[i].data, y_stride) == MQ_OK);
        CHECK(mq_linear_multiply(&lin, m, 0, split, middle, shape.panels, workspace.data, dtype,
                                 y[i].data, y_stride) == MQ_OK);
        CHECK(mq_linear_multiply(&lin, m, 0, split, 0, middle, workspace.data, dtype, y[i].data,
                                 y_stride) == MQ_OK);
        guarded_free(&workspace), guarded_free(&whole);
        check_bytes(&qweight[i], &qweight[0]);
        check_bytes(&scales[i], &scales[0]);
        check_bytes(&salient[i], &salient[0]);
        check_bytes(&salient_scales[i], &salient_scales[0]);
        check_bytes(&unpacked[i], &unpacked[0]);
        check_same(dtype, y[i].data, y[0].data, m ? (m - 1) * y_stride + n : 0);
    }
    guarded_free(&x), guarded_free(&w), guarded_free(&bias), guarded_free(&perm);
    for (int i = 0; i < 2; i++) {
        guarded_free(&qweight[i]), guarded_free(&scales[i]), guarded_free(&salient[i]);
        guarded_free(&salient_scales[i]);
        guarded_free(&y[i]), guarded_free(&unpacked[i]);
    }
}

/* A token's attention to blocks and other tokens, against the same of dequantized values. */
static void check_blocks(void) {
    const mq_dtype dtype = (mq_dtype)below(3);
    const int bits = below(2) ? 4 : 8;
    const int64_t group_size = 1 + below(9), d = group_size * (1 + below(below(16) ? 4 : 50));
    const int64_t kv_heads = 1 + below(3), heads = kv_heads * (1 + below(below(4) ? 3 : 10));
    const int64_t count = 1 + below(2), tokens = 1 + below(9), all = 32 * count + tokens;
    size_t bytes[2];
    CHECK(mq_kv_block_sizes(bits, group_size, dtype, d, &bytes[0], &bytes[1]) == MQ_OK);
    const int64_t row = bits == 8 ? d : (d + 1) / 2, gap = 4 * below(3);
    guarded q = random_values(dtype, heads * d, 0), plain[2], blocks[2], wide[2];
    for (int p = 0; p < 2; p++) {
        const int64_t head = count * (int64_t)bytes[p], stride = head + gap;
        plain[p] = random_values(dtype, kv_heads * tokens * d, 0);
        blocks[p] = guarded_alloc((size_t)((kv_heads - 1) * stride + head), 4);
        wide[p] = guarded_alloc((size_t)(kv_heads * all * d) * 4, 4);
        const int64_t scales = p ? 32 * d / group_size : d;
        for (int64_t h = 0; h < kv_heads; h++) {
            float *to = (float *)wide[p].data + h * all * d;
            for (int64_t b = 0; b < count; b++) {
                uint8_t *block = (uint8_t *)blocks[p].data + h * stride + b * (int64_t)bytes[p];
                for (int64_t i = 0; i < 32 * row; i++) block[i] = (uint8_t)below(256);
                guarded values = random_values(dtype, 2 * scales, 0);
                memcpy(block + 32 * row, values.data, (size_t)(2 * scales) * size_of(dtype));
                for (int64_t t = 0; t < 32; t++)
                    for (int64_t i = 0; i < d; i++, to++) {
                        const int64_t s = p ? t * (d / group_size) + i / group_size : i;
                        const uint8_t *codes = block + t * row;
                        const int code = bits == 8 ? codes[i]
                                         : i < row ? codes[i] & 15
                                                   : codes[i - row] >> 4;
                        const float product = (float)code * mq_load(dtype, values.data, s);
                        *to = product + mq_load(dtype, values.data, scales + s);
                    }
                guarded_free(&values);
            }
            for (int64_t i = 0; i < tokens * d; i++)
                *to++ = mq_load(dtype, plain[p].data, h * tokens * d + i);
        }
    }
    guarded query = guarded_alloc((size_t)(heads * d) * 4, 4);
    guarded expected = guarded_alloc((size_t)(heads * d) * 4, 4);
    for (int64_t i = 0; i < heads * d; i++) ((float *)query.data)[i] = mq_load(dtype, q.data, i);
    guarded mask = guarded_alloc((size_t)all, 1);
    for (int64_t i = 0; i < all; i++) ((uint8_t *)mask.data)[i] = below(3) || i == 0;
    uint8_t *masked = below(2) ? mask.data : NULL;
    guarded scores = guarded_alloc((size_t)(heads / kv_heads * all) * 4, 4);
    guarded out = guarded_alloc((size_t)(heads * d) * size_of(dtype), size_of(dtype));
    const mq_attention whole = {heads,        kv_heads,     d,      all,  all * d,
                                wide[0].data, wide[1].data, masked, 0.3f, {0}};
    const mq_attention attention = {
        heads,
        kv_heads,
        d,
        tokens,
        tokens * d,
        plain[0].data,
        plain[1].data,
        masked,
        0.3f,
        {blocks[0].data, blocks[1].data, count * (int64_t)bytes[0] + gap,
         count * (int64_t)bytes[1] + gap, count, bits, group_size}};
    for (int isa = 0; isa < MQ_ISA_COUNT; isa++) {
        if (!mq_isa_supported((mq_isa)isa)) continue;
        CHECK(mq_isa_set((mq_isa)isa) == MQ_OK);
        CHECK(mq_attend(&whole, MQ_F32, query.data, 0, kv_heads, scores.data, expected.data) ==
              MQ_OK);
        const int64_t split = below(kv_heads + 1);
        CHECK(mq_attend(&attention, dtype, q.data, split, kv_heads, scores.data, out.data) ==
              MQ_OK);
        CHECK(mq_attend(&attention, dtype, q.data, 0, split, scores.data, out.data) == MQ_OK);
        for (int64_t i = 0; i < heads * d; i++) {
            const float exact = ((float *)expected.data)[i];
            const uint16_t half = dtype == MQ_F16 ? mq_f32_to_f16(exact) : mq_f32_to_bf16(exact);
            if (dtype == MQ_F32)
                CHECK(memcmp((float *)out.data + i, &exact, 4) == 0);
            else
                CHECK(((uint16_t *)out.data)[i] == half);
        }
    }
    guarded_free(&q), guarded_free(&query), guarded_free(&expected), guarded_free(&mask);
    guarded_free(&scores), guarded_free(&out);
    for (int p = 0; p < 2; p++)
        guarded_free(&plain[p]), guarded_free(&blocks[p]), guarded_free(&wide[p]);
}

/* What lies between the linears. */
static void check_rows(void) {
    const mq_dtype dtype = (mq_dtype)below(3);
    const int64_t rows = below(4), k = 1 + below(below(8) ? 100 : 2600), stride = k + below(3);
    const mq_activation activation = (mq_activation)below(3);
    guarded x = random_values(dtype, rows ? (rows - 1) * stride + k : 0, below(2) == 0);
    guarded gains = random_values(dtype, k, 0), both = random_values(dtype, 2 * rows * k, 1);
    const mq_norm norm = {k, gains.data, 1e-5f, below(2) ? 1.0f : 0.0f};
    const int64_t kv_heads = 1 + below(3), heads = kv_heads * (1 + below(3));
    const int64_t d = 2 * (1 + below(40)), tokens = 1 + below(40), room = tokens * d + below(9);
    guarded q = random_values(dtype, heads * d, 0), attended[2];
    guarded keys = random_values(dtype, (kv_heads - 1) * room + tokens * d, below(8) == 0);
    guarded values = random_values(dtype, (kv_heads - 1) * room + tokens * d, 0);
    guarded mask = guarded_alloc((size_t)tokens, 1);
    for (int64_t i = 0; i < tokens; i++) ((uint8_t *)mask.data)[i] = below(3) || i == 0;
    guarded scores = guarded_alloc((size_t)(heads * tokens) * 4, 4);
    const mq_attention attention = {heads, kv_heads,  d,           tokens,
                                    room,  keys.data, values.data, below(2) ? mask.data : NULL,
                                    0.3f,  {0}};
    guarded out[3][2];
    for (int i = 0; i < 2; i++)
        attended[i] = guarded_alloc((size_t)(heads * d) * size_of(dtype), size_of(dtype));
    for (int f = 0; f < 6; f++)
        out[f / 2][f % 2] = guarded_alloc((size_t)(rows * k) * size_of(dtype), size_of(dtype));
    for (int isa = 0; isa < MQ_ISA_COUNT; isa++) {
        if (!mq_isa_supported((mq_isa)isa)) continue;
        CHECK(mq_isa_set((mq_isa)isa) == MQ_OK);
        const int i = isa > 0;
        CHECK(mq_rms_norm(&norm, dtype, x.data, rows, stride, out[0][i].data) == MQ_OK);
        CHECK(mq_gated(activation, dtype, both.data, rows, k, out[1][i].data) == MQ_OK);
        CHECK(mq_add(dtype, out[1][i].data, both.data, rows * k, out[2][i].data) == MQ_OK);
        for (int f = 0; f < 3; f++) check_same(dtype, out[f][i].data, out[f][0].data, rows * k);
        const int64_t split = below(kv_heads + 1);
        CHECK(mq_attend(&attention, dtype, q.data, split, kv_heads, scores.data,
                        attended[i].data) == MQ_OK);
        CHECK(mq_attend(&attention, dtype, q.data, 0, split, scores.data, attended[i].data) ==
              MQ_OK);
        CHECK(mq_rotary(dtype, q.data, keys.data, heads, d, attended[i].data) == MQ_OK);
        check_same(dtype, attended[i].data, attended[0].data, heads * d);
    }
    guarded_free(&q), guarded_free(&keys), guarded_free(&values), guarded_free(&mask);
    guarded_free(&scores), guarded_free(&attended[0]), guarded_free(&attended[1]);
    guarded_free(&x), guarded_free(&gains), guarded_free(&both);
    for (int f = 0; f < 6; f++) guarded_free(&out[f / 2][f % 2]);
}

/* Every kind of wrong argument returns its status and touches nothing: all pointers are NULL. */
static void check_statuses(void) {
    mq_group_format format = {4, 4, MQ_ACT_SYMMETRIC, 1};
    CHECK(mq_group_quantize(&format, MQ_F32, NULL, 1, 1, 1, NULL, NULL) == MQ_INVALID_POINTER);
    CHECK(mq_group_quantize(NULL, MQ_F32, NULL, 1, 1, 1, NULL, NULL) == MQ_INVALID_POINTER);
    CHECK(mq_group_quantize(&format, MQ_F32, NULL, -1, 1, 1, NULL, NULL) == MQ_INVALID_SIZE);
    CHECK(mq_group_quantize(&format, (mq_dtype)9, NULL, 1, 1, 1, NULL, NULL) == MQ_INVALID_DTYPE);
    format.num_bits = 9;
    CHECK(mq_group_quantize(&format, MQ_F32, NULL, 1, 1, 1, NULL, NULL) == MQ_INVALID_BITS);
    format = (mq_group_format){0, 4, MQ_ACT_SYMMETRIC, 1};
    CHECK(mq_group_quantize(&format, MQ_F32, NULL, 1, 1, 1, NULL, NULL) == MQ_INVALID_GROUP_SIZE);
    CHECK(mq_pack_nibbles(NULL, 1, 1, NULL) == MQ_INVALID_POINTER);
    CHECK(mq_argsort(NULL, -1, 0, NULL, NULL) == MQ_INVALID_SIZE);
    CHECK(mq_sort_keys((mq_sort_key)7, 0, 0, NULL, NULL) == MQ_INVALID_KEY);
    CHECK(mq_channel_stats_update(MQ_F32, NULL, 1, 1, 0, 1, 0, NULL) == MQ_INVALID_POINTER);
    CHECK(mq_isa_set((mq_isa)99) == MQ_INVALID_ISA);
    CHECK(mq_isa_name((mq_isa)99) == NULL);
    mq_shape shape;
    CHECK(mq_shape_of(4, 4, 5, 1, &shape) == MQ_INVALID_SALIENT);
    CHECK(mq_shape_of(4, 4, 4, 0, &shape) == MQ_INVALID_GROUP_SIZE);
    CHECK(mq_shape_of(-4, 4, 4, 1, &shape) == MQ_INVALID_SIZE);
    int32_t perm[8] = {0, 1, 2, 3, 4, 5, 6, 8};
    float x[8] = {0};
    uint8_t qweight[128];
    uint16_t scales[32];
    char space[4096];
    mq_linear lin = {.n = 8,
                     .k = 8,
                     .group_size = 8,
                     .qweight = qweight,
                     .scales = scales,
                     .salient_dtype = MQ_BF16,
                     .perm = perm,
                     .act_bits = 4,
                     .clip = 1};
    CHECK(mq_linear_quantize(&lin, MQ_F32, x, 8, 1, 0, 1, space) == MQ_INVALID_PERM);
    perm[7] = 7;
    CHECK(mq_linear_quantize(&lin, MQ_F32, x, 8, 1, 0, 1, space) == MQ_OK);
    CHECK(mq_linear_quantize(&lin, MQ_F32, x, 8, 13, 1, 13, space) == MQ_INVALID_SIZE);
    CHECK(mq_linear_multiply(&lin, 1, 0, 1, 0, 2, space, MQ_F32, x, 8) == MQ_INVALID_SIZE);
    lin.clip = 2;
    CHECK(mq_linear_quantize(&lin, MQ_F32, x, 8, 1, 0, 1, space) == MQ_INVALID_SCALE);
    lin.clip = 1, lin.rotation = 3;
    CHECK(mq_linear_quantize(&lin, MQ_F32, x, 8, 1, 0, 1, space) == MQ_INVALID_ROTATION);
    lin.rotation = 0, lin.act_format = (mq_act_format)3;
    CHECK(mq_linear_quantize(&lin, MQ_F32, x, 8, 1, 0, 1, space) == MQ_INVALID_FORMAT);
    lin.act_format = MQ_ACT_SYMMETRIC, lin.isa = (mq_isa)42;
    CHECK(mq_linear_quantize(&lin, MQ_F32, x, 8, 1, 0, 1, space) == MQ_INVALID_ISA);
    lin.isa = MQ_ISA_SCALAR, lin.salient_dtype = MQ_F32;
    CHECK(mq_linear_multiply(&lin, 1, 0, 1, 0, 1, space, MQ_F32, x, 8) == MQ_INVALID_DTYPE);
    lin.salient_dtype = MQ_I8;
    CHECK(mq_linear_multiply(&lin, 1, 0, 1, 0, 1, space, MQ_F32, x, 8) == MQ_INVALID_POINTER);
    CHECK(mq_pack_weight(&lin, 7, MQ_F32, x, 8, NULL, 0, 1, qweight, scales, NULL, NULL) ==
          MQ_INVALID_POINTER);
    CHECK(mq_pack_weight(&lin, 7, MQ_I8, x, 8, NULL, 0, 1, qweight, scales, NULL, scales) ==
          MQ_INVALID_DTYPE);
    mq_norm norm = {0, x, 1e-5f, 0};
    CHECK(mq_rms_norm(&norm, MQ_F32, x, 1, 8, x) == MQ_INVALID_SIZE);
    norm.k = 8, norm.eps = -1;
    CHECK(mq_rms_norm(&norm, MQ_F32, x, 1, 8, x) == MQ_INVALID_SCALE);
    norm.eps = 0;
    CHECK(mq_rms_norm(&norm, MQ_F32, x, 1, 8, NULL) == MQ_INVALID_POINTER);
    CHECK(mq_rms_norm(&norm, MQ_I8, x, 1, 8, NULL) == MQ_INVALID_DTYPE);
    CHECK(mq_gated((mq_activation)9, MQ_F32, x, 1, 4, x) == MQ_INVALID_FORMAT);
    CHECK(mq_gated(MQ_SILU, MQ_F32, NULL, 1, 4, x) == MQ_INVALID_POINTER);
    CHECK(mq_gated(MQ_SILU, MQ_F32, NULL, 1, INT64_MAX, x) == MQ_INVALID_SIZE);
    CHECK(mq_add(MQ_F32, x, NULL, 1, x) == MQ_INVALID_POINTER);
    CHECK(mq_rotary(MQ_F32, x, x, 1, 7, x) == MQ_INVALID_SIZE);
    CHECK(mq_rotary(MQ_F32, x, x, 1, 514, x) == MQ_INVALID_SIZE);
    CHECK(mq_rotary(MQ_F32, x, NULL, 1, 8, x) == MQ_INVALID_POINTER);
    size_t sizes[2];
    CHECK(mq_kv_block_sizes(4, 3, MQ_BF16, 9, &sizes[0], &sizes[1]) == MQ_OK);
    CHECK(sizes[0] == 32 * 5 + 2 * 9 * 2 && sizes[1] == 32 * 5 + 2 * 32 * 3 * 2);
    CHECK(mq_kv_block_sizes(5, 3, MQ_BF16, 9, &sizes[0], &sizes[1]) == MQ_INVALID_BITS);
    CHECK(mq_kv_block_sizes(4, 2, MQ_BF16, 9, &sizes[0], &sizes[1]) == MQ_INVALID_GROUP_SIZE);
    CHECK(mq_kv_block_sizes(4, 0, MQ_BF16, 9, &sizes[0], &sizes[1]) == MQ_INVALID_GROUP_SIZE);
    CHECK(mq_kv_block_sizes(4, 3, MQ_I8, 9, &sizes[0], &sizes[1]) == MQ_INVALID_DTYPE);
    CHECK(mq_kv_block_sizes(4, 3, MQ_BF16, 513, &sizes[0], &sizes[1]) == MQ_INVALID_SIZE);
    CHECK(mq_kv_block_sizes(4, 3, MQ_BF16, 9, NULL, &sizes[1]) == MQ_INVALID_POINTER);
    mq_attention attention = {2, 1, 2, 1, 2, x, x, NULL, 1, {NULL, x, 80, 320, 1, 4, 2}};
    CHECK(mq_attend(&attention, MQ_F32, x, 0, 1, x, x) == MQ_INVALID_POINTER);
    attention.blocks.keys = x, attention.blocks.bits = 6;
    CHECK(mq_attend(&attention, MQ_F32, x, 0, 1, x, x) == MQ_INVALID_BITS);
    attention.blocks.bits = 4, attention.blocks.key_stride = 44;
    CHECK(mq_attend(&attention, MQ_F32, x, 0, 1, x, x) == MQ_INVALID_SIZE);
    attention.blocks.key_stride = 80, attention.blocks.value_stride = 322;
    CHECK(mq_attend(&attention, MQ_F32, x, 0, 1, x, x) == MQ_INVALID_SIZE);
    attention.blocks.value_stride = INT64_MAX - 3, attention.blocks.count = INT64_MAX / 320;
    CHECK(mq_attend(&attention, MQ_F32, x, 0, 1, x, x) == MQ_INVALID_SIZE);
    attention.blocks.count = -1;
    CHECK(mq_attend(&attention, MQ_F32, x, 0, 1, x, x) == MQ_INVALID_SIZE);
    attention.blocks.count = 0;
    CHECK(mq_attend(&attention, MQ_F32, x, 0, 2, x, x) == MQ_INVALID_SIZE);
    CHECK(mq_attend(&attention, MQ_F32, x, 0, 1, NULL, x) == MQ_INVALID_POINTER);
    attention.scale = INFINITY;
    CHECK(mq_attend(&attention, MQ_F32, x, 0, 1, x, x) == MQ_INVALID_SCALE);
    attention.kv_heads = 3;
    CHECK(mq_attend(&attention, MQ_F32, x, 0, 1, x, x) == MQ_INVALID_SIZE);
    attention.kv_heads = 1, attention.head_stride = 1;
    CHECK(mq_attend(&attention, MQ_F32, x, 0, 1, x, x) == MQ_INVALID_SIZE);
    CHECK(mq_add(MQ_F32, x, x, -1, x) == MQ_INVALID_SIZE);
    for (int status = MQ_OK; status <= MQ_NON_FINITE + 1; status++)
        CHECK(mq_status_message((mq_status)status)[0]);
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    srand((unsigned)atoi(argv[1]));
    int cases = atoi(argv[2]);
    check_statuses();
    for (int i = 0; i < cases; i++) {
        check_groups();
        check_stats();
        check_linear();
        check_rows();
        check_blocks();
    }
    printf("%d cases:", cases);
    for (int isa = 0; isa < MQ_ISA_COUNT; isa++)
        if (mq_isa_supported((mq_isa)isa)) printf(" %s", mq_isa_name((mq_isa)isa));
    printf("\n");
    return 0;
}
