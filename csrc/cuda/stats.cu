// Channel statistics, sort keys and argsort.
#include "common.cuh"

namespace mq {
namespace {

// One thread per channel: sums are in row order, as on the CPU.
__global__ void __launch_bounds__(kThreads, 4)
    update(mq_dtype dtype, const void *x, int64_t rows, int64_t cols, const int64_t *count,
           mq_channel_stats stats) {
    MQ_GRID_STRIDE(c, cols) {
        float abs_max = stats.abs_max[c], minimum = stats.minimum[c];
        double abs_sum = stats.abs_sum[c], sq_sum = stats.sq_sum[c];
        int64_t argmax = stats.argmax[c];
#pragma unroll 8
        for (int64_t r = 0; r < rows; r++) {
            const float value = load(dtype, x, r * cols + c), magnitude = fabsf(value);
            if (magnitude > abs_max) {
                abs_max = magnitude;
                argmax = *count + r;
            }
            if (value < minimum) minimum = value;
            abs_sum += static_cast<double>(magnitude);
            sq_sum += static_cast<double>(value) * static_cast<double>(value);
        }
        stats.abs_max[c] = abs_max;
        stats.minimum[c] = minimum;
        stats.abs_sum[c] = abs_sum;
        stats.sq_sum[c] = sq_sum;
        stats.argmax[c] = argmax;
    }
}

// A separate kernel, because the one before still reads the old count.
__global__ void __launch_bounds__(kThreads) add_rows(int64_t *count, int64_t rows) {
    if (threadIdx.x == 0) *count += rows;
}

__global__ void __launch_bounds__(kThreads)
    sort_keys(mq_sort_key key, int64_t k, const int64_t *count, mq_channel_stats stats,
              double *keys) {
    const double rows = static_cast<double>(*count);
    MQ_GRID_STRIDE(i, k) {
        double value = 0;
        if (*count == 0) {
            value = 0;
        } else if (key == MQ_KEY_ARGMAX) {
            value = static_cast<double>(stats.argmax[i]);
        } else if (key == MQ_KEY_MAX) {
            value = static_cast<double>(stats.abs_max[i]);
        } else if (key == MQ_KEY_RMS) {
            value = sqrt(stats.sq_sum[i] / rows);
        } else {
            const double mean = stats.abs_sum[i] / rows;
            const double variance = stats.sq_sum[i] / rows - mean * mean;
            value = mean + 3.0 * sqrt(variance < 0 ? 0 : variance);
        }
        keys[i] = value;
    }
}

// True if key a comes before key b. earlier: a has the lower index.
__device__ __forceinline__ bool comes_before(double a, double b, bool descending, bool earlier) {
    if (a != a || b != b) return a == a || (b != b && earlier);
    return (descending ? a > b : a < b) || (a == b && earlier);
}

// A key's place is the number of keys before it.
__global__ void __launch_bounds__(kThreads)
    argsort(const double *keys, int64_t k, bool descending, int64_t *indices) {
    __shared__ double tile[kThreads];
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const double mine = i < k ? keys[i] : 0;
    int64_t place = 0;
    for (int64_t start = 0; start < k; start += kThreads) {
        __syncthreads();
        if (start + threadIdx.x < k) tile[threadIdx.x] = keys[start + threadIdx.x];
        __syncthreads();
        const int n = static_cast<int>(smaller<int64_t>(kThreads, k - start));
        for (int e = 0; e < n; e++) place += comes_before(tile[e], mine, descending, start + e < i);
    }
    if (i < k) indices[place] = i;
}

}  // namespace
}  // namespace mq

using namespace mq;

extern "C" int mq_cuda_channel_stats_update(mq_dtype dtype, const void *x, int64_t rows,
                                            int64_t cols, int64_t *count,
                                            const mq_channel_stats *stats, void *stream) {
    const int error =
        launch(update, blocks_for(cols), 0, stream, dtype, x, rows, cols, count, *stats);
    return error ? error : launch(add_rows, dim3(1), 0, stream, count, rows);
}

extern "C" int mq_cuda_sort_keys(mq_sort_key key, int64_t k, const int64_t *count,
                                 const mq_channel_stats *stats, double *keys, void *stream) {
    return launch(sort_keys, blocks_for(k), 0, stream, key, k, count, *stats, keys);
}

extern "C" int mq_cuda_argsort(const double *keys, int64_t k, int descending, int64_t *indices,
                               void *stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(k, kThreads)));
    return launch(argsort, grid, 0, stream, keys, k, descending != 0, indices);
}
