/* One table of micro-kernels per instruction set, and which of them is in use. */
#include <stdatomic.h>

#include "kernels.h"

#define MQ_KERNELS(isa, rows)   \
    {rows,                      \
     mq_channel_stats_##isa,    \
     mq_sort_keys_##isa,        \
     mq_widen_##isa,            \
     mq_widen_codes_##isa,      \
     mq_narrow_##isa,           \
     mq_extent_of_##isa,        \
     mq_hadamard_##isa,         \
     mq_quantize_##isa,         \
     mq_dequantize_##isa,       \
     mq_pack_nibbles_##isa,     \
     mq_unpack_nibbles_##isa,   \
     mq_multiply_salient_##isa, \
     mq_multiply_groups_##isa}

static const mq_kernels tables[MQ_ISA_COUNT] = {
    [MQ_ISA_SCALAR] = MQ_KERNELS(scalar, 6),
#if defined(__x86_64__)
    [MQ_ISA_AVX2] = MQ_KERNELS(avx2, 6),
#endif
};

static atomic_int active = -1; /* -1: not chosen yet */

const mq_kernels *mq_kernels_of(mq_isa isa) { return &tables[isa]; }

const char *mq_isa_name(mq_isa isa) {
    static const char *const names[MQ_ISA_COUNT] = {"scalar", "avx2"};
    return (unsigned)isa < MQ_ISA_COUNT ? names[isa] : NULL;
}

int mq_isa_supported(mq_isa isa) {
    switch (isa) {
        case MQ_ISA_SCALAR: return 1;
#if defined(__x86_64__)
        case MQ_ISA_AVX2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("f16c");
#endif
        default: return 0;
    }
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
