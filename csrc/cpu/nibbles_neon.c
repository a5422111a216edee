#include "kernels.h"

#if defined(MQ_NEON)
#include "neon.h"

void mq_unpack_nibbles_neon(const uint8_t *packed, int64_t n, int is_unsigned, int8_t *q) {
    mq_assume_nibbles(q, n, packed);
    const uint8x16_t nibble = vdupq_n_u8(15), eight = vdupq_n_u8(is_unsigned ? 0 : 8);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const uint8x16_t bytes = vld1q_u8(packed + i / 2);
        const uint8x16_t low = vandq_u8(bytes, nibble), high = vshrq_n_u8(bytes, 4);
        /* (code ^ 8) - 8 sign-extends a nibble */
        const uint8x16x2_t codes = {
            {vsubq_u8(veorq_u8(low, eight), eight), vsubq_u8(veorq_u8(high, eight), eight)}};
        vst2q_u8((uint8_t *)q + i, codes);
    }
    mq_unpack_nibbles_scalar(packed + i / 2, n - i, is_unsigned, q + i);
}
#endif
