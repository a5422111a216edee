// The torch ops on CUDA. Each op unboxes, validates, allocates, enqueues one function's kernels on
// the current stream of its tensors' device, and maps its status. No arithmetic.
//
// A separate shared library, smoothquant/_cuda*.so, because it needs libtorch_cuda. It is loaded
// only where there is a GPU. Only pack_weight waits for the device; CUDA graphs may capture all
// other ops.
#define USE_CUDA  // makes torch's headers declare the functions of libtorch_cuda

#include <algorithm>
#include <array>
#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cuda/mixedquant_cuda.h"
#include "arguments.h"

namespace {

using namespace mixedquant;

// The longest group whose products, below 8 * 2^act_bits, fit in an int32 sum when multiplied by 16
// (mixedquant_cuda.h).
int64_t longest_group(const mq_linear &lin) { return (1 << 24) >> lin.act_bits; }

Op on_device_of(const char *name, const char *argument, const Tensor &t) {
    if (!t.is_cuda())
        fail({name}, argument, " must be on the CUDA device of the other arguments; got shape ",
             shape_text(t), " elsewhere");
    return {name, t.get_device_index()};
}

[[noreturn]] void fail_on_device(const Op &op, int error) {
    throw std::runtime_error(message_of(op, "CUDA: ", mq_cuda_message(error)));
}

void check_launch(const Op &op, int error) {
    if (error) fail_on_device(op, error);
}

// Returns the architecture of the current device, which must be op's. Cached per device.
int arch_of(const Op &op) {
    static std::array<std::atomic<int>, 256> known{};
    auto &arch = known.at(static_cast<size_t>(op.cuda_device));
    if (!arch) {
        int found = 0;
        const int error = mq_cuda_arch(&found);
        if (error && found)
            throw std::runtime_error(message_of(
                op, "this build has no kernels for the GPU cuda:", op.cuda_device,
                " of compute capability ", found / 10, '.', found % 10,
                "; it has kernels for " MQ_BUILD_CUDA_ARCHS " (", mq_cuda_message(error), ")"));
        check_launch(op, error);
        arch = found;
    }
    return arch;
}

// Makes op's device the current one in its scope.
struct Queue {
    stable::accelerator::DeviceGuard device;
    int arch;
    void *stream = nullptr;

    explicit Queue(const Op &op) : device(op.cuda_device), arch(arch_of(op)) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(op.cuda_device, &stream));
    }
};

// ---- Channel statistics and sorting ----

void channel_stats_update(Tensor x, Tensor count, Tensor abs_max, Tensor minimum, Tensor abs_sum,
                          Tensor sq_sum, Tensor argmax) {
    const Op op = on_device_of("channel_stats_update", "x", x);
    const Queue queue(op);
    const mq_dtype dtype = dtype_of(op, "x", x);
    const Matrix m = matrix(op, "x", x);
    const mq_channel_stats stats =
        stats_to_update(op, m.cols, count, abs_max, minimum, abs_sum, sq_sum, argmax);
    check_launch(
        op, mq_cuda_channel_stats_update(dtype, m.tensor.const_data_ptr(), m.rows, m.cols,
                                         count.mutable_data_ptr<int64_t>(), &stats, queue.stream));
}

// Unlike on the CPU, a negative count is not detected: reading it would wait for the device.
Tensor sort_keys(Tensor count, Tensor abs_max, Tensor abs_sum, Tensor sq_sum, Tensor argmax,
                 std::string key) {
    const Op op = on_device_of("sort_keys", "count", count);
    const Queue queue(op);
    const mq_sort_key by = sort_key_of(op, key);
    const mq_channel_stats stats = stats_to_sort(op, count, abs_max, abs_sum, sq_sum, argmax);
    const int64_t k = abs_max.size(0);
    Tensor keys = allocate(abs_max, {k}, ScalarType::Double);
    check_launch(op, mq_cuda_sort_keys(by, k, count.const_data_ptr<int64_t>(), &stats,
                                       keys.mutable_data_ptr<double>(), queue.stream));
    return keys;
}

Tensor argsort(Tensor keys, bool descending) {
    const Op op = on_device_of("argsort", "keys", keys);
    const Queue queue(op);
    keys = expect(op, "keys", keys, ScalarType::Double, {-1});
    const int64_t k = keys.size(0);
    Tensor indices = allocate(keys, {k}, ScalarType::Long);
    check_launch(op, mq_cuda_argsort(keys.const_data_ptr<double>(), k, descending,
                                     indices.mutable_data_ptr<int64_t>(), queue.stream));
    return indices;
}

// ---- Group quantization ----

std::tuple<Tensor, Tensor> group_quantize(Tensor x, int64_t group_size, int64_t num_bits,
                                          bool is_unsigned) {
    const Op op = on_device_of("group_quantize", "x", x);
    const Queue queue(op);
    const mq_group_format format =
        group_format(op, group_size, num_bits, is_unsigned ? MQ_ACT_UNSIGNED : MQ_ACT_SYMMETRIC);
    const mq_dtype dtype = dtype_of(op, "x", x);
    const Matrix m = matrix(op, "x", x);
    Tensor q =
        allocate(x, shape_with_last(x, m.cols), is_unsigned ? ScalarType::Byte : ScalarType::Char);
    Tensor scales =
        allocate(x, shape_with_last(x, mq_ceil_div(m.cols, group_size)), ScalarType::Float);
    check_launch(op, mq_cuda_group_quantize(&format, dtype, m.tensor.const_data_ptr(), m.rows,
                                            m.cols, static_cast<int8_t *>(q.mutable_data_ptr()),
                                            scales.mutable_data_ptr<float>(), queue.stream));
    return {q, scales};
}

Tensor group_dequantize(Tensor q, Tensor scales, int64_t group_size, ScalarType out_dtype) {
    const Op op = on_device_of("group_dequantize", "q", q);
    const Queue queue(op);
    const mq_group_format format = group_format(op, group_size, 8, code_format(op, q));
    require_float(op, "dtype", out_dtype);
    const Matrix m = matrix(op, "q", q);
    scales = expect(op, "scales", scales, ScalarType::Float,
                    shape_with_last(q, mq_ceil_div(m.cols, group_size)));
    Tensor out = allocate(q, shape_with_last(q, m.cols), out_dtype);
    check_launch(op, mq_cuda_group_dequantize(
                         &format, static_cast<const int8_t *>(m.tensor.const_data_ptr()),
                         scales.const_data_ptr<float>(), m.rows, m.cols, dtype_of(op, "out", out),
                         out.mutable_data_ptr(), queue.stream));
    return out;
}

Tensor group_fake_quantize(Tensor x, int64_t group_size, int64_t num_bits, std::string act_format,
                           double clip) {
    const Op op = on_device_of("group_fake_quantize", "x", x);
    const Queue queue(op);
    const mq_group_format format =
        group_format(op, group_size, num_bits, act_format_of(op, act_format), clip);
    const mq_dtype dtype = dtype_of(op, "x", x);
    const Matrix m = matrix(op, "x", x);
    Tensor out = allocate(x, shape_with_last(x, m.cols), x.scalar_type());
    check_launch(op, mq_cuda_group_fake_quantize(&format, dtype, m.tensor.const_data_ptr(), m.rows,
                                                 m.cols, out.mutable_data_ptr(), queue.stream));
    return out;
}

Tensor group_hadamard(Tensor x, int64_t group_size, int64_t rotation) {
    const Op op = on_device_of("group_hadamard", "x", x);
    const Queue queue(op);
    require(group_size >= 1, op, "group_size must be at least 1; got ", group_size);
    check_rotation(op, rotation);
    const mq_dtype dtype = dtype_of(op, "x", x);
    const Matrix m = matrix(op, "x", x);
    Tensor out = allocate(x, shape_with_last(x, m.cols), x.scalar_type());
    check_launch(op, mq_cuda_group_hadamard(group_size, rotation, dtype, m.tensor.const_data_ptr(),
                                            m.rows, m.cols, out.mutable_data_ptr(), queue.stream));
    return out;
}

Tensor pack_nibbles(Tensor q) {
    const Op op = on_device_of("pack_nibbles", "q", q);
    const Queue queue(op);
    code_format(op, q);
    const Matrix m = matrix(op, "q", q);
    Tensor packed = allocate(q, shape_with_last(q, mq_ceil_div(m.cols, 2)), ScalarType::Byte);
    check_launch(
        op, mq_cuda_pack_nibbles(static_cast<const int8_t *>(m.tensor.const_data_ptr()), m.rows,
                                 m.cols, packed.mutable_data_ptr<uint8_t>(), queue.stream));
    return packed;
}

Tensor unpack_nibbles(Tensor packed, int64_t cols, bool is_unsigned) {
    const Op op = on_device_of("unpack_nibbles", "packed", packed);
    const Queue queue(op);
    const Matrix m = nibbles_of(op, packed, cols);
    Tensor q = allocate(packed, shape_with_last(packed, cols),
                        is_unsigned ? ScalarType::Byte : ScalarType::Char);
    check_launch(
        op, mq_cuda_unpack_nibbles(m.tensor.const_data_ptr<uint8_t>(), m.rows, cols, is_unsigned,
                                   static_cast<int8_t *>(q.mutable_data_ptr()), queue.stream));
    return q;
}

// ---- Weights ----

std::tuple<Tensor, Tensor, Tensor, std::optional<Tensor>> pack_weight(
    Tensor w, Tensor perm, int64_t num_salient, int64_t group_size, int64_t rotation,
    int64_t num_bits, std::optional<Tensor> group_scales, ScalarType salient_dtype) {
    const Op op = on_device_of("pack_weight", "w", w);
    const Queue queue(op);
    Packing to = packing_of(op, w, perm, num_salient, group_size, rotation, num_bits, group_scales,
                            salient_dtype);
    // errors found on the device, and how often each channel is in perm
    Tensor notes = stable::new_zeros(w, {1 + to.lin.k}, ScalarType::Int);
    int *status = notes.mutable_data_ptr<int>();
    check_launch(op, mq_cuda_pack_weight(&to.lin, to.q_max, to.dtype, to.w.tensor.const_data_ptr(),
                                         to.group_scales, to.qweight_out(), to.scales_out(),
                                         to.salient.mutable_data_ptr(), to.salient_scales_out(),
                                         status + 1, status, queue.stream));
    int bad = 0;
    check_launch(op, mq_cuda_read_int(status, &bad, queue.stream));
    require(!(bad & MQ_CUDA_BAD_PERM), op, "perm must hold every channel in [0, ", to.lin.k,
            ") once");
    if (bad & MQ_CUDA_BAD_WEIGHT) check(op, MQ_NON_FINITE);
    if (bad & MQ_CUDA_BAD_SCALE) check(op, MQ_INVALID_SCALE);
    return {to.qweight, to.scales, to.salient, to.salient_scales};
}

Tensor unpack_weight(Tensor qweight, Tensor scales, Tensor salient,
                     std::optional<Tensor> salient_scales, Tensor perm, int64_t out_features,
                     int64_t group_size, int64_t rotation) {
    const Op op = on_device_of("unpack_weight", "qweight", qweight);
    const Queue queue(op);
    mq_shape shape;
    const mq_linear lin = packed_layer(op, qweight, scales, salient, salient_scales, perm,
                                       out_features, group_size, rotation, &shape);
    // an index that is no channel, or a repeated one, leaves another channel unwritten
    Tensor w = stable::new_zeros(qweight, {out_features, lin.k}, ScalarType::Float);
    check_launch(op, mq_cuda_unpack_rows(&lin, nullptr, out_features, w.mutable_data_ptr<float>(),
                                         queue.stream));
    return w;
}

Tensor unpack_rows(Tensor qweight, Tensor scales, Tensor salient,
                   std::optional<Tensor> salient_scales, Tensor perm, Tensor rows,
                   int64_t out_features, int64_t group_size, int64_t rotation) {
    const Op op = on_device_of("unpack_rows", "qweight", qweight);
    const Queue queue(op);
    mq_shape shape;
    const mq_linear lin = packed_layer(op, qweight, scales, salient, salient_scales, perm,
                                       out_features, group_size, rotation, &shape);
    rows = expect(op, "rows", rows, ScalarType::Long, {-1});
    require(out_features > 0 || rows.size(0) == 0, op, "rows must be in [0, 0)");
    // as in unpack_weight
    Tensor w = stable::new_zeros(qweight, {rows.size(0), lin.k}, ScalarType::Float);
    check_launch(op, mq_cuda_unpack_rows(&lin, rows.const_data_ptr<int64_t>(), rows.size(0),
                                         w.mutable_data_ptr<float>(), queue.stream));
    return w;
}

Tensor gptq_block(Tensor w, Tensor u, Tensor scales, int64_t col0, int64_t group_size,
                  int64_t num_bits) {
    const Op op = on_device_of("gptq_block", "w", w);
    const Queue queue(op);
    const Columns c = check_columns(op, w, scales, col0, group_size, num_bits);
    u = expect(op, "u", u, ScalarType::Float, {c.cols, c.cols});
    scales = expect(op, "scales", scales, ScalarType::Float, {c.rows, c.groups});
    Tensor errors = allocate(w, {c.rows, c.cols}, ScalarType::Float);
    if (c.cols == 0) return errors;
    check_launch(op, mq_cuda_gptq_block(c.q_max, c.rows, c.cols, col0, group_size, c.groups,
                                        scales.const_data_ptr<float>(), u.const_data_ptr<float>(),
                                        w.mutable_data_ptr<float>(),
                                        errors.mutable_data_ptr<float>(), queue.stream));
    return errors;
}

void descend_block(Tensor w, Tensor gradient, Tensor h, Tensor scales, int64_t col0,
                   int64_t group_size, int64_t num_bits) {
    const Op op = on_device_of("descend_block", "w", w);
    const Queue queue(op);
    const Columns c = check_columns(op, w, scales, col0, group_size, num_bits);
    expect_out(op, "gradient", gradient, ScalarType::Float, {c.rows, c.cols});
    h = expect(op, "h", h, ScalarType::Float, {c.cols, c.cols});
    scales = expect(op, "scales", scales, ScalarType::Float, {c.rows, c.groups});
    if (c.cols == 0) return;
    check_launch(
        op, mq_cuda_descend_block(c.q_max, c.rows, c.cols, col0, group_size, c.groups,
                                  scales.const_data_ptr<float>(), h.const_data_ptr<float>(),
                                  gradient.mutable_data_ptr<float>(), w.mutable_data_ptr<float>(),
                                  queue.stream));
}

// ---- Which kernel multiplies ----

std::atomic<int> forced_kernel{-1};  // row of the table; -1: the table chooses

// Returns names, and five limits per kernel, flattened, with -1 for none; see
// smoothquant.ops.CudaKernel.
std::tuple<std::vector<std::string>, std::vector<int64_t>> cuda_kernels() {
    std::vector<std::string> names;
    std::vector<int64_t> limits;
    for (int i = 0; i < mq_cuda_kernel_count(); i++) {
        const mq_cuda_kernel &row = *mq_cuda_kernel_at(i);
        names.emplace_back(row.name);
        limits.insert(limits.end(), {row.oldest, row.newest < INT32_MAX ? row.newest : -1,
                                     row.most_tokens < INT64_MAX ? row.most_tokens : -1,
                                     row.group_multiple, row.most_act_bits});
    }
    return {names, limits};
}

std::optional<std::string> forced_cuda_kernel() {
    const mq_cuda_kernel *row = mq_cuda_kernel_at(forced_kernel);
    return row ? std::optional<std::string>(row->name) : std::nullopt;
}

void set_cuda_kernel(std::optional<std::string> name) {
    int found = -1;
    std::string known;
    for (int i = 0; i < mq_cuda_kernel_count(); i++) {
        const std::string of_row = mq_cuda_kernel_at(i)->name;
        if (of_row == name) found = i;
        known += (i ? ", " : "") + of_row;
    }
    require(!name || found >= 0, {"set_cuda_kernel"}, "name must be None or one of ", known,
            "; got '", name.value_or(""), "'");
    forced_kernel = found;
}

int kernel_for(const Op &op, const mq_linear &lin, int arch, int64_t m) {
    const int forced = forced_kernel;
    const int kernel = forced < 0 ? mq_cuda_kernel_for(&lin, arch, m) : forced;
    if (kernel < 0)
        throw std::runtime_error(
            message_of(op, "this build has no kernel for this layer on architecture ", arch));
    const mq_cuda_kernel &row = *mq_cuda_kernel_at(kernel);
    require(mq_cuda_kernel_serves(kernel, &lin, arch), op, "the forced kernel '", row.name,
            "' is for architectures ", row.oldest, " to ", row.newest,
            ", group_size a multiple of ", row.group_multiple,
            " or all in one group, act_bits up to ", row.most_act_bits, "; got architecture ", arch,
            ", group_size ", lin.group_size, ", act_bits ", lin.act_bits);
    return kernel;
}

// ---- The W4A4 linear ----

// The number of tokens decides which kernel multiplies, and so the layout of quantized tokens.
// Writing that into the tensor, or reading it back, would wait for the device.
[[noreturn]] void fail_to_share(const Op &op) {
    fail(op, "quantized_input must be None on CUDA, where every layer quantizes its own input");
}

Tensor quantize_input(Tensor x, Tensor, int64_t, int64_t, int64_t, int64_t, std::string, bool,
                      double) {
    fail_to_share(on_device_of("quantize_input", "x", x));
}

Tensor w4a4_linear(Tensor x, Tensor qweight, Tensor scales, Tensor salient,
                   std::optional<Tensor> salient_scales, Tensor perm, std::optional<Tensor> bias,
                   int64_t out_features, int64_t group_size, int64_t rotation, int64_t num_bits,
                   std::string act_format, bool per_token, double clip,
                   std::optional<Tensor> quantized_input) {
    const Op op = on_device_of("w4a4_linear", "x", x);
    if (quantized_input) fail_to_share(op);
    const Queue queue(op);
    const mq_dtype dtype = dtype_of(op, "x", x);
    mq_shape shape;
    mq_linear lin = packed_layer(op, qweight, scales, salient, salient_scales, perm, out_features,
                                 group_size, rotation, &shape);
    const Matrix m = tokens_of(op, lin, x);
    set_activations(op, &lin, num_bits, act_format, per_token, clip);
    set_bias(op, &lin, bias);
    require(std::min(lin.group_size, lin.k - lin.k_salient) <= longest_group(lin), op,
            "group_size may be up to ", longest_group(lin), " on CUDA; got ", group_size);

    require(m.rows <= INT32_MAX, op, "x may have up to 2^31 - 1 tokens on CUDA; got shape ",
            shape_text(x));

    Tensor y = allocate(x, shape_with_last(x, out_features), x.scalar_type());
    if (m.rows == 0 || out_features == 0) return y;
    const int kernel = kernel_for(op, lin, queue.arch, m.rows);
    const size_t bytes = mq_cuda_linear_workspace(&lin, kernel, dtype, m.rows);
    // freed before the kernels have run: torch's allocator reuses it in stream order
    Tensor workspace = allocate(x, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
    void *space = workspace.mutable_data_ptr();
    check_launch(op, mq_cuda_linear_quantize(&lin, kernel, dtype, m.tensor.const_data_ptr(), m.rows,
                                             space, queue.stream));
    check_launch(op, mq_cuda_linear_multiply(&lin, kernel, dtype, queue.arch, space, m.rows,
                                             y.mutable_data_ptr(), queue.stream));
    return y;
}

}  // namespace

// Control of this library's kernels. Without tensors there is no device to dispatch on.
STABLE_TORCH_LIBRARY(mixedquant_cuda, m) {
    m.def("kernels() -> (str[], int[])");
    m.def("forced_kernel() -> str?");
    m.def("set_kernel(str? name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mixedquant_cuda, CompositeExplicitAutograd, m) {
    m.impl("kernels", TORCH_BOX(&cuda_kernels));
    m.impl("forced_kernel", TORCH_BOX(&forced_cuda_kernel));
    m.impl("set_kernel", TORCH_BOX(&set_cuda_kernel));
}

// library.cpp, which is loaded first, defines the other schemas.
STABLE_TORCH_LIBRARY_IMPL(mixedquant, CUDA, m) {
    m.impl("channel_stats_update", TORCH_BOX(&channel_stats_update));
    m.impl("sort_keys", TORCH_BOX(&sort_keys));
    m.impl("argsort", TORCH_BOX(&argsort));
    m.impl("group_quantize", TORCH_BOX(&group_quantize));
    m.impl("group_dequantize", TORCH_BOX(&group_dequantize));
    m.impl("group_fake_quantize", TORCH_BOX(&group_fake_quantize));
    m.impl("group_hadamard", TORCH_BOX(&group_hadamard));
    m.impl("pack_nibbles", TORCH_BOX(&pack_nibbles));
    m.impl("unpack_nibbles", TORCH_BOX(&unpack_nibbles));
    m.impl("pack_weight", TORCH_BOX(&pack_weight));
    m.impl("gptq_block", TORCH_BOX(&gptq_block));
    m.impl("descend_block", TORCH_BOX(&descend_block));
    m.impl("unpack_weight", TORCH_BOX(&unpack_weight));
    m.impl("unpack_rows", TORCH_BOX(&unpack_rows));
    m.impl("w4a4_linear", TORCH_BOX(&w4a4_linear));
    m.impl("quantize_input", TORCH_BOX(&quantize_input));
}
