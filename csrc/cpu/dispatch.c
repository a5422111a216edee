/* One table of micro-kernels per instruction set, and which of them is in use. */
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <stdatomic.h>

#include "kernels.h"

/* Where an instruction set has no kernel of its own, it takes that of a set that it includes. */
#define MQ_KERNELS(rows, base, quantizer, multiplier)         \
    {                                                         \
        .tile_rows = rows,                                    \
        .channel_stats = mq_channel_stats_##base,             \
        .sort_keys = mq_sort_keys_##base,                     \
        .widen = mq_widen_##base,                             \
        .widen_codes = mq_widen_codes_##base,                 \
        .narrow = mq_narrow_##base,                           \
        .extent_of = mq_extent_of_##quantizer,                \
        .hadamard = mq_hadamard_##base,                       \
        .quantize = mq_quantize_##quantizer,                  \
        .quantize_groups = mq_quantize_groups_##multiplier,   \
        .dequantize = mq_dequantize_##base,                   \
        .pack_nibbles = mq_pack_nibbles_##base,               \
        .unpack_nibbles = mq_unpack_nibbles_##base,           \
        .multiply_salient = mq_multiply_salient_##multiplier, \
        .multiply_groups = mq_multiply_groups_##multiplier,   \
    }

static const mq_kernels tables[MQ_ISA_COUNT] = {
    [MQ_ISA_SCALAR] = MQ_KERNELS(MQ_TILE_ROWS, scalar, scalar, scalar),
#if defined(__x86_64__)
    [MQ_ISA_AVX2] = MQ_KERNELS(MQ_TILE_ROWS, avx2, avx2, avx2),
    [MQ_ISA_AVXVNNI] = MQ_KERNELS(MQ_TILE_ROWS, avx2, avx2, avxvnni),
    [MQ_ISA_AVX512VNNI] = MQ_KERNELS(MQ_TILE_ROWS_512, avx2, avx512vnni, avx512vnni),
#endif
};

static atomic_int active = -1; /* -1: not chosen yet */

const mq_kernels *mq_kernels_of(mq_isa isa) { return &tables[isa]; }

const char *mq_isa_name(mq_isa isa) {
    static const char *const names[MQ_ISA_COUNT] = {"scalar", "avx2", "avxvnni", "avx512vnni"};
    return (unsigned)isa < MQ_ISA_COUNT ? names[isa] : NULL;
}

#if defined(__x86_64__) && !defined(MQ_SIMDE)
/* Not every compiler that builds these kernels knows "avxvnni" in __builtin_cpu_supports; and cpuid
 * is asked once, as a virtual machine takes microseconds to answer. */
static int has_avxvnni(void) {
    static atomic_int known = -1;
    int has = atomic_load(&known);
    if (has < 0) {
        unsigned eax, ebx, ecx, edx;
        has = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1u << 4);
        atomic_store(&known, has);
    }
    return has;
}
#endif

int mq_isa_supported(mq_isa isa) {
#if defined(MQ_SIMDE)
    return (unsigned)isa < MQ_ISA_COUNT;
#elif defined(__x86_64__)
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                     __builtin_cpu_supports("f16c");
    switch (isa) {
        case MQ_ISA_SCALAR: return 1;
        case MQ_ISA_AVX2: return avx2;
        case MQ_ISA_AVXVNNI: return avx2 && has_avxvnni();
        case MQ_ISA_AVX512VNNI:
            return avx2 && __builtin_cpu_supports("avx512f") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
        default: return 0;
    }
#else
    return isa == MQ_ISA_SCALAR;
#endif
}

mq_isa mq_isa_active(void) {
    int isa = atomic_load(&active);
    if (isa < 0) {
        /* two threads may both get here; they store the same value */
        for (isa = MQ_ISA_COUNT - 1; !mq_isa_supported((mq_isa)isa); isa--) {
        }
        atomic_store(&active, isa);
    }
    return (mq_isa)isa;
}

mq_status mq_isa_set(mq_isa isa) {
    if ((unsigned)isa >= MQ_ISA_COUNT || !mq_isa_supported(isa)) return MQ_INVALID_ISA;
    atomic_store(&active, (int)isa);
    return MQ_OK;
}
