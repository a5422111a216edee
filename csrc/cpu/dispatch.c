/* The tables of micro-kernels, one per instruction set, and the choice between them. */
#include <stdatomic.h>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(MQ_NEON) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(MQ_NEON) && defined(__linux__)
#include <sys/auxv.h>
#endif

/* An instruction set without a kernel of its own uses that of a set it includes. */
#define MQ_KERNELS(rows, base, quantizer, multiplier, wide)                              \
    {                                                                                    \
        .tile_rows = rows,                                                               \
        .channel_stats = mq_channel_stats_##base,                                        \
        .sort_keys = mq_sort_keys_##base,                                                \
        .widen = mq_widen_##base,                                                        \
        .widen_codes = mq_widen_codes_##base,                                            \
        .narrow = mq_narrow_##base,                                                      \
        .extent_of = mq_extent_of_##quantizer,                                           \
        .hadamard = mq_hadamard_##quantizer,                                             \
        .quantize = mq_quantize_##base,                                                  \
        .quantize_groups = {mq_quantize_groups_##multiplier, mq_quantize_groups_##wide}, \
        .interleave = mq_interleave_##base,                                              \
        .dequantize = mq_dequantize_##base,                                              \
        .pack_nibbles = mq_pack_nibbles_##base,                                          \
        .unpack_nibbles = mq_unpack_nibbles_##base,                                      \
        .add_squares = mq_add_squares_##base,                                            \
        .activate = mq_activate_##base,                                                  \
        .dot_rows = mq_dot_rows_##base,                                                  \
        .exponentials = mq_exponentials_##base,                                          \
        .add_rows = mq_add_rows_##base,                                                  \
        .dequantize_rows = mq_dequantize_rows_##base,                                    \
        .multiply_salient = mq_multiply_salient_##multiplier,                            \
        .multiply_groups = {mq_multiply_groups_##multiplier, mq_multiply_groups_##wide}, \
    }

/* Plain C is good enough here: the compiler vectorizes it, or it is not time-critical. */
#define mq_add_squares_neon mq_add_squares_scalar
#define mq_activate_neon mq_activate_scalar
#define mq_dot_rows_neon mq_dot_rows_scalar
#define mq_exponentials_neon mq_exponentials_scalar
#define mq_add_rows_neon mq_add_rows_scalar
#define mq_dequantize_rows_neon mq_dequantize_rows_scalar
#define mq_sort_keys_neon mq_sort_keys_scalar
#define mq_dequantize_neon mq_dequantize_scalar
#define mq_pack_nibbles_neon mq_pack_nibbles_scalar
#define mq_quantize_groups_neoni8mm mq_quantize_groups_neon
/* int32 starts, as AVX-VNNI's */
#define mq_quantize_groups_avx2_8bit mq_quantize_groups_avxvnni

static const mq_kernels tables[MQ_ISA_COUNT] = {
    [MQ_ISA_SCALAR] = MQ_KERNELS(MQ_TILE_ROWS, scalar, scalar, scalar, scalar),
#if defined(MQ_X86)
    [MQ_ISA_AVX2] = MQ_KERNELS(MQ_TILE_ROWS, avx2, avx2, avx2, avx2_8bit),
    [MQ_ISA_AVXVNNI] = MQ_KERNELS(MQ_TILE_ROWS, avx2, avx2, avxvnni, avxvnni),
    [MQ_ISA_AVX512VNNI] = MQ_KERNELS(MQ_TILE_ROWS_512, avx2, avx512vnni, avx512vnni, avx512vnni),
#endif
#if defined(MQ_NEON)
    [MQ_ISA_NEON] = MQ_KERNELS(MQ_TILE_ROWS, neon, neon, neon, neon),
    [MQ_ISA_NEONI8MM] = MQ_KERNELS(MQ_TILE_ROWS, neon, neon, neoni8mm, neoni8mm),
#endif
};

static atomic_int active = -1; /* -1: not chosen yet */

const mq_kernels *mq_kernels_of(mq_isa isa) { return &tables[isa]; }

const char *mq_isa_name(mq_isa isa) {
    static const char *const names[MQ_ISA_COUNT] = {"scalar",     "avx2", "avxvnni",
                                                    "avx512vnni", "neon", "neoni8mm"};
    return (unsigned)isa < MQ_ISA_COUNT ? names[isa] : NULL;
}

/* Returns one bit for each instruction set that this processor has. */
static unsigned detect(void) {
    unsigned isas = 1u << MQ_ISA_SCALAR;
#if defined(MQ_SIMDE)
    isas |= 1u << MQ_ISA_AVX2 | 1u << MQ_ISA_AVXVNNI | 1u << MQ_ISA_AVX512VNNI;
#elif defined(__x86_64__)
    /* Not every supported compiler knows the names "f16c" and "avxvnni". */
    unsigned eax, ebx, ecx, edx;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & 1u << 29)) {
        isas |= 1u << MQ_ISA_AVX2;
        if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1u << 4))
            isas |= 1u << MQ_ISA_AVXVNNI;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512vnni"))
            isas |= 1u << MQ_ISA_AVX512VNNI;
    }
#elif defined(MQ_NEON)
    int dotprod = 0, i8mm = 0;
#if defined(__APPLE__)
    size_t size = sizeof dotprod;
    sysctlbyname("hw.optional.arm.FEAT_DotProd", &dotprod, &size, NULL, 0);
    size = sizeof i8mm;
    sysctlbyname("hw.optional.arm.FEAT_I8MM", &i8mm, &size, NULL, 0);
#elif defined(__linux__)
    dotprod = getauxval(AT_HWCAP) >> 20 & 1; /* HWCAP_ASIMDDP, HWCAP2_I8MM: */
    i8mm = getauxval(AT_HWCAP2) >> 13 & 1;   /* older headers do not name them */
#endif
    if (dotprod) isas |= 1u << MQ_ISA_NEON;
    if (dotprod && i8mm) isas |= 1u << MQ_ISA_NEONI8MM;
#endif
    return isas;
}

int mq_isa_supported(mq_isa isa) {
    static atomic_uint known = 0; /* cached: cpuid takes microseconds in a virtual machine */
    unsigned isas = atomic_load(&known);
    if (!isas) {
        isas = detect();
        atomic_store(&known, isas);
    }
    return (unsigned)isa < MQ_ISA_COUNT && (isas >> isa & 1);
}

mq_isa mq_isa_active(void) {
    int isa = atomic_load(&active);
    if (isa < 0) {
        /* Two threads may race here; both store the same value. */
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
