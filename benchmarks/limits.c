/* Peaks of one core: multiply-accumulates per second for each instruction that the kernels use, and
 * bytes per second read from memory. benchmarks/linear.py compiles this and relates speeds to it. */
#include <stddef.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
enum { CHAINS = 12 }; /* enough to hide the latency, few enough for the registers */
#define EACH_CHAIN(i) _Pragma("GCC unroll 12") for (int i = 0; i < CHAINS; i++)
#else
#include <arm_neon.h>
enum { CHAINS = 24 };
#define EACH_CHAIN(i) _Pragma("GCC unroll 24") for (int i = 0; i < CHAINS; i++)
#endif

enum { ROUNDS = 100000, REPEATS = 10 };

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* 1e9 multiply-accumulates per second, the best of several repeats. step(acc) does `macs` of them. */
#define DEFINE_PEAK(name, isa, vector, zero, macs, step)                              \
    __attribute__((target(isa))) double name(void) {                                  \
        vector acc[CHAINS], x = zero(), product = zero();                             \
        double best = 0;                                                              \
        (void)product;                                                                \
        for (int repeat = 0; repeat < REPEATS; repeat++) {                            \
            EACH_CHAIN (i) acc[i] = zero();                                           \
            const double start = seconds();                                           \
            for (int round = 0; round < ROUNDS; round++)                              \
                EACH_CHAIN (i) step(acc[i]);                                          \
            const double speed = 1e-9 * macs * CHAINS * ROUNDS / (seconds() - start); \
            if (speed > best) best = speed;                                           \
        }                                                                             \
        return best;                                                                  \
    }

/* peak_<isa>; for fp32 and bf16 with the widest vectors available */
#if defined(__x86_64__)
#define FMA(acc) __asm__ volatile("vfmadd231ps %1, %1, %0" : "+v"(acc) : "v"(x))
#define DPBF16(acc) __asm__ volatile("vdpbf16ps %1, %1, %0" : "+v"(acc) : "v"(x))
#define DPBUSD(acc) __asm__ volatile("vpdpbusd %1, %1, %0" : "+v"(acc) : "v"(x))
#define DPBUSD_VEX(acc) __asm__ volatile("%{vex%} vpdpbusd %1, %1, %0" : "+x"(acc) : "x"(x))
#define MADDUBS(acc)                                              \
    __asm__ volatile("vpmaddubsw %2, %2, %1\n\tvpaddw %1, %0, %0" \
                     : "+x"(acc), "=&x"(product)                  \
                     : "x"(x))

DEFINE_PEAK(peak_fma_256, "avx2,fma", __m256, _mm256_setzero_ps, 8, FMA)
DEFINE_PEAK(peak_fma_512, "avx512f", __m512, _mm512_setzero_ps, 16, FMA)
DEFINE_PEAK(peak_bf16, "avx512f,avx512bf16", __m512, _mm512_setzero_ps, 32, DPBF16)
DEFINE_PEAK(peak_avx2, "avx2", __m256i, _mm256_setzero_si256, 32, MADDUBS)
DEFINE_PEAK(peak_avxvnni, "avx2,avxvnni", __m256i, _mm256_setzero_si256, 32, DPBUSD_VEX)
DEFINE_PEAK(peak_avx512vnni, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512, 64, DPBUSD)

double peak_fma(void) {
    return __builtin_cpu_supports("avx512f") ? peak_fma_512() : peak_fma_256();
}

int has_bf16(void) { return __builtin_cpu_supports("avx512bf16") != 0; }
#define WIDE "avx2"
#else
#define FMLA(acc) __asm__ volatile("fmla %0.4s, %1.4s, %1.4s" : "+w"(acc) : "w"(x))
#define SDOT(acc) __asm__ volatile("sdot %0.4s, %1.16b, %1.16b" : "+w"(acc) : "w"(x))
#define SMMLA(acc) __asm__ volatile("smmla %0.4s, %1.16b, %1.16b" : "+w"(acc) : "w"(x))
#define NO_FLOATS() vdupq_n_f32(0)
#define NO_INTS() vdupq_n_s32(0)

DEFINE_PEAK(peak_fma, "arch=armv8.2-a", float32x4_t, NO_FLOATS, 4, FMLA)
DEFINE_PEAK(peak_neon, "arch=armv8.2-a+dotprod", int32x4_t, NO_INTS, 16, SDOT)
DEFINE_PEAK(peak_neoni8mm, "arch=armv8.2-a+dotprod+i8mm", int32x4_t, NO_INTS, 32, SMMLA)

int has_bf16(void) { return 0; }
#define WIDE "arch=armv8.2-a"
#endif

/* 1e9 bytes per second read in order from `bytes` bytes: a multiple of 64, larger than the caches */
__attribute__((target(WIDE))) double memory_read(const char *from, size_t bytes) {
    typedef long long wide __attribute__((vector_size(32)));
    double best = 0;
    for (int repeat = 0; repeat < 3; repeat++) {
        wide sum = {0}, other = {0};
        const double start = seconds();
        for (size_t i = 0; i < bytes; i += 64) {
            __builtin_prefetch(from + i + 4096);
            sum ^= *(const wide *)(const void *)(from + i);
            other ^= *(const wide *)(const void *)(from + i + 32);
        }
        __asm__ volatile("" : : "m"(sum), "m"(other));
        const double speed = 1e-9 * (double)bytes / (seconds() - start);
        if (speed > best) best = speed;
    }
    return best;
}
