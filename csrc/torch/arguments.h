// Checks the arguments of the ops on every device and converts them to the C structs.
#ifndef MQ_TORCH_ARGUMENTS_H
#define MQ_TORCH_ARGUMENTS_H

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../mixedquant.h"
#include "../sizes.h"

namespace mixedquant {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace stable = torch::stable;

// An op's name, for errors, and the device of all its tensors.
struct Op {
    const char *name;
    int cuda_device = -1;  // -1: on the CPU

    bool has(const Tensor &t) const {
        return cuda_device < 0 ? t.is_cpu() : t.is_cuda() && t.get_device_index() == cuda_device;
    }
    std::string place() const {
        return cuda_device < 0 ? "the CPU" : "cuda:" + std::to_string(cuda_device);
    }
};

// ---- Errors ----

template <typename... Parts>
std::string message_of(const Op &op, const Parts &...parts) {
    std::ostringstream message;
    message << "mixedquant::" << op.name << ": ";
    (message << ... << parts);
    return message.str();
}

// Reports a mistake of the user's, as ValueError.
template <typename... Parts>
[[noreturn]] void fail(const Op &op, const Parts &...parts) {
    throw std::invalid_argument(message_of(op, parts...));
}

template <typename... Parts>
void require(bool condition, const Op &op, const Parts &...parts) {
    if (!condition) fail(op, parts...);
}

inline void check(const Op &op, mq_status status) {
    if (status != MQ_OK) fail(op, mq_status_message(status));
}

// ---- Tensors ----

inline std::string shape_text(const Tensor &t) {
    std::ostringstream text;
    text << '[';
    for (int64_t i = 0; i < t.dim(); i++) text << (i ? ", " : "") << t.size(i);
    text << ']';
    return text.str();
}

inline mq_dtype dtype_of(const Op &op, const char *name, const Tensor &t) {
    switch (t.scalar_type()) {
        case ScalarType::Float: return MQ_F32;
        case ScalarType::Half: return MQ_F16;
        case ScalarType::BFloat16: return MQ_BF16;
        default:
            fail(op, name, " must be float32, float16 or bfloat16; got ",
                 torch::headeronly::toString(t.scalar_type()));
    }
}

inline ScalarType require_float(const Op &op, const char *name, ScalarType dtype) {
    require(
        dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
        op, name, " must be float32, float16 or bfloat16; got ",
        torch::headeronly::toString(dtype));
    return dtype;
}

inline void require_place(const Op &op, const char *name, const Tensor &t) {
    if (!op.has(t))
        fail(op, name, " must be on ", op.place(), ", like the other arguments; got shape ",
             shape_text(t), " elsewhere");
}

inline void require_shape(const Op &op, const char *name, const Tensor &t, ScalarType dtype,
                          const std::vector<int64_t> &shape) {
    require_place(op, name, t);
    require(t.scalar_type() == dtype, op, name, " must be ", torch::headeronly::toString(dtype),
            "; got ", torch::headeronly::toString(t.scalar_type()));
    bool same = t.dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; same && i < shape.size(); i++)
        same = shape[i] < 0 || t.size(static_cast<int64_t>(i)) == shape[i];
    if (same) return;
    std::ostringstream want;
    for (size_t i = 0; i < shape.size(); i++) {
        want << (i ? ", " : "");
        if (shape[i] < 0)
            want << '*';
        else
            want << shape[i];
    }
    fail(op, name, " must have shape [", want.str(), "]; got ", shape_text(t));
}

inline bool is_aligned(const Tensor &t, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % bytes == 0;
}

// Tensors over memory that torch did not allocate may lie anywhere.
inline bool has_aligned_elements(const Tensor &t) {
    switch (t.scalar_type()) {
        case ScalarType::Byte:
        case ScalarType::Char: return true;
        case ScalarType::Half:
        case ScalarType::BFloat16: return is_aligned(t, 2);
        case ScalarType::Float:
        case ScalarType::Int: return is_aligned(t, 4);
        default: return is_aligned(t, 8);
    }
}

// Returns t as kernels read it: contiguous and aligned, to 16 bytes on CUDA.
inline Tensor readable(const Op &op, const Tensor &t) {
    if (!t.is_contiguous()) return stable::contiguous(t);
    const bool aligned = op.cuda_device < 0 ? has_aligned_elements(t) : is_aligned(t, 16);
    return aligned ? t : stable::clone(t);
}

// Checks dtype and shape (-1: any size); returns t as kernels read it.
inline Tensor expect(const Op &op, const char *name, const Tensor &t, ScalarType dtype,
                     const std::vector<int64_t> &shape) {
    require_shape(op, name, t, dtype, shape);
    return readable(op, t);
}

// The same for an output argument, which is written in place and so cannot be copied.
inline void expect_out(const Op &op, const char *name, const Tensor &t, ScalarType dtype,
                       const std::vector<int64_t> &shape) {
    require_shape(op, name, t, dtype, shape);
    require(t.is_contiguous(), op, name, " must be contiguous");
    require(has_aligned_elements(t), op, name, " must be aligned to its dtype in memory");
}

// x [..., cols] as a contiguous [rows][cols].
struct Matrix {
    Tensor tensor;
    int64_t rows, cols;
};

inline Matrix matrix(const Op &op, const char *name, const Tensor &t) {
    require_place(op, name, t);
    require(t.dim() >= 1, op, name, " must have at least one dimension; got a scalar");
    Matrix m{readable(op, t), 1, t.size(t.dim() - 1)};
    for (int64_t i = 0; i + 1 < t.dim(); i++) m.rows = mq_size_product(m.rows, t.size(i));
    require(m.rows >= 0, op, name, " must have less than 2^63 rows; got shape ", shape_text(t));
    return m;
}

inline std::vector<int64_t> shape_with_last(const Tensor &t, int64_t last) {
    std::vector<int64_t> shape;
    for (int64_t i = 0; i + 1 < t.dim(); i++) shape.push_back(t.size(i));
    shape.push_back(last);
    return shape;
}

inline Tensor allocate(const Tensor &like, const std::vector<int64_t> &shape, ScalarType dtype) {
    return stable::new_empty(like, shape, dtype);
}

// ---- Statistics ----

// Running statistics of k channels, to be updated.
inline mq_channel_stats stats_to_update(const Op &op, int64_t k, const Tensor &count,
                                        const Tensor &abs_max, const Tensor &minimum,
                                        const Tensor &abs_sum, const Tensor &sq_sum,
                                        const Tensor &argmax) {
    expect_out(op, "count", count, ScalarType::Long, {});
    expect_out(op, "abs_max", abs_max, ScalarType::Float, {k});
    expect_out(op, "minimum", minimum, ScalarType::Float, {k});
    expect_out(op, "abs_sum", abs_sum, ScalarType::Double, {k});
    expect_out(op, "sq_sum", sq_sum, ScalarType::Double, {k});
    expect_out(op, "argmax", argmax, ScalarType::Long, {k});
    return {abs_max.mutable_data_ptr<float>(), minimum.mutable_data_ptr<float>(),
            abs_sum.mutable_data_ptr<double>(), sq_sum.mutable_data_ptr<double>(),
            argmax.mutable_data_ptr<int64_t>()};
}

// The same, read-only. The result points into the arguments, which it may replace.
inline mq_channel_stats stats_to_sort(const Op &op, Tensor &count, Tensor &abs_max, Tensor &abs_sum,
                                      Tensor &sq_sum, Tensor &argmax) {
    require(abs_max.dim() == 1, op, "abs_max must be a vector; got shape ", shape_text(abs_max));
    const int64_t k = abs_max.size(0);
    count = expect(op, "count", count, ScalarType::Long, {});
    abs_max = expect(op, "abs_max", abs_max, ScalarType::Float, {k});
    abs_sum = expect(op, "abs_sum", abs_sum, ScalarType::Double, {k});
    sq_sum = expect(op, "sq_sum", sq_sum, ScalarType::Double, {k});
    argmax = expect(op, "argmax", argmax, ScalarType::Long, {k});
    // the C struct also serves updates
    return {const_cast<float *>(abs_max.const_data_ptr<float>()), nullptr,
            const_cast<double *>(abs_sum.const_data_ptr<double>()),
            const_cast<double *>(sq_sum.const_data_ptr<double>()),
            const_cast<int64_t *>(argmax.const_data_ptr<int64_t>())};
}

inline mq_sort_key sort_key_of(const Op &op, const std::string &key) {
    static const char *const names[] = {"argmax", "max", "mean3std", "rms"};
    int index = 0;
    while (index < 4 && key != names[index]) index++;
    require(index < 4, op, "key must be argmax, max, mean3std or rms; got '", key, "'");
    return static_cast<mq_sort_key>(index);
}

// ---- Groups ----

inline mq_act_format act_format_of(const Op &op, const std::string &name) {
    static const char *const names[] = {"symmetric", "unsigned", "zero_point"};
    for (int format = 0; format < 3; format++)
        if (name == names[format]) return static_cast<mq_act_format>(format);
    fail(op, "act_format must be symmetric, unsigned or zero_point; got '", name, "'");
}

inline float check_clip(const Op &op, double clip) {
    require(clip >= MQ_MIN_CLIP && clip <= 1, op, "clip must be in [2^-10, 1]; got ", clip);
    return static_cast<float>(clip);
}

inline mq_group_format group_format(const Op &op, int64_t group_size, int64_t num_bits,
                                    mq_act_format act_format, double clip = 1) {
    require(group_size >= 1, op, "group_size must be at least 1; got ", group_size);
    const int most = act_format == MQ_ACT_ZERO_POINT ? 7 : 8;
    require(num_bits >= 2 && num_bits <= most, op, "num_bits must be in [2, ", most, "]; got ",
            num_bits);
    return {group_size, static_cast<int>(num_bits), act_format, check_clip(op, clip)};
}

inline void check_rotation(const Op &op, int64_t rotation) {
    require(rotation >= 0 && rotation <= MQ_MAX_ROTATION && (rotation & (rotation - 1)) == 0, op,
            "rotation must be 0 or a power of two up to ", MQ_MAX_ROTATION, "; got ", rotation);
}

// Codes are int8, or uint8 if unsigned.
inline mq_act_format code_format(const Op &op, const Tensor &q) {
    const bool is_unsigned = q.scalar_type() == ScalarType::Byte;
    require(is_unsigned || q.scalar_type() == ScalarType::Char, op, "q must be int8 or uint8; got ",
            torch::headeronly::toString(q.scalar_type()));
    return is_unsigned ? MQ_ACT_UNSIGNED : MQ_ACT_SYMMETRIC;
}

// packed nibbles; rows of `cols` codes
inline Matrix nibbles_of(const Op &op, const Tensor &packed, int64_t cols) {
    require(packed.scalar_type() == ScalarType::Byte, op, "packed must be uint8; got ",
            torch::headeronly::toString(packed.scalar_type()));
    Matrix m = matrix(op, "packed", packed);
    require(cols >= 0 && m.cols == mq_ceil_div(cols, 2), op,
            "cols must be two per byte of a row, or one less, for packed of shape ",
            shape_text(packed), "; got ", cols);
    return m;
}

// ---- The W4A4 linear ----

inline int check_bits(const Op &op, int64_t num_bits) {
    require(num_bits >= 2 && num_bits <= 4, op, "num_bits must be in [2, 4]; got ", num_bits);
    return static_cast<int>(num_bits);
}

inline int largest_code(const Op &op, int64_t num_bits) {
    return (1 << (check_bits(op, num_bits) - 1)) - 1;
}

// The fields that all linear ops share. n and k are given; perm's dtype and shape are checked. The
// caller sets isa.
inline mq_linear layer(const Op &op, int64_t n, int64_t k, int64_t num_salient, int64_t group_size,
                       int64_t rotation, const Tensor &perm, mq_shape *shape) {
    require(n >= 0, op, "out_features must not be negative; got ", n);
    require(num_salient >= 0 && num_salient <= k, op, "num_salient must be in [0, ", k, "]; got ",
            num_salient);
    require(group_size >= 1, op, "group_size must be at least 1; got ", group_size);
    check_rotation(op, rotation);
    mq_linear lin{};
    lin.n = n;
    lin.k = k;
    lin.k_salient = num_salient;
    lin.group_size = group_size;
    lin.rotation = static_cast<int>(rotation);
    lin.salient_dtype = MQ_BF16;
    lin.perm = perm.const_data_ptr<int32_t>();
    const mq_status status = mq_shape_of(n, k, num_salient, group_size, shape);
    require(status != MQ_INVALID_SIZE, op, "out_features must fit in memory; got ", n, " for ", k,
            " channels");
    check(op, status);
    return lin;
}

inline mq_dtype salient_dtype_of(const Op &op, ScalarType dtype) {
    switch (dtype) {
        case ScalarType::BFloat16: return MQ_BF16;
        case ScalarType::Half: return MQ_F16;
        case ScalarType::Char: return MQ_I8;
        default:
            fail(op, "salient dtype must be bfloat16, float16 or int8; got ",
                 torch::headeronly::toString(dtype));
    }
}

// Checks the packed tensors and points lin at them. The caller's arguments keep them alive.
inline mq_linear packed_layer(const Op &op, Tensor &qweight, Tensor &scales, Tensor &salient,
                              std::optional<Tensor> &salient_scales, Tensor &perm, int64_t n,
                              int64_t group_size, int64_t rotation, mq_shape *shape) {
    perm = expect(op, "perm", perm, ScalarType::Int, {-1});
    if (salient.dim() != 3)
        fail(op, "salient_weight must have three dimensions; got shape ", shape_text(salient));
    mq_linear lin = layer(op, n, perm.size(0), salient.size(1), group_size, rotation, perm, shape);
    lin.salient_dtype = salient_dtype_of(op, salient.scalar_type());
    qweight = expect(op, "qweight", qweight, ScalarType::Byte,
                     {shape->panels, shape->blocks, MQ_BLOCK_BYTES});
    scales = expect(op, "scales", scales, ScalarType::BFloat16,
                    {shape->panels, shape->groups, MQ_PANEL});
    salient = expect(op, "salient_weight", salient, salient.scalar_type(),
                     {shape->panels, lin.k_salient, MQ_PANEL});
    lin.qweight = qweight.const_data_ptr<uint8_t>();
    lin.scales = static_cast<const uint16_t *>(scales.const_data_ptr());
    lin.salient = salient.const_data_ptr();
    require(salient_scales.has_value() == (lin.salient_dtype == MQ_I8), op,
            "salient_scales must be given with an int8 salient_weight, and only then; it is ",
            torch::headeronly::toString(salient.scalar_type()));
    if (salient_scales) {
        salient_scales = expect(op, "salient_scales", *salient_scales, ScalarType::BFloat16,
                                {shape->panels, MQ_PANEL});
        lin.salient_scales = static_cast<const uint16_t *>(salient_scales->const_data_ptr());
    }
    return lin;
}

// A weight to pack, and the tensors to pack it into.
struct Packing {
    Matrix w;
    mq_dtype dtype;
    mq_linear lin;
    mq_shape shape;
    int q_max;
    const float *group_scales;  // or nullptr
    Tensor qweight, scales, salient;
    std::optional<Tensor> salient_scales;

    uint8_t *qweight_out() const { return qweight.mutable_data_ptr<uint8_t>(); }
    uint16_t *scales_out() const { return static_cast<uint16_t *>(scales.mutable_data_ptr()); }
    uint16_t *salient_scales_out() const {
        return salient_scales ? static_cast<uint16_t *>(salient_scales->mutable_data_ptr())
                              : nullptr;
    }
};

// The result points into perm and group_scales, which it may replace.
inline Packing packing_of(const Op &op, const Tensor &w, Tensor &perm, int64_t num_salient,
                          int64_t group_size, int64_t rotation, int64_t num_bits,
                          std::optional<Tensor> &group_scales, ScalarType salient_dtype) {
    const mq_dtype dtype = dtype_of(op, "w", w);
    require(w.dim() == 2, op, "w must be a matrix; got shape ", shape_text(w));
    const Matrix m = matrix(op, "w", w);
    perm = expect(op, "perm", perm, ScalarType::Int, {m.cols});
    const int q_max = largest_code(op, num_bits);
    mq_shape shape;
    mq_linear lin = layer(op, m.rows, m.cols, num_salient, group_size, rotation, perm, &shape);
    lin.salient_dtype = salient_dtype_of(op, salient_dtype);
    const float *given = nullptr;
    if (group_scales) {
        group_scales =
            expect(op, "group_scales", *group_scales, ScalarType::Float, {m.rows, shape.groups});
        given = group_scales->const_data_ptr<float>();
    }
    std::optional<Tensor> salient_scales;
    if (lin.salient_dtype == MQ_I8)
        // zeros, because nothing is written if there are no channels
        salient_scales = stable::new_zeros(w, {shape.panels, MQ_PANEL}, ScalarType::BFloat16);
    return {m,
            dtype,
            lin,
            shape,
            q_max,
            given,
            allocate(w, {shape.panels, shape.blocks, MQ_BLOCK_BYTES}, ScalarType::Byte),
            allocate(w, {shape.panels, shape.groups, MQ_PANEL}, ScalarType::BFloat16),
            allocate(w, {shape.panels, num_salient, MQ_PANEL}, salient_dtype),
            salient_scales};
}

// The quantization settings for x.
inline void set_activations(const Op &op, mq_linear *lin, int64_t num_bits,
                            const std::string &act_format, bool per_token, double clip) {
    lin->act_format = act_format_of(op, act_format);
    const int most = lin->act_format == MQ_ACT_SYMMETRIC ? 8 : 7;
    require(num_bits >= 2 && num_bits <= most, op, "num_bits must be in [2, ", most, "] for '",
            act_format, "' activations; got ", num_bits);
    lin->act_bits = static_cast<int>(num_bits);
    lin->per_token = per_token;
    lin->clip = check_clip(op, clip);
}

inline Matrix tokens_of(const Op &op, const mq_linear &lin, const Tensor &x) {
    Matrix m = matrix(op, "x", x);
    if (m.cols != lin.k) fail(op, "x must end in ", lin.k, " channels; got shape ", shape_text(x));
    return m;
}

// lin points into bias, which may be replaced.
inline void set_bias(const Op &op, mq_linear *lin, std::optional<Tensor> &bias) {
    if (!bias) return;
    lin->bias_dtype = dtype_of(op, "bias", *bias);
    bias = expect(op, "bias", *bias, bias->scalar_type(), {lin->n});
    lin->bias = bias->const_data_ptr();
}

// ---- The column loops ----

// Checks the shapes that both column loops share: a block w of columns from col0 on.
struct Columns {
    int64_t rows, cols, groups;
    int q_max;
};

inline Columns check_columns(const Op &op, const Tensor &w, const Tensor &scales, int64_t col0,
                             int64_t group_size, int64_t num_bits) {
    require(w.dim() == 2, op, "w must be a matrix; got shape ", shape_text(w));
    const int64_t rows = w.size(0), cols = w.size(1);
    expect_out(op, "w", w, ScalarType::Float, {rows, cols});
    require_shape(op, "scales", scales, ScalarType::Float, {rows, -1});
    require(col0 >= 0, op, "col0 must not be negative; got ", col0);
    require(group_size >= 1, op, "group_size must be at least 1; got ", group_size);
    const int64_t groups = scales.size(1);
    const int64_t end = mq_size_sum(col0, cols);
    require(end >= 0, op, "col0 must be at most 2^63 - 1 - ", cols, "; got ", col0);
    require(cols == 0 || mq_ceil_div(end, group_size) <= groups, op, "scales must have ",
            mq_ceil_div(end, group_size), " groups or more; got ", groups);
    return {rows, cols, groups, largest_code(op, num_bits)};
}

}  // namespace mixedquant

#endif
