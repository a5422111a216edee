// The two steps of the linear, and the table of multiplying kernels.
#include "multiply.cuh"
#include "quantize.cuh"

using namespace mq;

namespace {

#ifdef __CUDACC__
// Probes for code for this device: a build has all kernels for it, or none.
__global__ void probe() {}
#endif

constexpr int kAny = INT32_MAX;  // any architecture

struct row {
    mq_cuda_kernel kernel;
    quad_order order;  // of the workspace
    int (*multiply)(const multiply_args &args, int arch, void *stream);
};

// In order of preference.
const row kTable[] = {
    {{"decode_8", 75, kAny, 8, 1, 8}, IN_ORDER, mq_multiply_decode_8},
    {{"decode_16", 75, kAny, 16, 1, 8}, IN_ORDER, mq_multiply_decode_16},
    {{"decode_32", 75, kAny, 64, 1, 8}, IN_ORDER, mq_multiply_decode_32},
    {{"prefill_s4", 75, 89, INT64_MAX, 1, 4}, NIBBLES, mq_multiply_prefill_s4},
#ifdef MQ_BUILD_WGMMA
    {{"prefill_wgmma", 90, 90, INT64_MAX, 128, 8}, EVEN_FIRST, mq_multiply_prefill_wgmma},
#endif
    {{"prefill_s8", 75, kAny, INT64_MAX, 1, 8}, IN_ORDER, mq_multiply_prefill_s8},
};
constexpr int kKernels = sizeof kTable / sizeof *kTable;

// What mixedquant_cuda.h requires of the callers of both steps.
void assume_step(const mq_linear &lin, int kernel, mq_dtype dtype, int64_t m,
                 const void *workspace) {
    MQ_ASSUME(0 <= kernel && kernel < kKernels);
    MQ_ASSUME(dtype <= MQ_BF16 && m >= 0);
    MQ_ASSUME(2 <= lin.act_bits && lin.act_bits <= 8);
    MQ_ASSUME(smaller(lin.group_size, lin.k - lin.k_salient) <= (1 << 24) >> lin.act_bits);
    MQ_ASSUME(lin.n <= int64_t{65535} * 32);
    MQ_ASSUME(MQ_IS_ALIGNED(workspace, 16) && MQ_IS_ALIGNED(lin.perm, 16));
    MQ_ASSUME(MQ_IS_ALIGNED(lin.qweight, 16) && MQ_IS_ALIGNED(lin.scales, 16));
    MQ_ASSUME(MQ_IS_ALIGNED(lin.salient, 16) && MQ_IS_ALIGNED(lin.salient_scales, 16));
}

}  // namespace

extern "C" const char *mq_cuda_message(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

extern "C" int mq_cuda_read_int(const int *at, int *value, void *stream) {
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    const int error = cudaMemcpyAsync(value, at, sizeof *value, cudaMemcpyDeviceToHost, on);
    return error ? error : cudaStreamSynchronize(on);
}

extern "C" int mq_cuda_arch(int *arch) {
#ifdef __CUDACC__
    int device, major, minor;
    int error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error) return error;
    *arch = 10 * major + minor;
    cudaFuncAttributes unused;
    error = cudaFuncGetAttributes(&unused, probe);
    cudaGetLastError();  // clears the error, so that the next launch does not report it again
    return error;
#else
    *arch = MQ_ARCH;
    return cudaSuccess;
#endif
}

extern "C" int mq_cuda_kernel_count(void) { return kKernels; }

extern "C" const mq_cuda_kernel *mq_cuda_kernel_at(int kernel) {
    return kernel >= 0 && kernel < kKernels ? &kTable[kernel].kernel : nullptr;
}

extern "C" int mq_cuda_kernel_serves(int kernel, const mq_linear *lin, int arch) {
    const mq_cuda_kernel *row = mq_cuda_kernel_at(kernel);
    if (!row || arch < row->oldest || arch > row->newest) return 0;
    if (lin->act_bits > row->most_act_bits) return 0;
    return lin->group_size % row->group_multiple == 0 || lin->group_size >= lin->k - lin->k_salient;
}

extern "C" int mq_cuda_kernel_for(const mq_linear *lin, int arch, int64_t m) {
    for (int i = 0; i < kKernels; i++)
        if (m <= kTable[i].kernel.most_tokens && mq_cuda_kernel_serves(i, lin, arch)) return i;
    return -1;
}

extern "C" size_t mq_cuda_linear_workspace(const mq_linear *lin, int kernel, mq_dtype dtype,
                                           int64_t m) {
    size_t bytes = 0;
    tokens_in(nullptr, *lin, kTable[kernel].order, dtype, m, &bytes);
    return bytes;
}

extern "C" int mq_cuda_linear_quantize(const mq_linear *lin, int kernel, mq_dtype dtype,
                                       const void *x, int64_t m, void *workspace, void *stream) {
    assume_step(*lin, kernel, dtype, m, workspace);
    MQ_ASSUME(MQ_IS_ALIGNED(x, 16));
    const tokens to = tokens_in(workspace, *lin, kTable[kernel].order, dtype, m, nullptr);
    return mq_quantize(*lin, to, dtype, x, stream);
}

extern "C" int mq_cuda_linear_multiply(const mq_linear *lin, int kernel, mq_dtype dtype, int arch,
                                       const void *workspace, int64_t m, void *out, void *stream) {
    assume_step(*lin, kernel, dtype, m, workspace);
    MQ_ASSUME(mq_cuda_kernel_serves(kernel, lin, arch));
    multiply_args args = {};
    args.lin = *lin;
    args.shape = shape_of(*lin);
    args.slot = slots_of(args.shape);
    // only read from here on
    args.from =
        tokens_in(const_cast<void *>(workspace), *lin, kTable[kernel].order, dtype, m, nullptr);
    args.dtype = dtype;
    args.out = out;
    return kTable[kernel].multiply(args, arch, stream);
}
