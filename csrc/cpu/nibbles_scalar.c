#include "kernels.h"

void mq_pack_nibbles_scalar(const int8_t *q, int64_t n, uint8_t *packed) {
    mq_assume_nibbles(q, n, packed);
    for (int64_t i = 0; i < n / 2; i++)
        packed[i] = (uint8_t)((q[2 * i] & 15) | (q[2 * i + 1] & 15) << 4);
    if (n % 2) packed[n / 2] = (uint8_t)(q[n - 1] & 15);
}

void mq_unpack_nibbles_scalar(const uint8_t *packed, int64_t n, int is_unsigned, int8_t *q) {
    mq_assume_nibbles(q, n, packed);
    for (int64_t i = 0; i < n; i++) {
        int code = (packed[i / 2] >> (i % 2 * 4)) & 15;
        q[i] = (int8_t)(is_unsigned || code < 8 ? code : code - 16);
    }
}
