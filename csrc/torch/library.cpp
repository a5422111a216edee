// The torch ops on the CPU. Each op unboxes, validates, allocates, runs one C function in parallel
// and maps its status. No arithmetic. Registered on libtorch's stable ABI, so one binary serves
// torch >= 2.10. smoothquant/ops.py documents the shapes, dtypes and errors of every op.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <tuple>

#include "linear.h"

namespace {

using namespace mixedquant;

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
    const Op op{"channel_stats_update"};
    const mq_dtype dtype = dtype_of(op, "x", x);
    const Matrix m = matrix(op, "x", x);
    const mq_channel_stats stats =
        stats_to_update(op, m.cols, count, abs_max, minimum, abs_sum, sq_sum, argmax);
    int64_t *seen = count.mutable_data_ptr<int64_t>();
    require(mq_size_sum(*seen, m.rows) >= 0, op, "count must be in [0, 2^63 - ", m.rows, "); got ",
            *seen);
    // whole cache lines of every statistic per thread
    const int64_t lines = mq_ceil_div(m.cols, 16);
    parallel(op, lines, grain_of(kGrainValues, mq_size_product(16, m.rows)),
             [&](int64_t begin, int64_t end) {
                 return mq_channel_stats_update(dtype, m.tensor.const_data_ptr(), m.rows, m.cols,
                                                16 * begin, std::min(16 * end, m.cols), *seen,
                                                &stats);
             });
    *seen += m.rows;
}

Tensor sort_keys(Tensor count, Tensor abs_max, Tensor abs_sum, Tensor sq_sum, Tensor argmax,
                 std::string key) {
    const Op op{"sort_keys"};
    const mq_sort_key by = sort_key_of(op, key);
    const mq_channel_stats stats = stats_to_sort(op, count, abs_max, abs_sum, sq_sum, argmax);
    const int64_t k = abs_max.size(0), rows = *count.const_data_ptr<int64_t>();
    require(rows >= 0, op, "count must not be negative; got ", rows);
    Tensor keys = allocate(abs_max, {k}, ScalarType::Double);
    check(op, mq_sort_keys(by, k, rows, &stats, keys.mutable_data_ptr<double>()));
    return keys;
}

Tensor argsort(Tensor keys, bool descending) {
    const Op op{"argsort"};
    keys = expect(op, "keys", keys, ScalarType::Double, {-1});
    const int64_t k = keys.size(0);
    Tensor indices = allocate(keys, {k}, ScalarType::Long);
    Tensor scratch = allocate(keys, {k}, ScalarType::Long);
    check(op, mq_argsort(keys.const_data_ptr<double>(), k, descending,
                         indices.mutable_data_ptr<int64_t>(), scratch.mutable_data_ptr<int64_t>()));
    return indices;
}

// ---- Group quantization ----

std::tuple<Tensor, Tensor> group_quantize(Tensor x, int64_t group_size, int64_t num_bits,
                                          bool is_unsigned) {
    const Op op{"group_quantize"};
    const mq_group_format format =
        group_format(op, group_size, num_bits, is_unsigned ? MQ_ACT_UNSIGNED : MQ_ACT_SYMMETRIC);
    const mq_dtype dtype = dtype_of(op, "x", x);
    const Matrix m = matrix(op, "x", x);
    const int64_t groups = mq_ceil_div(m.cols, group_size);
    Tensor q =
        allocate(x, shape_with_last(x, m.cols), is_unsigned ? ScalarType::Byte : ScalarType::Char);
    Tensor scales = allocate(x, shape_with_last(x, groups), ScalarType::Float);
    parallel(op, m.rows, grain_of(kGrainValues, m.cols), [&](int64_t begin, int64_t end) {
        return mq_group_quantize(&format, dtype, bytes_at(m.tensor, begin * m.cols, dtype),
                                 end - begin, m.cols, m.cols,
                                 static_cast<int8_t *>(q.mutable_data_ptr()) + begin * m.cols,
                                 scales.mutable_data_ptr<float>() + begin * groups);
    });
    return {q, scales};
}

Tensor group_dequantize(Tensor q, Tensor scales, int64_t group_size, ScalarType out_dtype) {
    const Op op{"group_dequantize"};
    const mq_group_format format = group_format(op, group_size, 8, code_format(op, q));
    require_float(op, "dtype", out_dtype);
    const Matrix m = matrix(op, "q", q);
    const int64_t groups = mq_ceil_div(m.cols, group_size);
    scales = expect(op, "scales", scales, ScalarType::Float, shape_with_last(q, groups));
    Tensor out = allocate(q, shape_with_last(q, m.cols), out_dtype);
    const mq_dtype dtype = dtype_of(op, "out", out);
    parallel(op, m.rows, grain_of(kGrainValues, m.cols), [&](int64_t begin, int64_t end) {
        return mq_group_dequantize(
            &format, static_cast<const int8_t *>(m.tensor.const_data_ptr()) + begin * m.cols,
            scales.const_data_ptr<float>() + begin * groups, end - begin, m.cols, dtype,
            out_bytes_at(out, begin * m.cols, dtype));
    });
    return out;
}

Tensor group_fake_quantize(Tensor x, int64_t group_size, int64_t num_bits, std::string act_format,
                           double clip) {
    const Op op{"group_fake_quantize"};
    const mq_group_format format =
        group_format(op, group_size, num_bits, act_format_of(op, act_format), clip);
    const mq_dtype dtype = dtype_of(op, "x", x);
    const Matrix m = matrix(op, "x", x);
    Tensor out = allocate(x, shape_with_last(x, m.cols), x.scalar_type());
    parallel(op, m.rows, grain_of(kGrainValues, m.cols), [&](int64_t begin, int64_t end) {
        return mq_group_fake_quantize(&format, dtype, bytes_at(m.tensor, begin * m.cols, dtype),
                                      end - begin, m.cols, m.cols,
                                      out_bytes_at(out, begin * m.cols, dtype));
    });
    return out;
}

Tensor group_hadamard(Tensor x, int64_t group_size, int64_t rotation) {
    const Op op{"group_hadamard"};
    require(group_size >= 1, op, "group_size must be at least 1; got ", group_size);
    check_rotation(op, rotation);
    const mq_dtype dtype = dtype_of(op, "x", x);
    const Matrix m = matrix(op, "x", x);
    Tensor out = allocate(x, shape_with_last(x, m.cols), x.scalar_type());
    parallel(op, m.rows, grain_of(kGrainValues, m.cols), [&](int64_t begin, int64_t end) {
        return mq_group_hadamard(group_size, rotation, dtype,
                                 bytes_at(m.tensor, begin * m.cols, dtype), end - begin, m.cols,
                                 m.cols, out_bytes_at(out, begin * m.cols, dtype));
    });
    return out;
}

Tensor pack_nibbles(Tensor q) {
    const Op op{"pack_nibbles"};
    code_format(op, q);
    const Matrix m = matrix(op, "q", q);
    const int64_t packed_cols = mq_ceil_div(m.cols, 2);
    Tensor packed = allocate(q, shape_with_last(q, packed_cols), ScalarType::Byte);
    parallel(op, m.rows, grain_of(kGrainValues, m.cols), [&](int64_t begin, int64_t end) {
        return mq_pack_nibbles(
            static_cast<const int8_t *>(m.tensor.const_data_ptr()) + begin * m.cols, end - begin,
            m.cols, packed.mutable_data_ptr<uint8_t>() + begin * packed_cols);
    });
    return packed;
}

Tensor unpack_nibbles(Tensor packed, int64_t cols, bool is_unsigned) {
    const Op op{"unpack_nibbles"};
    const Matrix m = nibbles_of(op, packed, cols);
    Tensor q = allocate(packed, shape_with_last(packed, cols),
                        is_unsigned ? ScalarType::Byte : ScalarType::Char);
    parallel(op, m.rows, grain_of(kGrainValues, cols), [&](int64_t begin, int64_t end) {
        return mq_unpack_nibbles(m.tensor.const_data_ptr<uint8_t>() + begin * m.cols, end - begin,
                                 cols, is_unsigned,
                                 static_cast<int8_t *>(q.mutable_data_ptr()) + begin * cols);
    });
    return q;
}

// ---- The W4A4 linear ----

std::tuple<Tensor, Tensor, Tensor, std::optional<Tensor>> pack_weight(
    Tensor w, Tensor perm, int64_t num_salient, int64_t group_size, int64_t rotation,
    int64_t num_bits, std::optional<Tensor> group_scales, ScalarType salient_dtype) {
    const Op op{"pack_weight"};
    Packing to = packing_of(op, w, perm, num_salient, group_size, rotation, num_bits, group_scales,
                            salient_dtype);
    to.lin.isa = mq_isa_active();
    const int64_t k = to.lin.k;
    std::vector<bool> used(static_cast<size_t>(k));
    for (int64_t i = 0; i < k; i++) {
        const int32_t channel = to.lin.perm[i];
        require(channel >= 0 && channel < k && !used[static_cast<size_t>(channel)], op,
                "perm must hold every channel in [0, ", k, ") once; perm[", i, "] is ", channel);
        used[static_cast<size_t>(channel)] = true;
    }
    parallel(op, to.shape.panels, grain_of(kGrainValues, mq_size_product(MQ_PANEL, k)),
             [&](int64_t begin, int64_t end) {
                 return mq_pack_weight(&to.lin, to.q_max, to.dtype, to.w.tensor.const_data_ptr(), k,
                                       to.group_scales, begin, end, to.qweight_out(),
                                       to.scales_out(), to.salient.mutable_data_ptr(),
                                       to.salient_scales_out());
             });
    return {to.qweight, to.scales, to.salient, to.salient_scales};
}

int64_t block_grain(const Columns &c) {
    return grain_of(kGrainValues, mq_size_product(c.cols, c.cols) / 2);
}

Tensor gptq_block(Tensor w, Tensor u, Tensor scales, int64_t col0, int64_t group_size,
                  int64_t num_bits) {
    const Op op{"gptq_block"};
    const Columns c = check_columns(op, w, scales, col0, group_size, num_bits);
    u = expect(op, "u", u, ScalarType::Float, {c.cols, c.cols});
    scales = expect(op, "scales", scales, ScalarType::Float, {c.rows, c.groups});
    Tensor errors = allocate(w, {c.rows, c.cols}, ScalarType::Float);
    float *values = w.mutable_data_ptr<float>();
    parallel(op, c.rows, block_grain(c), [&](int64_t begin, int64_t end) {
        return mq_gptq_block(c.q_max, end - begin, c.cols, col0, group_size, c.groups,
                             scales.const_data_ptr<float>() + begin * c.groups,
                             u.const_data_ptr<float>(), values + begin * c.cols,
                             errors.mutable_data_ptr<float>() + begin * c.cols);
    });
    return errors;
}

void descend_block(Tensor w, Tensor gradient, Tensor h, Tensor scales, int64_t col0,
                   int64_t group_size, int64_t num_bits) {
    const Op op{"descend_block"};
    const Columns c = check_columns(op, w, scales, col0, group_size, num_bits);
    expect_out(op, "gradient", gradient, ScalarType::Float, {c.rows, c.cols});
    h = expect(op, "h", h, ScalarType::Float, {c.cols, c.cols});
    scales = expect(op, "scales", scales, ScalarType::Float, {c.rows, c.groups});
    float *values = w.mutable_data_ptr<float>(), *slopes = gradient.mutable_data_ptr<float>();
    parallel(op, c.rows, block_grain(c), [&](int64_t begin, int64_t end) {
        return mq_descend_block(c.q_max, end - begin, c.cols, col0, group_size, c.groups,
                                scales.const_data_ptr<float>() + begin * c.groups,
                                h.const_data_ptr<float>(), slopes + begin * c.cols,
                                values + begin * c.cols);
    });
}

Tensor unpack_weight(Tensor qweight, Tensor scales, Tensor salient,
                     std::optional<Tensor> salient_scales, Tensor perm, int64_t out_features,
                     int64_t group_size, int64_t rotation) {
    const Op op{"unpack_weight"};
    mq_shape shape;
    mq_linear lin = packed_layer(op, qweight, scales, salient, salient_scales, perm, out_features,
                                 group_size, rotation, &shape);
    lin.isa = mq_isa_active();
    // a repeated index would leave another channel unwritten
    Tensor w = stable::new_zeros(qweight, {out_features, lin.k}, ScalarType::Float);
    parallel(op, shape.panels, grain_of(kGrainValues, mq_size_product(MQ_PANEL, lin.k)),
             [&](int64_t begin, int64_t end) {
                 return mq_unpack_weight(&lin, begin, end, w.mutable_data_ptr<float>());
             });
    return w;
}

Tensor unpack_rows(Tensor qweight, Tensor scales, Tensor salient,
                   std::optional<Tensor> salient_scales, Tensor perm, Tensor rows,
                   int64_t out_features, int64_t group_size, int64_t rotation) {
    const Op op{"unpack_rows"};
    mq_shape shape;
    mq_linear lin = packed_layer(op, qweight, scales, salient, salient_scales, perm, out_features,
                                 group_size, rotation, &shape);
    lin.isa = mq_isa_active();
    rows = expect(op, "rows", rows, ScalarType::Long, {-1});
    // a repeated index would leave another channel unwritten
    Tensor w = stable::new_zeros(qweight, {rows.size(0), lin.k}, ScalarType::Float);
    const int64_t *chosen = rows.const_data_ptr<int64_t>();
    float *out = w.mutable_data_ptr<float>();
    parallel(op, rows.size(0), grain_of(kGrainValues, lin.k), [&](int64_t begin, int64_t end) {
        return mq_unpack_rows(&lin, chosen + begin, end - begin, out + begin * lin.k);
    });
    return w;
}

// A quantized input is a step 1 workspace followed by a label: what it was made for.
using InputLabel = std::array<int64_t, 8>;

InputLabel label_of(const mq_linear &lin, int64_t rows) {
    return {lin.isa,
            rows,
            lin.k,
            lin.k_salient,
            std::min(lin.group_size, lin.k - lin.k_salient),
            lin.act_bits > 4,
            0,
            0};
}

// Size for any instruction set, so that it does not depend on the machine. smoothquant/ops.py
// repeats the formula.
int64_t quantized_input_bytes(const Op &op, const mq_linear &lin, const mq_shape &shape,
                              int64_t rows) {
    size_t needed;
    check(op, mq_linear_workspace_size(&lin, rows, &needed));
    int64_t items = 0;
    for (const int64_t of_row : {shape.quads, shape.groups, shape.segments, lin.k_salient})
        items = mq_size_sum(items, of_row);
    const int64_t bytes =
        mq_size_sum(mq_size_product(mq_size_sum(rows, 16), mq_size_product(4, items)),
                    256 + sizeof(InputLabel));
    require(bytes >= 0, op, "x has too many tokens to be quantized: ", rows);
    if (static_cast<int64_t>(needed + sizeof(InputLabel)) > bytes)
        throw std::logic_error("quantized_input_bytes");
    return bytes;
}

Tensor quantize_input(Tensor x, Tensor perm, int64_t num_salient, int64_t group_size,
                      int64_t rotation, int64_t num_bits, std::string act_format, bool per_token,
                      double clip) {
    const Op op{"quantize_input"};
    const mq_dtype dtype = dtype_of(op, "x", x);
    perm = expect(op, "perm", perm, ScalarType::Int, {-1});
    mq_shape shape;
    mq_linear lin = layer(op, 0, perm.size(0), num_salient, group_size, rotation, perm, &shape);
    lin.isa = mq_isa_active();
    const Matrix m = tokens_of(op, lin, x);
    set_activations(op, &lin, num_bits, act_format, per_token, clip);
    Tensor quantized =
        allocate(x, {quantized_input_bytes(op, lin, shape, m.rows)}, ScalarType::Byte);
    auto *space = static_cast<char *>(quantized.mutable_data_ptr());
    size_t used;
    check(op, mq_linear_workspace_size(&lin, m.rows, &used));
    // zero unused bytes too: equal x, equal bytes
    std::memset(space + used, 0, static_cast<size_t>(quantized.numel()) - used);
    if (m.rows) quantize_tokens(op, lin, dtype, m.tensor.const_data_ptr(), m.rows, space);
    const InputLabel label = label_of(lin, m.rows);
    std::memcpy(space + quantized.numel() - sizeof label, label.data(), sizeof label);
    return quantized;
}

// Returns the workspace in a quantized input, after checking its label. It is multiplied with the
// instruction set that quantized it, even if another one has become the active one since.
const void *quantized_workspace(const Op &op, mq_linear *lin, const mq_shape &shape, int64_t rows,
                                const Tensor &quantized) {
    expect_out(op, "quantized_input", quantized, ScalarType::Byte,
               {quantized_input_bytes(op, *lin, shape, rows)});
    require(is_aligned(quantized, 64), op, "quantized_input must be aligned to 64 bytes");
    const auto *space = static_cast<const char *>(quantized.const_data_ptr());
    InputLabel label;
    std::memcpy(label.data(), space + quantized.numel() - sizeof label, sizeof label);
    const int64_t isa = label[0];
    if (isa >= 0 && isa < MQ_ISA_COUNT && mq_isa_supported(static_cast<mq_isa>(isa)))
        lin->isa = static_cast<mq_isa>(isa);
    require(label == label_of(*lin, rows), op,
            "quantized_input was made for another layer, number of tokens or processor");
    return space;
}

Tensor w4a4_linear(Tensor x, Tensor qweight, Tensor scales, Tensor salient,
                   std::optional<Tensor> salient_scales, Tensor perm, std::optional<Tensor> bias,
                   int64_t out_features, int64_t group_size, int64_t rotation, int64_t num_bits,
                   std::string act_format, bool per_token, double clip,
                   std::optional<Tensor> quantized_input) {
    const Op op{"w4a4_linear"};
    const mq_dtype dtype = dtype_of(op, "x", x);
    mq_shape shape;
    mq_linear lin = packed_layer(op, qweight, scales, salient, salient_scales, perm, out_features,
                                 group_size, rotation, &shape);
    lin.isa = mq_isa_active();
    const Matrix m = tokens_of(op, lin, x);
    set_activations(op, &lin, num_bits, act_format, per_token, clip);
    set_bias(op, &lin, bias);

    Tensor y = allocate(x, shape_with_last(x, out_features), x.scalar_type());
    if (m.rows == 0 || out_features == 0) return y;
    std::optional<Tensor> own;
    const void *space;
    if (quantized_input) {
        space = quantized_workspace(op, &lin, shape, m.rows, *quantized_input);
    } else {
        size_t bytes;
        check(op, mq_linear_workspace_size(&lin, m.rows, &bytes));
        own = allocate(x, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
        quantize_tokens(op, lin, dtype, m.tensor.const_data_ptr(), m.rows, own->mutable_data_ptr());
        space = own->const_data_ptr();
    }

    multiply_tokens(op, lin, shape, dtype, m.rows, space, y.mutable_data_ptr());
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
        "unpack_rows(Tensor qweight, Tensor scales, Tensor salient_weight, "
        "Tensor? salient_scales, Tensor perm, Tensor rows, int out_features, int group_size, "
        "int rotation) -> Tensor");
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
    m.impl("unpack_rows", TORCH_BOX(&unpack_rows));
    m.impl("w4a4_linear", TORCH_BOX(&w4a4_linear));
    m.impl("quantize_input", TORCH_BOX(&quantize_input));
}
