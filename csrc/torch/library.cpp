// The torch ops: each unboxes, validates, allocates, runs one C function in parallel and maps its
// status. No arithmetic. Registered on libtorch's stable ABI, so one binary serves torch >= 2.10.
// Shapes, dtypes and errors of every op stand in smoothquant/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../mixedquant.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace stable = torch::stable;

// A split costs ten to twenty microseconds at best: at least this much work for each thread.
constexpr int64_t kGrainValues = 1 << 16;
constexpr int64_t kGrainProducts = 1 << 19;
constexpr int64_t kRowsPerTask = 240;

template <typename... Parts>
[[noreturn]] void fail(const char *op, const Parts &...parts) {
    std::ostringstream message;
    message << "mixedquant::" << op << ": ";
    (message << ... << parts);
    throw std::invalid_argument(message.str());
}

template <typename... Parts>
void require(bool condition, const char *op, const Parts &...parts) {
    if (!condition) fail(op, parts...);
}

void check(const char *op, mq_status status) {
    if (status != MQ_OK) fail(op, mq_status_message(status));
}

std::string shape_text(const Tensor &t) {
    std::ostringstream text;
    text << '[';
    for (int64_t i = 0; i < t.dim(); i++) text << (i ? ", " : "") << t.size(i);
    text << ']';
    return text.str();
}

mq_dtype dtype_of(const char *op, const char *name, const Tensor &t) {
    switch (t.scalar_type()) {
        case ScalarType::Float: return MQ_F32;
        case ScalarType::Half: return MQ_F16;
        case ScalarType::BFloat16: return MQ_BF16;
        default:
            fail(op, name, " must be float32, float16 or bfloat16; got ",
                 torch::headeronly::toString(t.scalar_type()));
    }
}

ScalarType require_float(const char *op, const char *name, ScalarType dtype) {
    require(
        dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
        op, name, " must be float32, float16 or bfloat16; got ",
        torch::headeronly::toString(dtype));
    return dtype;
}

void require_cpu(const char *op, const char *name, const Tensor &t) {
    if (!t.is_cpu())
        fail(op, name, " must be on the CPU, as the other arguments are; got shape ", shape_text(t),
             " elsewhere");
}

// A CPU tensor of this dtype and shape (-1: any size), contiguous.
Tensor expect(const char *op, const char *name, const Tensor &t, ScalarType dtype,
              const std::vector<int64_t> &shape) {
    require_cpu(op, name, t);
    require(t.scalar_type() == dtype, op, name, " must be ", torch::headeronly::toString(dtype),
            "; got ", torch::headeronly::toString(t.scalar_type()));
    bool same = t.dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; same && i < shape.size(); i++)
        same = shape[i] < 0 || t.size(static_cast<int64_t>(i)) == shape[i];
    if (!same) {
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
    return t.is_contiguous() ? t : stable::contiguous(t);
}

// The same for an output argument: written in place, so it cannot be a contiguous copy.
void expect_out(const char *op, const char *name, const Tensor &t, ScalarType dtype,
                const std::vector<int64_t> &shape) {
    expect(op, name, t, dtype, shape);
    require(t.is_contiguous(), op, name, " must be contiguous");
}

// x [..., cols] as a contiguous [rows][cols].
struct Matrix {
    Tensor tensor;
    int64_t rows, cols;
};

Matrix matrix(const char *op, const char *name, const Tensor &t) {
    require_cpu(op, name, t);
    require(t.dim() >= 1, op, name, " must have at least one dimension; got a scalar");
    Matrix m{t.is_contiguous() ? t : stable::contiguous(t), 1, t.size(t.dim() - 1)};
    for (int64_t i = 0; i + 1 < t.dim(); i++) m.rows *= t.size(i);
    return m;
}

std::vector<int64_t> shape_with_last(const Tensor &t, int64_t last) {
    std::vector<int64_t> shape;
    for (int64_t i = 0; i + 1 < t.dim(); i++) shape.push_back(t.size(i));
    shape.push_back(last);
    return shape;
}

Tensor allocate(const Tensor &like, const std::vector<int64_t> &shape, ScalarType dtype) {
    return stable::new_empty(like, shape, dtype);
}

// body(begin, end) -> mq_status over [0, n); the first failure is reported.
template <typename Body>
void parallel(const char *op, int64_t n, int64_t grain, const Body &body) {
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

const char *bytes_at(const Tensor &t, int64_t offset_elements, mq_dtype dtype) {
    return static_cast<const char *>(t.const_data_ptr()) +
           offset_elements * (dtype == MQ_F32 ? 4 : 2);
}

char *out_bytes_at(const Tensor &t, int64_t offset_elements, mq_dtype dtype) {
    return static_cast<char *>(t.mutable_data_ptr()) + offset_elements * (dtype == MQ_F32 ? 4 : 2);
}

// ---- Channel statistics and sorting ----

void channel_stats_update(Tensor x, Tensor count, Tensor abs_max, Tensor minimum, Tensor abs_sum,
                          Tensor sq_sum, Tensor argmax) {
    const char *op = "channel_stats_update";
    const mq_dtype dtype = dtype_of(op, "x", x);
    const Matrix m = matrix(op, "x", x);
    expect_out(op, "count", count, ScalarType::Long, {});
    expect_out(op, "abs_max", abs_max, ScalarType::Float, {m.cols});
    expect_out(op, "minimum", minimum, ScalarType::Float, {m.cols});
    expect_out(op, "abs_sum", abs_sum, ScalarType::Double, {m.cols});
    expect_out(op, "sq_sum", sq_sum, ScalarType::Double, {m.cols});
    expect_out(op, "argmax", argmax, ScalarType::Long, {m.cols});
    const mq_channel_stats stats{
        abs_max.mutable_data_ptr<float>(), minimum.mutable_data_ptr<float>(),
        abs_sum.mutable_data_ptr<double>(), sq_sum.mutable_data_ptr<double>(),
        argmax.mutable_data_ptr<int64_t>()};
    int64_t *seen = count.mutable_data_ptr<int64_t>();
    // whole cache lines of every statistic to a thread
    const int64_t lines = (m.cols + 15) / 16;
    parallel(op, lines, kGrainValues / std::max<int64_t>(16 * m.rows, 1),
             [&](int64_t begin, int64_t end) {
                 return mq_channel_stats_update(dtype, m.tensor.const_data_ptr(), m.rows, m.cols,
                                                16 * begin, std::min(16 * end, m.cols), *seen,
                                                &stats);
             });
    *seen += m.rows;
}

Tensor sort_keys(Tensor count, Tensor abs_max, Tensor abs_sum, Tensor sq_sum, Tensor argmax,
                 std::string key) {
    const char *op = "sort_keys";
    static const char *const names[] = {"argmax", "max", "mean3std", "rms"};
    int index = 0;
    while (index < 4 && key != names[index]) index++;
    require(index < 4, op, "key must be argmax, max, mean3std or rms; got '", key, "'");
    require(abs_max.dim() == 1, op, "abs_max must be a vector; got shape ", shape_text(abs_max));
    const int64_t k = abs_max.size(0);
    count = expect(op, "count", count, ScalarType::Long, {});
    abs_max = expect(op, "abs_max", abs_max, ScalarType::Float, {k});
    abs_sum = expect(op, "abs_sum", abs_sum, ScalarType::Double, {k});
    sq_sum = expect(op, "sq_sum", sq_sum, ScalarType::Double, {k});
    argmax = expect(op, "argmax", argmax, ScalarType::Long, {k});
    const int64_t rows = *count.const_data_ptr<int64_t>();
    require(rows >= 0, op, "count must not be negative; got ", rows);
    // only read; the C struct serves the update too
    const mq_channel_stats stats{const_cast<float *>(abs_max.const_data_ptr<float>()), nullptr,
                                 const_cast<double *>(abs_sum.const_data_ptr<double>()),
                                 const_cast<double *>(sq_sum.const_data_ptr<double>()),
                                 const_cast<int64_t *>(argmax.const_data_ptr<int64_t>())};
    Tensor keys = allocate(abs_max, {k}, ScalarType::Double);
    check(op, mq_sort_keys(static_cast<mq_sort_key>(index), k, rows, &stats,
                           keys.mutable_data_ptr<double>()));
    return keys;
}

Tensor argsort(Tensor keys, bool descending) {
    const char *op = "argsort";
    keys = expect(op, "keys", keys, ScalarType::Double, {-1});
    const int64_t k = keys.size(0);
    Tensor indices = allocate(keys, {k}, ScalarType::Long);
    Tensor scratch = allocate(keys, {k}, ScalarType::Long);
    check(op, mq_argsort(keys.const_data_ptr<double>(), k, descending,
                         indices.mutable_data_ptr<int64_t>(), scratch.mutable_data_ptr<int64_t>()));
    return indices;
}

// ---- Group quantization ----

mq_act_format act_format_of(const char *op, const std::string &name) {
    static const char *const names[] = {"symmetric", "unsigned", "zero_point"};
    for (int format = 0; format < 3; format++)
        if (name == names[format]) return static_cast<mq_act_format>(format);
    fail(op, "act_format must be symmetric, unsigned or zero_point; got '", name, "'");
}

mq_group_format group_format(const char *op, int64_t group_size, int64_t num_bits,
                             mq_act_format act_format, double clip = 1) {
    require(group_size >= 1, op, "group_size must be at least 1; got ", group_size);
    const int most = act_format == MQ_ACT_ZERO_POINT ? 7 : 8;
    require(num_bits >= 2 && num_bits <= most, op, "num_bits must be in [2, ", most, "]; got ",
            num_bits);
    const float fraction = static_cast<float>(clip);
    require(fraction > 0 && fraction <= 1, op, "clip must be in (0, 1]; got ", clip);
    return {group_size, static_cast<int>(num_bits), act_format, fraction};
}

int64_t groups_of(int64_t cols, int64_t group_size) {
    return cols / group_size + (cols % group_size != 0);
}

std::tuple<Tensor, Tensor> group_quantize(Tensor x, int64_t group_size, int64_t num_bits,
                                          bool is_unsigned) {
    const char *op = "group_quantize";
    const mq_group_format format =
        group_format(op, group_size, num_bits, is_unsigned ? MQ_ACT_UNSIGNED : MQ_ACT_SYMMETRIC);
    const mq_dtype dtype = dtype_of(op, "x", x);
    const Matrix m = matrix(op, "x", x);
    const int64_t groups = groups_of(m.cols, group_size);
    Tensor q =
        allocate(x, shape_with_last(x, m.cols), is_unsigned ? ScalarType::Byte : ScalarType::Char);
    Tensor scales = allocate(x, shape_with_last(x, groups), ScalarType::Float);
    parallel(
        op, m.rows, kGrainValues / std::max<int64_t>(m.cols, 1), [&](int64_t begin, int64_t end) {
            return mq_group_quantize(&format, dtype, bytes_at(m.tensor, begin * m.cols, dtype),
                                     end - begin, m.cols, m.cols,
                                     static_cast<int8_t *>(q.mutable_data_ptr()) + begin * m.cols,
                                     scales.mutable_data_ptr<float>() + begin * groups);
        });
    return {q, scales};
}

Tensor group_dequantize(Tensor q, Tensor scales, int64_t group_size, ScalarType out_dtype) {
    const char *op = "group_dequantize";
    const bool is_unsigned = q.scalar_type() == ScalarType::Byte;
    require(is_unsigned || q.scalar_type() == ScalarType::Char, op, "q must be int8 or uint8; got ",
            torch::headeronly::toString(q.scalar_type()));
    const mq_group_format format =
        group_format(op, group_size, 8, is_unsigned ? MQ_ACT_UNSIGNED : MQ_ACT_SYMMETRIC);
    require_float(op, "dtype", out_dtype);
    const Matrix m = matrix(op, "q", q);
    const int64_t groups = groups_of(m.cols, group_size);
    scales = expect(op, "scales", scales, ScalarType::Float, shape_with_last(q, groups));
    Tensor out = allocate(q, shape_with_last(q, m.cols), out_dtype);
    const mq_dtype dtype = dtype_of(op, "out", out);
    parallel(
        op, m.rows, kGrainValues / std::max<int64_t>(m.cols, 1), [&](int64_t begin, int64_t end) {
            return mq_group_dequantize(
                &format, static_cast<const int8_t *>(m.tensor.const_data_ptr()) + begin * m.cols,
                scales.const_data_ptr<float>() + begin * groups, end - begin, m.cols, dtype,
                out_bytes_at(out, begin * m.cols, dtype));
        });
    return out;
}

Tensor group_fake_quantize(Tensor x, int64_t group_size, int64_t num_bits, std::string act_format,
                           double clip) {
    const char *op = "group_fake_quantize";
    const mq_group_format format =
        group_format(op, group_size, num_bits, act_format_of(op, act_format), clip);
    const mq_dtype dtype = dtype_of(op, "x", x);
    const Matrix m = matrix(op, "x", x);
    Tensor out = allocate(x, shape_with_last(x, m.cols), x.scalar_type());
    parallel(
        op, m.rows, kGrainValues / std::max<int64_t>(m.cols, 1), [&](int64_t begin, int64_t end) {
            return mq_group_fake_quantize(&format, dtype, bytes_at(m.tensor, begin * m.cols, dtype),
                                          end - begin, m.cols, m.cols,
                                          out_bytes_at(out, begin * m.cols, dtype));
        });
    return out;
}

void check_rotation(const char *op, int64_t rotation) {
    require(rotation >= 0 && rotation <= MQ_MAX_ROTATION && (rotation & (rotation - 1)) == 0, op,
            "rotation must be 0 or a power of two up to ", MQ_MAX_ROTATION, "; got ", rotation);
}

Tensor group_hadamard(Tensor x, int64_t group_size, int64_t rotation) {
    const char *op = "group_hadamard";
    require(group_size >= 1, op, "group_size must be at least 1; got ", group_size);
    check_rotation(op, rotation);
    const mq_dtype dtype = dtype_of(op, "x", x);
    const Matrix m = matrix(op, "x", x);
    Tensor out = allocate(x, shape_with_last(x, m.cols), x.scalar_type());
    parallel(op, m.rows, kGrainValues / std::max<int64_t>(m.cols, 1),
             [&](int64_t begin, int64_t end) {
                 return mq_group_hadamard(group_size, rotation, dtype,
                                          bytes_at(m.tensor, begin * m.cols, dtype), end - begin,
                                          m.cols, m.cols, out_bytes_at(out, begin * m.cols, dtype));
             });
    return out;
}

Tensor pack_nibbles(Tensor q) {
    const char *op = "pack_nibbles";
    require(q.scalar_type() == ScalarType::Char || q.scalar_type() == ScalarType::Byte, op,
            "q must be int8 or uint8; got ", torch::headeronly::toString(q.scalar_type()));
    const Matrix m = matrix(op, "q", q);
    const int64_t packed_cols = (m.cols + 1) / 2;
    Tensor packed = allocate(q, shape_with_last(q, packed_cols), ScalarType::Byte);
    parallel(op, m.rows, kGrainValues / std::max<int64_t>(m.cols, 1),
             [&](int64_t begin, int64_t end) {
                 return mq_pack_nibbles(
                     static_cast<const int8_t *>(m.tensor.const_data_ptr()) + begin * m.cols,
                     end - begin, m.cols, packed.mutable_data_ptr<uint8_t>() + begin * packed_cols);
             });
    return packed;
}

Tensor unpack_nibbles(Tensor packed, int64_t cols, bool is_unsigned) {
    const char *op = "unpack_nibbles";
    require(packed.scalar_type() == ScalarType::Byte, op, "packed must be uint8; got ",
            torch::headeronly::toString(packed.scalar_type()));
    const Matrix m = matrix(op, "packed", packed);
    require(cols >= 0 && m.cols == cols / 2 + cols % 2, op, "cols must be ", 2 * m.cols,
            " or one less for packed of shape ", shape_text(packed), "; got ", cols);
    Tensor q = allocate(packed, shape_with_last(packed, cols),
                        is_unsigned ? ScalarType::Byte : ScalarType::Char);
    parallel(
        op, m.rows, kGrainValues / std::max<int64_t>(cols, 1), [&](int64_t begin, int64_t end) {
            return mq_unpack_nibbles(m.tensor.const_data_ptr<uint8_t>() + begin * m.cols,
                                     end - begin, cols, is_unsigned,
                                     static_cast<int8_t *>(q.mutable_data_ptr()) + begin * cols);
        });
    return q;
}

// ---- The W4A4 linear ----

int check_bits(const char *op, int64_t num_bits) {
    require(num_bits >= 2 && num_bits <= 4, op, "num_bits must be in [2, 4]; got ", num_bits);
    return static_cast<int>(num_bits);
}

// The fields every linear op shares; n and k are given, perm is checked for shape and dtype.
mq_linear layer(const char *op, int64_t n, int64_t k, int64_t num_salient, int64_t group_size,
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
    lin.isa = mq_isa_active();
    check(op, mq_shape_of(n, k, num_salient, group_size, shape));
    return lin;
}

mq_dtype salient_dtype_of(const char *op, ScalarType dtype) {
    switch (dtype) {
        case ScalarType::BFloat16: return MQ_BF16;
        case ScalarType::Half: return MQ_F16;
        case ScalarType::Char: return MQ_I8;
        default:
            fail(op, "salient dtype must be bfloat16, float16 or int8; got ",
                 torch::headeronly::toString(dtype));
    }
}

std::tuple<Tensor, Tensor, Tensor, std::optional<Tensor>> pack_weight(
    Tensor w, Tensor perm, int64_t num_salient, int64_t group_size, int64_t rotation,
    int64_t num_bits, std::optional<Tensor> group_scales, ScalarType salient_dtype) {
    const char *op = "pack_weight";
    const mq_dtype dtype = dtype_of(op, "w", w);
    require(w.dim() == 2, op, "w must be a matrix; got shape ", shape_text(w));
    const Matrix m = matrix(op, "w", w);
    perm = expect(op, "perm", perm, ScalarType::Int, {m.cols});
    const int q_max = (1 << (check_bits(op, num_bits) - 1)) - 1;
    mq_shape shape;
    mq_linear lin = layer(op, m.rows, m.cols, num_salient, group_size, rotation, perm, &shape);
    lin.salient_dtype = salient_dtype_of(op, salient_dtype);
    std::vector<bool> used(static_cast<size_t>(m.cols));
    for (int64_t i = 0; i < m.cols; i++) {
        const int32_t channel = lin.perm[i];
        require(channel >= 0 && channel < m.cols && !used[static_cast<size_t>(channel)], op,
                "perm must hold every channel in [0, ", m.cols, ") once; perm[", i, "] is ",
                channel);
        used[static_cast<size_t>(channel)] = true;
    }
    const float *given = nullptr;
    if (group_scales) {
        group_scales =
            expect(op, "group_scales", *group_scales, ScalarType::Float, {m.rows, shape.groups});
        given = group_scales->const_data_ptr<float>();
    }
    Tensor qweight = allocate(w, {shape.panels, shape.blocks, MQ_BLOCK_BYTES}, ScalarType::Byte);
    Tensor scales = allocate(w, {shape.panels, shape.groups, MQ_PANEL}, ScalarType::BFloat16);
    Tensor salient = allocate(w, {shape.panels, num_salient, MQ_PANEL}, salient_dtype);
    std::optional<Tensor> salient_scales;
    uint16_t *salient_scale_bits = nullptr;
    if (lin.salient_dtype == MQ_I8) {
        // zeros: with no channels nothing is written
        salient_scales = stable::new_zeros(w, {shape.panels, MQ_PANEL}, ScalarType::BFloat16);
        salient_scale_bits = static_cast<uint16_t *>(salient_scales->mutable_data_ptr());
    }
    parallel(op, shape.panels, kGrainValues / std::max<int64_t>(MQ_PANEL * m.cols, 1),
             [&](int64_t begin, int64_t end) {
                 return mq_pack_weight(&lin, q_max, dtype, m.tensor.const_data_ptr(), m.cols, given,
                                       begin, end, qweight.mutable_data_ptr<uint8_t>(),
                                       static_cast<uint16_t *>(scales.mutable_data_ptr()),
                                       salient.mutable_data_ptr(), salient_scale_bits);
             });
    return {qweight, scales, salient, salient_scales};
}

// What the two column loops share: the shapes of a block w of columns from col0 on.
struct Columns {
    int64_t rows, cols, groups, grain;
    int q_max;
};

Columns check_columns(const char *op, const Tensor &w, const Tensor &scales, int64_t col0,
                      int64_t group_size, int64_t num_bits) {
    require(w.dim() == 2, op, "w must be a matrix; got shape ", shape_text(w));
    const int64_t rows = w.size(0), cols = w.size(1);
    expect_out(op, "w", w, ScalarType::Float, {rows, cols});
    expect(op, "scales", scales, ScalarType::Float, {rows, -1});
    require(col0 >= 0, op, "col0 must not be negative; got ", col0);
    require(group_size >= 1, op, "group_size must be at least 1; got ", group_size);
    const int64_t groups = scales.size(1);
    require(cols == 0 || (col0 + cols - 1) / group_size < groups, op, "scales must have ",
            (col0 + cols - 1) / group_size + 1, " groups or more; got ", groups);
    return {rows, cols, groups, kGrainValues / std::max<int64_t>(cols * cols / 2, 1),
            (1 << (check_bits(op, num_bits) - 1)) - 1};
}

Tensor gptq_block(Tensor w, Tensor u, Tensor scales, int64_t col0, int64_t group_size,
                  int64_t num_bits) {
    const char *op = "gptq_block";
    const Columns c = check_columns(op, w, scales, col0, group_size, num_bits);
    u = expect(op, "u", u, ScalarType::Float, {c.cols, c.cols});
    scales = expect(op, "scales", scales, ScalarType::Float, {c.rows, c.groups});
    Tensor errors = allocate(w, {c.rows, c.cols}, ScalarType::Float);
    float *values = w.mutable_data_ptr<float>();
    parallel(op, c.rows, c.grain, [&](int64_t begin, int64_t end) {
        return mq_gptq_block(c.q_max, end - begin, c.cols, col0, group_size, c.groups,
                             scales.const_data_ptr<float>() + begin * c.groups,
                             u.const_data_ptr<float>(), values + begin * c.cols,
                             errors.mutable_data_ptr<float>() + begin * c.cols);
    });
    return errors;
}

void descend_block(Tensor w, Tensor gradient, Tensor h, Tensor scales, int64_t col0,
                   int64_t group_size, int64_t num_bits) {
    const char *op = "descend_block";
    const Columns c = check_columns(op, w, scales, col0, group_size, num_bits);
    expect_out(op, "gradient", gradient, ScalarType::Float, {c.rows, c.cols});
    h = expect(op, "h", h, ScalarType::Float, {c.cols, c.cols});
    scales = expect(op, "scales", scales, ScalarType::Float, {c.rows, c.groups});
    float *values = w.mutable_data_ptr<float>(), *slopes = gradient.mutable_data_ptr<float>();
    parallel(op, c.rows, c.grain, [&](int64_t begin, int64_t end) {
        return mq_descend_block(c.q_max, end - begin, c.cols, col0, group_size, c.groups,
                                scales.const_data_ptr<float>() + begin * c.groups,
                                h.const_data_ptr<float>(), slopes + begin * c.cols,
                                values + begin * c.cols);
    });
}

// Checks the packed tensors and points lin at them; they stay alive through the caller's arguments.
mq_linear packed_layer(const char *op, Tensor &qweight, Tensor &scales, Tensor &salient,
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

Tensor unpack_weight(Tensor qweight, Tensor scales, Tensor salient,
                     std::optional<Tensor> salient_scales, Tensor perm, int64_t out_features,
                     int64_t group_size, int64_t rotation) {
    const char *op = "unpack_weight";
    mq_shape shape;
    const mq_linear lin = packed_layer(op, qweight, scales, salient, salient_scales, perm,
                                       out_features, group_size, rotation, &shape);
    // an index that occurs twice would leave another channel unwritten
    Tensor w = stable::new_zeros(qweight, {out_features, lin.k}, ScalarType::Float);
    parallel(op, shape.panels, kGrainValues / std::max<int64_t>(MQ_PANEL * lin.k, 1),
             [&](int64_t begin, int64_t end) {
                 return mq_unpack_weight(&lin, begin, end, w.mutable_data_ptr<float>());
             });
    return w;
}

// The choices of x's quantization.
void set_activations(const char *op, mq_linear *lin, int64_t num_bits,
                     const std::string &act_format, bool per_token, double clip) {
    lin->act_bits = check_bits(op, num_bits);
    lin->act_format = act_format_of(op, act_format);
    lin->per_token = per_token;
    lin->clip = static_cast<float>(clip);
    require(lin->clip > 0 && lin->clip <= 1, op, "clip must be in (0, 1]; got ", clip);
}

Matrix tokens_of(const char *op, const mq_linear &lin, const Tensor &x) {
    Matrix m = matrix(op, "x", x);
    if (m.cols != lin.k) fail(op, "x must end in ", lin.k, " channels; got shape ", shape_text(x));
    return m;
}

int64_t tile_rows_of(const char *op, const mq_linear &lin, int64_t rows) {
    int64_t tile_rows;
    check(op, mq_linear_tile_rows(&lin, rows, &tile_rows));
    return tile_rows;
}

// Step 1 of the linear, for all tokens.
void quantize_tokens(const char *op, const mq_linear &lin, mq_dtype dtype, const Matrix &m,
                     int64_t tile_rows, void *space) {
    const int64_t tiles = (m.rows + tile_rows - 1) / tile_rows;
    parallel(op, tiles, kGrainValues / std::max<int64_t>(tile_rows * lin.k, 1),
             [&](int64_t begin, int64_t end) {
                 return mq_linear_quantize(&lin, dtype, m.tensor.const_data_ptr(), lin.k, m.rows,
                                           begin * tile_rows, std::min(end * tile_rows, m.rows),
                                           space);
             });
}

// A quantized input is step 1's workspace and, at its end, what it was made for.
using InputLabel = std::array<int64_t, 8>;

InputLabel label_of(const mq_linear &lin, int64_t rows) {
    return {lin.isa, rows, lin.k, lin.k_salient, std::min(lin.group_size, lin.k - lin.k_salient),
            0,       0,    0};
}

// Bytes that serve every instruction set, so that a size does not depend on the machine. The formula
// stands in smoothquant/ops.py once more.
int64_t quantized_input_bytes(const char *op, const mq_linear &lin, const mq_shape &shape,
                              int64_t rows) {
    size_t needed;
    check(op, mq_linear_workspace_size(&lin, rows, &needed));
    const int64_t row_bytes = 4 * (shape.quads + shape.groups + shape.segments + lin.k_salient);
    const int64_t bytes = (rows + 16) * row_bytes + 256;
    if (static_cast<int64_t>(needed) > bytes) throw std::logic_error("quantized_input_bytes");
    return bytes + static_cast<int64_t>(sizeof(InputLabel));
}

Tensor quantize_input(Tensor x, Tensor perm, int64_t num_salient, int64_t group_size,
                      int64_t rotation, int64_t num_bits, std::string act_format, bool per_token,
                      double clip) {
    const char *op = "quantize_input";
    const mq_dtype dtype = dtype_of(op, "x", x);
    perm = expect(op, "perm", perm, ScalarType::Int, {-1});
    mq_shape shape;
    mq_linear lin = layer(op, 0, perm.size(0), num_salient, group_size, rotation, perm, &shape);
    const Matrix m = tokens_of(op, lin, x);
    set_activations(op, &lin, num_bits, act_format, per_token, clip);
    Tensor quantized =
        allocate(x, {quantized_input_bytes(op, lin, shape, m.rows)}, ScalarType::Byte);
    auto *space = static_cast<char *>(quantized.mutable_data_ptr());
    std::memset(space, 0,
                static_cast<size_t>(quantized.numel()));  // gaps too: equal x, equal bytes
    if (m.rows) quantize_tokens(op, lin, dtype, m, tile_rows_of(op, lin, m.rows), space);
    const InputLabel label = label_of(lin, m.rows);
    std::memcpy(space + quantized.numel() - sizeof label, label.data(), sizeof label);
    return quantized;
}

// The workspace in a quantized input, which is checked as far as its label goes.
const void *quantized_workspace(const char *op, const mq_linear &lin, const mq_shape &shape,
                                int64_t rows, const Tensor &quantized) {
    expect_out(op, "quantized_input", quantized, ScalarType::Byte,
               {quantized_input_bytes(op, lin, shape, rows)});
    const auto *space = static_cast<const char *>(quantized.const_data_ptr());
    InputLabel label;
    std::memcpy(label.data(), space + quantized.numel() - sizeof label, sizeof label);
    require(label == label_of(lin, rows), op,
            "quantized_input was made for another layer, number of tokens or instruction set");
    return space;
}

Tensor w4a4_linear(Tensor x, Tensor qweight, Tensor scales, Tensor salient,
                   std::optional<Tensor> salient_scales, Tensor perm, std::optional<Tensor> bias,
                   int64_t out_features, int64_t group_size, int64_t rotation, int64_t num_bits,
                   std::string act_format, bool per_token, double clip,
                   std::optional<Tensor> quantized_input) {
    const char *op = "w4a4_linear";
    const mq_dtype dtype = dtype_of(op, "x", x);
    mq_shape shape;
    mq_linear lin = packed_layer(op, qweight, scales, salient, salient_scales, perm, out_features,
                                 group_size, rotation, &shape);
    const Matrix m = tokens_of(op, lin, x);
    set_activations(op, &lin, num_bits, act_format, per_token, clip);
    if (bias) {
        lin.bias_dtype = dtype_of(op, "bias", *bias);
        bias = expect(op, "bias", *bias, bias->scalar_type(), {out_features});
        lin.bias = bias->const_data_ptr();
    }

    Tensor y = allocate(x, shape_with_last(x, out_features), x.scalar_type());
    if (m.rows == 0 || out_features == 0) return y;
    const int64_t tile_rows = tile_rows_of(op, lin, m.rows);
    const int64_t tiles = (m.rows + tile_rows - 1) / tile_rows;
    std::optional<Tensor> own;
    const void *space;
    if (quantized_input) {
        space = quantized_workspace(op, lin, shape, m.rows, *quantized_input);
    } else {
        size_t bytes;
        check(op, mq_linear_workspace_size(&lin, m.rows, &bytes));
        own = allocate(x, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
        quantize_tokens(op, lin, dtype, m, tile_rows, own->mutable_data_ptr());
        space = own->const_data_ptr();
    }

    // A task is a few tiles x the panels that are multiplied together; neighbours share the tiles,
    // whose codes then stay in the cache while weights stream by.
    const int64_t row_tasks = (m.rows + kRowsPerTask - 1) / kRowsPerTask;
    const int64_t column_tasks = (shape.panels + MQ_PANELS_AT_ONCE - 1) / MQ_PANELS_AT_ONCE;
    const int64_t task_products =
        MQ_PANELS_AT_ONCE * MQ_PANEL * std::min(kRowsPerTask, m.rows) * std::max<int64_t>(lin.k, 1);
    const auto first_row = [&](int64_t row_task) {
        return std::min(row_task * tiles / row_tasks * tile_rows, m.rows);
    };
    parallel(op, row_tasks * column_tasks, kGrainProducts / task_products,
             [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; task++) {
                     const int64_t row_task = task / column_tasks;
                     const int64_t panel0 = task % column_tasks * MQ_PANELS_AT_ONCE;
                     const mq_status status = mq_linear_multiply(
                         &lin, m.rows, first_row(row_task), first_row(row_task + 1), panel0,
                         std::min(panel0 + MQ_PANELS_AT_ONCE, shape.panels), space, dtype,
                         y.mutable_data_ptr(), out_features);
                     if (status != MQ_OK) return status;
                 }
                 return MQ_OK;
             });
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY(mixedquant, m) {
    m.def(
        "channel_stats_update(Tensor x, Tensor(a!) count, Tensor(b!) abs_max, Tensor(c!) minimum, "
        "Tensor(d!) abs_sum, Tensor(e!) sq_sum, Tensor(f!) argmax) -> ()");
    m.def(
        "sort_keys(Tensor count, Tensor abs_max, Tensor abs_sum, Tensor sq_sum, Tensor argmax, "
        "str key) -> Tensor");
    m.def("argsort(Tensor keys, bool descending) -> Tensor");
    m.def(
        "group_quantize(Tensor x, int group_size, int num_bits, bool is_unsigned) -> (Tensor, "
        "Tensor)");
    m.def("group_dequantize(Tensor q, Tensor scales, int group_size, ScalarType dtype) -> Tensor");
    m.def(
        "group_fake_quantize(Tensor x, int group_size, int num_bits, str act_format, float clip) "
        "-> Tensor");
    m.def("group_hadamard(Tensor x, int group_size, int rotation) -> Tensor");
    m.def("pack_nibbles(Tensor q) -> Tensor");
    m.def("unpack_nibbles(Tensor packed, int cols, bool is_unsigned) -> Tensor");
    m.def(
        "pack_weight(Tensor w, Tensor perm, int num_salient, int group_size, int rotation, "
        "int num_bits, Tensor? group_scales, ScalarType salient_dtype) -> (Tensor, Tensor, "
        "Tensor, Tensor?)");
    m.def(
        "gptq_block(Tensor(a!) w, Tensor u, Tensor scales, int col0, int group_size, int num_bits) "
        "-> Tensor");
    m.def(
        "descend_block(Tensor(a!) w, Tensor(b!) gradient, Tensor h, Tensor scales, int col0, "
        "int group_size, int num_bits) -> ()");
    m.def(
        "unpack_weight(Tensor qweight, Tensor scales, Tensor salient_weight, "
        "Tensor? salient_scales, Tensor perm, int out_features, int group_size, int rotation) "
        "-> Tensor");
    m.def(
        "w4a4_linear(Tensor x, Tensor qweight, Tensor scales, Tensor salient_weight, "
        "Tensor? salient_scales, Tensor perm, Tensor? bias, int out_features, int group_size, "
        "int rotation, int num_bits, str act_format, bool per_token, float clip, "
        "Tensor? quantized_input) -> Tensor");
    m.def(
        "quantize_input(Tensor x, Tensor perm, int num_salient, int group_size, int rotation, "
        "int num_bits, str act_format, bool per_token, float clip) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mixedquant, CPU, m) {
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
    m.impl("w4a4_linear", TORCH_BOX(&w4a4_linear));
    m.impl("quantize_input", TORCH_BOX(&quantize_input));
}
