/* Calls one kernel and keeps or breaks one contract of csrc/cpu/kernels.h. A broken contract
 * must trap. Usage: check_assumptions ISA CONTRACT BROKEN, where BROKEN is 0 or 1. Without
 * arguments it lists the contracts. */
#include <string.h>

#include "../../csrc/cpu/kernels.h"
#include "check.h"

static _Alignas(64) float floats[MQ_PANELS_AT_ONCE * MQ_ROW_CHUNK * MQ_PANEL], sums[1 << 14];
static _Alignas(64) uint16_t halves[1 << 12];
static _Alignas(64) int8_t codes[1 << 12], packed[1 << 12];
static _Alignas(64) int32_t starts[MQ_SEGMENT_QUADS];
static double keys[16];

static const mq_kernels *kernels;

static void channel_stats(int broken) {
    static float minimum[16], abs_max[16];
    static double abs_sum[16], sq_sum[16];
    static int64_t argmax[16];
    const mq_channel_stats stats = {abs_max, minimum, abs_sum, sq_sum, argmax};
    kernels->channel_stats(MQ_F32, floats, 1, broken ? 15 : 16, 0, 16, 0, &stats);
}

static void sort_keys(int broken) {
    const mq_channel_stats stats = {.abs_max = floats};
    kernels->sort_keys(MQ_KEY_MAX, 16, broken ? 0 : 1, &stats, keys);
}

static void widen(int broken) { kernels->widen(broken ? MQ_F32 : MQ_F16, halves, 32, floats); }

static void widen_codes(int broken) {
    kernels->widen_codes(broken ? (const int8_t *)floats : codes, halves, 4, floats);
}

static void narrow(int broken) { kernels->narrow(broken ? MQ_I8 : MQ_BF16, floats, 32, halves); }

static void extent_of(int broken) { kernels->extent_of(floats, broken ? -1 : 32); }

static void hadamard_size(int broken) { kernels->hadamard(floats, broken ? 48 : 64, sums); }

static void hadamard_overlap(int broken) { kernels->hadamard(floats, 64, floats + 4 * broken); }

static void quantize(int broken) {
    kernels->quantize(floats, 64, 1, broken ? 1 : -7, broken ? -7 : 7, codes);
}

static void quantize_groups(int broken) {
    const mq_linear lin = {.act_bits = 4, .clip = 1};
    const int64_t n = broken ? MQ_BUFFER + 4 : MQ_BUFFER;
    kernels->quantize_groups[0](&lin, NULL, floats, n, n, codes, sums, starts);
}

static void quantize_groups_clip(int broken) {
    const mq_linear lin = {.act_bits = 4, .clip = broken ? MQ_MIN_CLIP / 2 : MQ_MIN_CLIP};
    kernels->quantize_groups[0](&lin, NULL, floats, 32, 32, codes, sums, starts);
}

static void interleave(int broken) {
    kernels->interleave(codes, 64, broken ? 3 : 2, 16, packed, 2);
}

static void dequantize(int broken) {
    kernels->dequantize(broken ? (const int8_t *)floats : codes, 64, 0, 1, floats);
}

static void pack_nibbles(int broken) {
    kernels->pack_nibbles(codes, 64, (uint8_t *)(broken ? codes : packed));
}

static void unpack_nibbles(int broken) {
    kernels->unpack_nibbles((const uint8_t *)packed, broken ? -64 : 64, 0, codes);
}

static void dequantize_rows(int broken) {
    kernels->dequantize_rows(4, (const uint8_t *)packed, 2, 32, broken ? 12 : 16, floats, floats, 2,
                             sums);
}

static void multiply_salient(int broken) {
    const mq_activations act = {.m = 6, .h = 6, .salient = floats};
    kernels->multiply_salient(&act, 8, 0, 1, broken ? 9 : 0, 8, floats, sums);
}

/* Two tokens and one panel of two groups */
static void multiply(int64_t tile1, int64_t panels, int64_t shift) {
    mq_linear lin = {.n = 16, .k = 32, .group_size = 16};
    mq_shape shape;
    CHECK(mq_shape_of(lin.n, lin.k, 0, lin.group_size, &shape) == MQ_OK);
    const mq_activations act = {.m = 2, .h = 2, .codes = codes, .scales = floats, .starts = starts};
    kernels->multiply_groups[0](&act, &shape, 0, tile1, panels, (const uint8_t *)packed, halves,
                                sums + shift);
}

static void multiply_tiles(int broken) { multiply(broken ? 2 : 1, 1, 0); }

static void multiply_panels(int broken) { multiply(1, broken ? 3 : 1, 0); }

static void multiply_alignment(int broken) { multiply(1, 1, broken ? 4 : 0); }

static const struct {
    const char *name;
    void (*run)(int broken);
} contracts[] = {
    {"channel_stats", channel_stats},
    {"sort_keys", sort_keys},
    {"widen", widen},
    {"widen_codes", widen_codes},
    {"narrow", narrow},
    {"extent_of", extent_of},
    {"hadamard_size", hadamard_size},
    {"hadamard_overlap", hadamard_overlap},
    {"quantize", quantize},
    {"quantize_groups", quantize_groups},
    {"quantize_groups_clip", quantize_groups_clip},
    {"interleave", interleave},
    {"dequantize", dequantize},
    {"pack_nibbles", pack_nibbles},
    {"unpack_nibbles", unpack_nibbles},
    {"dequantize_rows", dequantize_rows},
    {"multiply_salient", multiply_salient},
    {"multiply_tiles", multiply_tiles},
    {"multiply_panels", multiply_panels},
    {"multiply_alignment", multiply_alignment},
};

int main(int argc, char **argv) {
    const size_t count = sizeof contracts / sizeof *contracts;
    if (argc == 1)
        for (size_t i = 0; i < count; i++) printf("%s\n", contracts[i].name);
    if (argc == 1) return 0;
    CHECK(argc == 4);
    for (int isa = 0; isa < MQ_ISA_COUNT; isa++)
        if (!strcmp(mq_isa_name((mq_isa)isa), argv[1])) kernels = mq_kernels_of((mq_isa)isa);
    CHECK(kernels);
    for (size_t i = 0; i < count; i++) {
        if (strcmp(contracts[i].name, argv[2])) continue;
        contracts[i].run(atoi(argv[3]));
        return 0;
    }
    fprintf(stderr, "no contract %s\n", argv[2]);
    return 1;
}
