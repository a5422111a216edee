/* Stable argsort: a bottom-up merge sort, without heap or recursion. Its branches depend on the
 * data, so one version serves all instruction sets. */
#include "ops.h"

static int comes_before(double a, double b, int descending) {
    if (a != a || b != b) return a == a; /* NaNs last, in index order */
    return descending ? a > b : a < b;
}

void mq_run_argsort(const double *keys, int64_t k, int descending, int64_t *indices,
                    int64_t *scratch) {
    int64_t *from = indices, *to = scratch;
    for (int64_t i = 0; i < k; i++) from[i] = i;
    for (int64_t width = 1; width < k; width *= 2) {
        for (int64_t start = 0; start < k; start += 2 * width) {
            int64_t middle = mq_min(start + width, k), end = mq_min(start + 2 * width, k);
            int64_t a = start, b = middle;
            for (int64_t i = start; i < end; i++) {
                int take_b = a == middle ||
                             (b < end && comes_before(keys[from[b]], keys[from[a]], descending));
                to[i] = from[take_b ? b++ : a++];
            }
        }
        int64_t *swap = from;
        from = to;
        to = swap;
    }
    if (from != indices)
        for (int64_t i = 0; i < k; i++) indices[i] = from[i];
}
