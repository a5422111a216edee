// Runs the linear's two steps on torch's threads.
#ifndef MQ_TORCH_LINEAR_H
#define MQ_TORCH_LINEAR_H

#include <algorithm>
#include <atomic>

#include "arguments.h"

namespace mixedquant {

// Minimum work per thread: a split costs some microseconds. For a single token, reading the weights
// of 2^17 products takes about five.
constexpr int64_t kGrainValues = 1 << 16;
constexpr int64_t kGrainProducts = 1 << 17;
constexpr int64_t kRowsPerTask = 240;

// The number of items per thread, for so much work in total and per item (negative: too much for
// an int64_t).
inline int64_t grain_of(int64_t total, int64_t item) {
    return item < 0 ? 1 : total / std::max<int64_t>(item, 1);
}

// Runs body(begin, end) -> mq_status over [0, n). Reports the first failure.
template <typename Body>
void parallel(const Op &op, int64_t n, int64_t grain, const Body &body) {
    std::atomic<int> failure{MQ_OK};
    const auto part = [&](int64_t begin, int64_t end) {
        const mq_status status = body(begin, end);
        int none = MQ_OK;
        if (status != MQ_OK) failure.compare_exchange_strong(none, status);
    };
    if (n <= std::max<int64_t>(grain, 1))
        part(0, n);
    else
        stable::parallel_for(0, n, std::max<int64_t>(grain, 1), part);
    check(op, static_cast<mq_status>(failure.load()));
}

inline int64_t tile_rows_of(const Op &op, const mq_linear &lin, int64_t rows) {
    int64_t tile_rows;
    check(op, mq_linear_tile_rows(&lin, rows, &tile_rows));
    return tile_rows;
}

// Runs step 1 of the linear for all tokens x [rows][lin.k].
inline void quantize_tokens(const Op &op, const mq_linear &lin, mq_dtype dtype, const void *x,
                            int64_t rows, void *space) {
    const int64_t tile_rows = tile_rows_of(op, lin, rows);
    const int64_t tiles = mq_ceil_div(rows, tile_rows);
    parallel(op, tiles, grain_of(kGrainValues, mq_size_product(tile_rows, lin.k)),
             [&](int64_t begin, int64_t end) {
                 return mq_linear_quantize(&lin, dtype, x, lin.k, rows, begin * tile_rows,
                                           std::min(end * tile_rows, rows), space);
             });
}

// Runs step 2 for all tokens: writes out [rows][lin.n].
inline void multiply_tokens(const Op &op, const mq_linear &lin, const mq_shape &shape,
                            mq_dtype dtype, int64_t rows, const void *space, void *out) {
    // A task is a few tiles x the panels that are multiplied together. Neighbouring tasks share
    // tiles, whose codes stay in the cache while weights stream by.
    const int64_t tile_rows = tile_rows_of(op, lin, rows);
    const int64_t tiles = mq_ceil_div(rows, tile_rows);
    const int64_t row_tasks = mq_ceil_div(rows, kRowsPerTask);
    const int64_t column_tasks = mq_ceil_div(shape.panels, MQ_PANELS_AT_ONCE);
    const int64_t task_products = mq_size_product(
        MQ_PANELS_AT_ONCE * MQ_PANEL * std::min(kRowsPerTask, rows), std::max<int64_t>(lin.k, 1));
    const auto first_row = [&](int64_t row_task) {
        const int64_t tile = row_task * (tiles / row_tasks) + std::min(row_task, tiles % row_tasks);
        return std::min(tile * tile_rows, rows);
    };
    parallel(op, row_tasks * column_tasks, grain_of(kGrainProducts, task_products),
             [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin, next; task < end; task = next) {
                     const int64_t row_task = task / column_tasks;
                     next = std::min(end, (row_task + 1) * column_tasks);
                     const int64_t panel0 = (task - row_task * column_tasks) * MQ_PANELS_AT_ONCE;
                     const int64_t panel1 = panel0 + (next - task) * MQ_PANELS_AT_ONCE;
                     const mq_status status = mq_linear_multiply(
                         &lin, rows, first_row(row_task), first_row(row_task + 1), panel0,
                         std::min(panel1, shape.panels), space, dtype, out, lin.n);
                     if (status != MQ_OK) return status;
                 }
                 return MQ_OK;
             });
}

}  // namespace mixedquant

#endif
