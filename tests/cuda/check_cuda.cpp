// Runs the CUDA kernels on the CPU (emulator.h) and compares them with the scalar C kernels. It
// takes a list of linears, each with every kernel that serves it, then random small problems.
// Integers, and sums in the same order, must be equal bit for bit; other sums to within 1e-5 of the
// sum of their terms' magnitudes. Arrays have no spare bytes, output memory starts as NaNs, and
// threads run in both orders. tests/test_cuda_emulated.py builds it with ASan and UBSan. Usage:
// check_cuda SEED CASES, with so many random cases. Prints "N cases: architecture A" and the number
// of runs of each kernel. Or check_cuda CONTRACT, see break_contract. Aborts on any fault.
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cuda/common.cuh"
#include "../csrc/check.h"

using namespace mq;

namespace {

int64_t below(int64_t bound) { return bound > 0 ? rand() % bound : 0; }

template <size_t N>
int64_t one_of(const int64_t (&values)[N]) {
    return values[below(static_cast<int64_t>(N))];
}

// Bytes aligned to 16, with nothing behind them, initially 0xff.
struct bytes {
    explicit bytes(int64_t size) : n(static_cast<size_t>(size)), at(malloc(n ? n : 1), free) {
        CHECK(size >= 0);
        memset(at.get(), 0xff, n);
    }
    template <typename T>
    T *as() const {
        return static_cast<T *>(at.get());
    }
    bool operator==(const bytes &other) const {
        return n == other.n && memcmp(at.get(), other.at.get(), n) == 0;
    }
    size_t n;
    std::unique_ptr<void, void (*)(void *)> at;
};

bytes random_values(mq_dtype dtype, int64_t count, bool special, float spread = 1) {
    bytes values(count * size_of(dtype));
    const float odd[] = {0, -0.0f, 1e-45f, 1e-38f, INFINITY, NAN, -1.5f, -INFINITY};
    for (int64_t i = 0; i < count; i++) {
        float value = (static_cast<float>(rand()) / static_cast<float>(RAND_MAX) - 0.4f) * spread *
                      powf(4, static_cast<float>(below(4)) - 2);
        if (special && below(20) == 0) value = odd[below(8)];
        store(dtype, values.as<void>(), i, value);
    }
    return values;
}

bool same_value(mq_dtype dtype, const void *a, const void *b, int64_t i) {
    const float x = load(dtype, a, i), y = load(dtype, b, i);
    return (std::isnan(x) && std::isnan(y)) || __float_as_uint(x) == __float_as_uint(y);
}

void check_values(mq_dtype dtype, const bytes &a, const bytes &b) {
    CHECK(a.n == b.n);
    for (int64_t i = 0; i < static_cast<int64_t>(a.n) / size_of(dtype); i++)
        CHECK(same_value(dtype, a.as<void>(), b.as<void>(), i));
}

void turn_order() {
    emulator::order = emulator::order == emulator::FORWARD ? emulator::BACKWARD : emulator::FORWARD;
}

// ---- Everything but the linear ----

void check_groups() {
    const mq_dtype dtype = static_cast<mq_dtype>(below(3));
    const int64_t rows = below(4), cols = below(8) ? below(300) : below(2600);
    const mq_group_format format = {1 + (below(2) ? below(40) : below(2600)),
                                    static_cast<int>(2 + below(7)),
                                    static_cast<mq_act_format>(below(2)), below(2) ? 1.0f : 0.8f};
    mq_group_format zero_point = format;
    zero_point.act_format = MQ_ACT_ZERO_POINT;
    zero_point.num_bits = std::min(format.num_bits, 7);
    const int64_t groups = ceil_div(cols, format.group_size), packed = ceil_div<int64_t>(cols, 2);
    const int64_t rotation = below(3) ? 1 << below(10) : 0;
    const int is_unsigned = rotation % 2 != 0;
    const bytes x = random_values(dtype, rows * cols, true);
    std::vector<bytes> q, scales, out, fake, other, rotated, nibbles, codes;
    for (int i = 0; i < 2; i++) {
        q.emplace_back(rows * cols), scales.emplace_back(rows * groups * 4);
        for (auto *list : {&out, &fake, &other, &rotated})
            list->emplace_back(rows * cols * size_of(dtype));
        nibbles.emplace_back(rows * packed), codes.emplace_back(rows * cols);
    }
    const void *from = x.as<void>();
    CHECK(!mq_group_quantize(&format, dtype, from, rows, cols, cols, q[0].as<int8_t>(),
                             scales[0].as<float>()));
    CHECK(!mq_group_dequantize(&format, q[0].as<int8_t>(), scales[0].as<float>(), rows, cols, dtype,
                               out[0].as<void>()));
    CHECK(!mq_group_fake_quantize(&format, dtype, from, rows, cols, cols, fake[0].as<void>()));
    CHECK(!mq_group_fake_quantize(&zero_point, dtype, from, rows, cols, cols, other[0].as<void>()));
    CHECK(!mq_group_hadamard(format.group_size, rotation, dtype, from, rows, cols, cols,
                             rotated[0].as<void>()));
    CHECK(!mq_pack_nibbles(q[0].as<int8_t>(), rows, cols, nibbles[0].as<uint8_t>()));
    CHECK(!mq_unpack_nibbles(nibbles[0].as<uint8_t>(), rows, cols, is_unsigned,
                             codes[0].as<int8_t>()));
    turn_order();
    CHECK(!mq_cuda_group_quantize(&format, dtype, from, rows, cols, q[1].as<int8_t>(),
                                  scales[1].as<float>(), nullptr));
    CHECK(!mq_cuda_group_dequantize(&format, q[1].as<int8_t>(), scales[1].as<float>(), rows, cols,
                                    dtype, out[1].as<void>(), nullptr));
    CHECK(!mq_cuda_group_fake_quantize(&format, dtype, from, rows, cols, fake[1].as<void>(),
                                       nullptr));
    CHECK(!mq_cuda_group_fake_quantize(&zero_point, dtype, from, rows, cols, other[1].as<void>(),
                                       nullptr));
    CHECK(!mq_cuda_group_hadamard(format.group_size, rotation, dtype, from, rows, cols,
                                  rotated[1].as<void>(), nullptr));
    CHECK(!mq_cuda_pack_nibbles(q[1].as<int8_t>(), rows, cols, nibbles[1].as<uint8_t>(), nullptr));
    CHECK(!mq_cuda_unpack_nibbles(nibbles[1].as<uint8_t>(), rows, cols, is_unsigned,
                                  codes[1].as<int8_t>(), nullptr));
    CHECK(q[0] == q[1] && nibbles[0] == nibbles[1] && codes[0] == codes[1]);
    check_values(MQ_F32, scales[0], scales[1]);
    for (auto *list : {&out, &fake, &other, &rotated}) check_values(dtype, (*list)[0], (*list)[1]);
}

void check_stats() {
    const mq_dtype dtype = static_cast<mq_dtype>(below(3));
    const int64_t rows = below(6), cols = below(8) ? below(80) : below(700), before = below(100);
    const bytes x = random_values(dtype, rows * cols, true);
    std::vector<std::vector<bytes>> fields(2);
    std::vector<mq_channel_stats> stats;
    for (size_t i = 0; i < 2; i++) {
        for (int64_t size : {4, 4, 8, 8, 8}) fields[i].emplace_back(size * cols);
        stats.push_back({fields[i][0].as<float>(), fields[i][1].as<float>(),
                         fields[i][2].as<double>(), fields[i][3].as<double>(),
                         fields[i][4].as<int64_t>()});
        for (int64_t c = 0; c < cols; c++) {
            stats[i].abs_max[c] = 0, stats[i].minimum[c] = INFINITY;
            stats[i].abs_sum[c] = stats[i].sq_sum[c] = 0, stats[i].argmax[c] = 0;
        }
    }
    int64_t count = before;
    CHECK(!mq_channel_stats_update(dtype, x.as<void>(), rows, cols, 0, cols, count, &stats[0]));
    turn_order();
    CHECK(
        !mq_cuda_channel_stats_update(dtype, x.as<void>(), rows, cols, &count, &stats[1], nullptr));
    CHECK(count == before + rows);
    check_values(MQ_F32, fields[0][0], fields[1][0]);
    check_values(MQ_F32, fields[0][1], fields[1][1]);
    CHECK(fields[0][4] == fields[1][4]);
    for (int64_t c = 0; c < cols; c++)
        for (auto sum : {&mq_channel_stats::abs_sum, &mq_channel_stats::sq_sum}) {
            const double a = (stats[0].*sum)[c], b = (stats[1].*sum)[c];
            CHECK((std::isnan(a) && std::isnan(b)) || memcmp(&a, &b, 8) == 0);
        }
    for (int key = 0; key < 4; key++) {
        const mq_sort_key by = static_cast<mq_sort_key>(key);
        const bytes keys(8 * cols), same(8 * cols), order(8 * cols), scratch(8 * cols),
            same_order(8 * cols);
        CHECK(!mq_sort_keys(by, cols, count, &stats[0], keys.as<double>()));
        CHECK(!mq_cuda_sort_keys(by, cols, &count, &stats[0], same.as<double>(), nullptr));
        for (int64_t c = 0; c < cols; c++) {
            const double a = keys.as<double>()[c], b = same.as<double>()[c];
            CHECK((std::isnan(a) && std::isnan(b)) || memcmp(&a, &b, 8) == 0);
        }
        CHECK(!mq_argsort(keys.as<double>(), cols, key % 2, order.as<int64_t>(),
                          scratch.as<int64_t>()));
        CHECK(
            !mq_cuda_argsort(keys.as<double>(), cols, key % 2, same_order.as<int64_t>(), nullptr));
        CHECK(order == same_order);
    }
}

void check_columns() {
    const int64_t rows = below(20), cols = below(50), col0 = below(30), g = 1 + below(20);
    const int64_t groups = (col0 + cols) / g + 1;
    const bool special = below(2);  // some are NaN or Inf
    const bytes u = random_values(MQ_F32, cols * cols, special);
    bytes scales = random_values(MQ_F32, rows * groups, false);
    for (int64_t i = 0; i < rows * groups; i++)
        scales.as<float>()[i] = below(8) ? fabsf(scales.as<float>()[i]) : 0;
    const bytes w = random_values(MQ_F32, rows * cols, special), errors(rows * cols * 4),
                same_errors(rows * cols * 4), same(rows * cols * 4);
    memcpy(same.as<void>(), w.as<void>(), w.n);
    CHECK(!mq_gptq_block(7, rows, cols, col0, g, groups, scales.as<float>(), u.as<float>(),
                         w.as<float>(), errors.as<float>()));
    turn_order();
    CHECK(!mq_cuda_gptq_block(7, rows, cols, col0, g, groups, scales.as<float>(), u.as<float>(),
                              same.as<float>(), same_errors.as<float>(), nullptr));
    check_values(MQ_F32, w, same);
    check_values(MQ_F32, errors, same_errors);
    // w is on its grid now; any matrix and gradient will do
    CHECK(!mq_descend_block(7, rows, cols, col0, g, groups, scales.as<float>(), u.as<float>(),
                            errors.as<float>(), w.as<float>()));
    CHECK(!mq_cuda_descend_block(7, rows, cols, col0, g, groups, scales.as<float>(), u.as<float>(),
                                 same_errors.as<float>(), same.as<float>(), nullptr));
    check_values(MQ_F32, w, same);
    check_values(MQ_F32, errors, same_errors);
}

// ---- The linear ----

struct problem {
    mq_linear lin;
    mq_shape shape;
    mq_dtype dtype;
    int64_t m;
    bytes perm, w, x, bias, qweight, scales, salient, salient_scales;
};

struct sizes {
    int64_t m, n, k, group_size, salient;
    mq_act_format format;
    int rotation = -1;  // otherwise: one scale per group, and this rotation
};

sizes random_sizes() {
    const int64_t ms[] = {1, 2, 8, 9, 15, 16, 17, 33, 65, 130};
    const int64_t ns[] = {1, 4, 16, 31, 33, 64, 97, 130, 270};
    const int64_t ks[] = {1, 2, 3, 13, 32, 64, 100, 128, 200, 256, 300, 512, 640, 2300};
    const int64_t gs[] = {1,   3,   4,   8,   12,  16,  20,  32,  33,   48,  64,
                          100, 128, 128, 128, 192, 256, 256, 384, 1024, 4096};
    const int64_t k = one_of(ks);
    const int64_t saliences[] = {0, 0, 1, k / 20, k / 10, 16, k / 2, k};
    const mq_act_format format = below(2) ? MQ_ACT_SYMMETRIC : static_cast<mq_act_format>(below(3));
    return {one_of(ms), one_of(ns), k, one_of(gs), std::min(one_of(saliences), k), format};
}

// The other fields are random. is_wide: more than 4 bits per activation.
problem problem_of(const sizes &of, bool is_wide = false) {
    mq_linear lin = {};
    lin.n = of.n;
    lin.k = of.k;
    lin.group_size = of.group_size;
    lin.k_salient = of.salient;
    lin.salient_dtype = static_cast<mq_dtype>(MQ_F16 + below(3));
    lin.rotation = below(3) ? 0 : 1 << below(10);
    lin.act_format = of.format;
    const int most_bits = lin.act_format == MQ_ACT_SYMMETRIC ? 8 : 7;
    lin.act_bits = static_cast<int>(is_wide ? 5 + below(most_bits - 4) : 2 + below(3));
    lin.per_token = below(4) == 0;
    if (of.rotation >= 0) lin.rotation = of.rotation, lin.per_token = 0;
    lin.clip = below(2) ? 1.0f : 0.7f;
    const int64_t m = of.m;
    const mq_dtype dtype = static_cast<mq_dtype>(below(3));
    mq_shape shape;
    CHECK(!mq_shape_of(lin.n, lin.k, lin.k_salient, lin.group_size, &shape));
    // sometimes magnitudes that only fp32 and bf16 hold
    const float spread = below(10) || dtype == MQ_F16 || lin.k_salient ? 1
                         : below(2)                                    ? 1e34f
                                                                       : 1e-30f;
    problem p = {lin,
                 shape,
                 dtype,
                 m,
                 bytes(lin.k * 4),
                 random_values(MQ_F32, lin.n * lin.k, false, spread),
                 random_values(dtype, m * lin.k, below(3) == 0, spread > 1 ? 1e-6f : 1),
                 random_values(dtype, lin.n, false),
                 bytes(shape.panels * shape.blocks * MQ_BLOCK_BYTES),
                 bytes(shape.panels * shape.groups * 32),
                 bytes(shape.panels * lin.k_salient * 16 * size_of(lin.salient_dtype)),
                 bytes(lin.salient_dtype == MQ_I8 ? shape.panels * 32 : 0)};
    int32_t *perm = p.perm.as<int32_t>();
    for (int32_t i = 0; i < lin.k; i++) perm[i] = i;
    for (int64_t i = lin.k - 1; i > 0; i--) std::swap(perm[i], perm[below(i + 1)]);
    p.lin.perm = below(8) ? perm : nullptr;
    p.lin.bias = below(2) ? p.bias.as<void>() : nullptr;
    p.lin.bias_dtype = dtype;
    p.lin.qweight = p.qweight.as<uint8_t>();
    p.lin.scales = p.scales.as<uint16_t>();
    p.lin.salient = p.salient.as<void>();
    p.lin.salient_scales = p.salient_scales.as<uint16_t>();
    CHECK(!mq_pack_weight(&p.lin, 7, MQ_F32, p.w.as<void>(), lin.k, nullptr, 0, shape.panels,
                          p.qweight.as<uint8_t>(), p.scales.as<uint16_t>(), p.salient.as<void>(),
                          p.salient_scales.as<uint16_t>()));
    return p;
}

void check_weights(const problem &p) {
    bytes qweight(static_cast<int64_t>(p.qweight.n)), scales(static_cast<int64_t>(p.scales.n)),
        salient(static_cast<int64_t>(p.salient.n)),
        salient_scales(static_cast<int64_t>(p.salient_scales.n)), seen(p.lin.k * 4);
    memset(seen.as<void>(), 0, seen.n);
    int status = 0;
    uint16_t *row_scales = p.lin.salient_dtype == MQ_I8 ? salient_scales.as<uint16_t>() : nullptr;
    const auto pack = [&](const mq_linear &lin, bool check) {
        CHECK(!mq_cuda_pack_weight(&lin, 7, MQ_F32, p.w.as<void>(), nullptr, qweight.as<uint8_t>(),
                                   scales.as<uint16_t>(), salient.as<void>(), row_scales,
                                   check && lin.perm ? seen.as<int>() : nullptr, &status, nullptr));
    };
    pack(p.lin, true);
    CHECK(status == 0);
    CHECK(qweight == p.qweight && scales == p.scales && salient == p.salient &&
          salient_scales == p.salient_scales);
    std::vector<bytes> unpacked;
    for (int i = 0; i < 2; i++) unpacked.emplace_back(p.lin.n * p.lin.k * 4);
    CHECK(!mq_unpack_weight(&p.lin, 0, p.shape.panels, unpacked[0].as<float>()));
    CHECK(!mq_cuda_unpack_rows(&p.lin, nullptr, p.lin.n, unpacked[1].as<float>(), nullptr));
    check_values(MQ_F32, unpacked[0], unpacked[1]);
    const int64_t rows[3] = {below(p.lin.n), below(p.lin.n), below(p.lin.n)};
    std::vector<bytes> chosen;
    for (int i = 0; i < 2; i++) chosen.emplace_back(3 * p.lin.k * 4);
    CHECK(!mq_unpack_rows(&p.lin, rows, 3, chosen[0].as<float>()));
    CHECK(!mq_cuda_unpack_rows(&p.lin, rows, 3, chosen[1].as<float>(), nullptr));
    check_values(MQ_F32, chosen[0], chosen[1]);
    // errors that only the device sees
    float *w = p.w.as<float>();
    const int64_t at = below(p.lin.n * p.lin.k);
    const float kept = w[at];
    w[at] = below(2) ? NAN : INFINITY;
    pack(p.lin, false);
    CHECK(status == MQ_CUDA_BAD_WEIGHT);
    w[at] = kept;
    if (!p.lin.perm || p.lin.k < 2) return;
    for (const int32_t wrong : {-1, static_cast<int32_t>(p.lin.k), p.lin.perm[1]}) {
        int32_t *perm = p.perm.as<int32_t>();
        const int32_t first = perm[0];
        perm[0] = wrong;
        status = 0;
        memset(seen.as<void>(), 0, seen.n);
        pack(p.lin, true);
        CHECK(status & MQ_CUDA_BAD_PERM);
        perm[0] = first;
    }
}

// Compares a workspace's codes and scales with group quantization of the gathered and rotated rows.
void check_codes(const problem &p, int kernel, const bytes &workspace) {
    const mq_linear &lin = p.lin;
    const int64_t k4 = lin.k - lin.k_salient;
    if (lin.act_format == MQ_ACT_ZERO_POINT || k4 == 0) return;
    const std::string name = mq_cuda_kernel_at(kernel)->name;
    const bool nibbles = name == "prefill_s4";
    const quad_order order = nibbles ? NIBBLES : name == "prefill_wgmma" ? EVEN_FIRST : IN_ORDER;
    const tokens at = tokens_in(workspace.as<void>(), lin, order, p.dtype, p.m, nullptr);
    const slots slot = slots_of(p.shape);
    const int64_t g = lin.per_token ? k4 : lin.group_size;
    const mq_group_format format = {g, lin.act_bits, lin.act_format, lin.clip};
    const int64_t groups = ceil_div(k4, g);
    const bytes row_bytes(k4 * 4), rotated_bytes(k4 * 4), scale_bytes(groups * 4), code_bytes(k4);
    float *row = row_bytes.as<float>(), *rotated = rotated_bytes.as<float>();
    float *scales = scale_bytes.as<float>();
    int8_t *q = code_bytes.as<int8_t>();
    for (int64_t t = 0; t < p.m; t++) {
        for (int64_t i = 0; i < k4; i++)
            row[i] = load(p.dtype, p.x.as<void>(), t * lin.k + (lin.perm ? lin.perm[i] : i));
        CHECK(!mq_group_hadamard(lin.group_size, lin.rotation, MQ_F32, row, 1, k4, k4, rotated));
        CHECK(!mq_group_quantize(&format, MQ_F32, rotated, 1, k4, k4, q, scales));
        for (int64_t i = 0; i < k4; i++) {
            const int64_t group = i / lin.group_size, channel = i % lin.group_size;
            const int64_t quad = group * p.shape.group_quads + channel / 4;
            const int64_t s = slot.of_quad(quad, group);
            const unsigned char *record = at.codes + (s * at.stride + t) * at.record;
            const int byte = record[at.word_of(quad) * 4 + channel % 4];
            const int nibble = byte >> (quad % 2 * 4) & 15;
            const bool is_signed = lin.act_format == MQ_ACT_SYMMETRIC;
            CHECK(q[i] == (!nibbles    ? static_cast<int8_t>(byte)
                           : is_signed ? (nibble ^ 8) - 8
                                       : nibble));
            const float got = at.scales[group * at.stride + t], want = scales[i / g];
            CHECK(got == want || (std::isnan(got) && std::isnan(want)));
        }
    }
}

std::vector<float> reference(const problem &p) {
    mq_linear lin = p.lin;
    lin.isa = MQ_ISA_SCALAR;
    size_t size;
    CHECK(!mq_linear_workspace_size(&lin, p.m, &size));
    const bytes y(p.m * lin.n * size_of(p.dtype));
    void *workspace = aligned_alloc(64, (size + 63) / 64 * 64);
    CHECK(!mq_linear_quantize(&lin, p.dtype, p.x.as<void>(), lin.k, p.m, 0, p.m, workspace));
    CHECK(!mq_linear_multiply(&lin, p.m, 0, p.m, 0, p.shape.panels, workspace, p.dtype,
                              y.as<void>(), lin.n));
    free(workspace);
    std::vector<float> values;
    for (int64_t i = 0; i < p.m * lin.n; i++) values.push_back(load(p.dtype, y.as<void>(), i));
    return values;
}

// The sum of the magnitudes of each output's terms.
std::vector<double> magnitudes(const problem &p) {
    const int64_t n = p.lin.n, k = p.lin.k;
    const bytes w(n * k * 4);
    CHECK(!mq_unpack_weight(&p.lin, 0, p.shape.panels, w.as<float>()));
    std::vector<double> sums;
    for (int64_t t = 0; t < p.m; t++)
        for (int64_t o = 0; o < n; o++) {
            double sum = p.lin.bias ? fabs(static_cast<double>(load(p.dtype, p.lin.bias, o))) : 0;
            for (int64_t i = 0; i < k; i++)
                sum += fabs(static_cast<double>(load(p.dtype, p.x.as<void>(), t * k + i)) *
                            static_cast<double>(w.as<float>()[o * k + i]));
            sums.push_back(sum);
        }
    return sums;
}

std::map<std::string, int> runs;   // per kernel
std::map<std::string, int> wraps;  // runs in which all stages of the ring were reused, over several
                                   // groups
std::map<std::string, std::set<std::string>> kinds;  // of groups and formats

// How groups are aligned: to pairs of steps, steps or pairs of quads.
std::string kind_of(const problem &p) {
    const int64_t quads = p.shape.group_quads;
    const char *lie = quads % 16 == 0  ? "pairs of steps"
                      : quads % 8 == 0 ? "steps"
                      : quads % 2 == 0 ? "pairs of quads"
                                       : "quads";
    return lie + std::to_string(p.lin.act_format);
}

void count(const problem &p, const std::string &name) {
    runs[name]++;
    if (p.shape.groups > 1) kinds[name].insert(kind_of(p));
    // as many stages as newer GPUs have
    const int64_t ring = name == "prefill_wgmma" ? 6 : 3;
    if (name.substr(0, 7) == "prefill")
        wraps[name] += p.shape.groups > 1 && slots_of(p.shape).total > 2 * ring * 4;
}

// The workspace of the first m tokens.
bytes quantized(const problem &p, int kernel, int64_t m) {
    bytes workspace(static_cast<int64_t>(mq_cuda_linear_workspace(&p.lin, kernel, p.dtype, m)));
    CHECK(!mq_cuda_linear_quantize(&p.lin, kernel, p.dtype, p.x.as<void>(), m, workspace.as<void>(),
                                   nullptr));
    return workspace;
}

// Their outputs.
bytes multiplied(const problem &p, int kernel, int64_t m, const bytes &workspace) {
    bytes y(m * p.lin.n * size_of(p.dtype));
    emulator::hide_from_early(workspace.as<void>(), workspace.n);
    CHECK(!mq_cuda_linear_multiply(&p.lin, kernel, p.dtype, MQ_ARCH, workspace.as<void>(), m,
                                   y.as<void>(), nullptr));
    return y;
}

// A token's result does not depend on the number of tokens.
void check_prefix(const problem &p, int kernel, const bytes &all) {
    const int64_t m = 1 + below(p.m);
    const bytes y = multiplied(p, kernel, m, quantized(p, kernel, m));
    for (int64_t i = 0; i < m * p.lin.n; i++)
        CHECK(same_value(p.dtype, y.as<void>(), all.as<void>(), i));
}

bytes check_kernel(const problem &p, int kernel, const std::vector<float> &want,
                   const std::vector<double> &sizes) {
    const std::string name = mq_cuda_kernel_at(kernel)->name;
    std::vector<bytes> y;
    for (int i = 0; i < 2; i++) {
        const bytes workspace = quantized(p, kernel, p.m);
        check_codes(p, kernel, workspace);
        y.push_back(multiplied(p, kernel, p.m, workspace));
        turn_order();
    }
    check_values(p.dtype, y[0], y[1]);
    const bool same_order = p.lin.k_salient == 0 && name.substr(0, 7) == "prefill";
    const double half_step = p.dtype == MQ_F32 ? 0 : p.dtype == MQ_F16 ? 0x1p-10 : 0x1p-7;
    for (size_t i = 0; i < want.size(); i++) {
        const float a = load(p.dtype, y[0].as<void>(), static_cast<int64_t>(i)), b = want[i];
        if ((std::isnan(a) && std::isnan(b)) || a == b) continue;
        const double allowed = 1e-5 * sizes[i] + half_step * fabs(static_cast<double>(b)) +
                               (p.dtype == MQ_F16 ? 0x1p-24 : 1e-38);
        if (!same_order && fabs(static_cast<double>(a) - static_cast<double>(b)) <= allowed)
            continue;
        fprintf(
            stderr,
            "%s: y[%zu] is %.9g, not %.9g (+- %g): m %ld n %ld k %ld salient %ld (dtype %d) g %ld "
            "x dtype %d rotation %d format %d per token %d bits %d\n",
            name.c_str(), i, static_cast<double>(a), static_cast<double>(b), allowed, p.m, p.lin.n,
            p.lin.k, p.lin.k_salient, p.lin.salient_dtype, p.lin.group_size, p.dtype,
            p.lin.rotation, p.lin.act_format, p.lin.per_token, p.lin.act_bits);
        abort();
    }
    count(p, name);
    check_prefix(p, kernel, y[0]);
    return std::move(y[0]);
}

constexpr mq_act_format S = MQ_ACT_SYMMETRIC, U = MQ_ACT_UNSIGNED, Z = MQ_ACT_ZERO_POINT;

// Every tail; few and many tokens; steps with several groups and groups of several steps; no
// salient channels and only salient ones; every format with every alignment of groups (see
// kind_of).
const sizes kClasses[] = {
    {1, 31, 100, 4, 0, Z},       {15, 33, 130, 16, 13, S}, {16, 97, 200, 32, 10, U},
    {17, 1, 300, 64, 15, Z},     {65, 33, 640, 128, 0, S}, {65, 270, 300, 256, 30, S},
    {17, 31, 2100, 1024, 65, U}, {1, 16, 64, 64, 64, S},   {65, 4, 13, 4, 13, U},
    {15, 64, 512, 128, 26, Z},   {16, 17, 77, 16, 0, U},   {1, 130, 1150, 128, 58, S},
    {65, 35, 130, 64, 0, U},     {17, 49, 260, 4, 20, S},  {65, 3, 1100, 1024, 0, Z},
    {16, 65, 520, 256, 0, S},    {15, 21, 70, 32, 70, S},  {1, 7, 500, 1024, 0, S},
    {65, 33, 230, 96, 0, Z},     {17, 35, 200, 32, 0, S},  {15, 21, 150, 48, 6, Z},
    {65, 17, 130, 12, 7, U},     {1, 15, 90, 8, 0, Z},
};

// Long enough to reuse stages of the rings several times, with groups of one stage up to all.
const sizes kRings[] = {
    {130, 33, 768, 128, 0, S},    {65, 31, 896, 384, 20, U},  {65, 33, 896, 256, 0, Z},
    {65, 33, 1600, 128, 0, Z},    {65, 31, 1600, 1024, 0, S}, {65, 31, 2304, 256, 115, U},
    {65, 16, 2304, 4096, 230, Z}, {65, 18, 700, 20, 0, Z},
};

// Every path through quantize_columns: two tokens per block and one left over, several blocks per
// token, several rounds per block, more shared memory than the default, more channels than fit;
// rotations in blocks smaller than, equal to and larger than a group, with a remainder.
const sizes kQuantized[] = {
    {1025, 2, 101, 32, 5, S, 0},  {3, 3, 4700, 128, 100, U, 0}, {260, 1, 4600, 128, 0, S, 0},
    {1, 3, 24576, 128, 16, S, 0}, {2, 2, 33001, 64, 100, Z, 0}, {3, 5, 100, 32, 0, S, 8},
    {4, 3, 310, 64, 0, U, 64},    {3, 4, 300, 128, 0, S, 128},  {2, 3, 1100, 512, 0, S, 512},
    {3, 3, 700, 256, 0, U, 32},   {2, 3, 530, 128, 0, S, 16},   {2, 3, 1100, 128, 20, S, 512},
};

// Runs every kernel that serves the linear, or only those for many tokens.
void check_by_all(const sizes &of, bool decode, bool is_wide = false) {
    const problem p = problem_of(of, is_wide);
    const std::vector<float> want = reference(p);
    const std::vector<double> terms = magnitudes(p);
    std::vector<bytes> of_few, of_many;  // outputs of the kernels for few tokens, and of those for
                                         // many
    for (int kernel = 0; kernel < mq_cuda_kernel_count(); kernel++) {
        const mq_cuda_kernel &row = *mq_cuda_kernel_at(kernel);
        const bool for_many = row.most_tokens == INT64_MAX;
        if (!mq_cuda_kernel_serves(kernel, &p.lin, MQ_ARCH) || !(decode || for_many)) continue;
        bytes y = check_kernel(p, kernel, want, terms);
        // its products of halves use other instructions, whose sums may differ in the last bits
        if (p.lin.k_salient && row.name == std::string("prefill_wgmma")) continue;
        (for_many ? of_many : of_few).push_back(std::move(y));
    }
    // all kernels for few tokens agree bit for bit, and all kernels for many
    for (const auto *list : {&of_few, &of_many})
        for (const bytes &y : *list) check_values(p.dtype, y, list->front());
}

// Runs the quantizing step for every order of quads. Multiplies only once, because that takes
// longer.
void check_quantized(const sizes &of) {
    const problem p = problem_of(of);
    for (int kernel = 0; kernel < mq_cuda_kernel_count(); kernel++) {
        const std::string name = mq_cuda_kernel_at(kernel)->name;
        if (!mq_cuda_kernel_serves(kernel, &p.lin, MQ_ARCH)) continue;
        const bool is_small = p.m < 100 || p.lin.k_salient;
        if (name == "decode_8" && is_small) check_kernel(p, kernel, reference(p), magnitudes(p));
        if (name != "prefill_wgmma" && name != "prefill_s4" && is_small) continue;
        check_codes(p, kernel, quantized(p, kernel, p.m));
    }
}

void check_linear() {
    const problem p = problem_of(random_sizes(), below(2) == 0);
    check_weights(p);
    const std::vector<float> want = reference(p);
    const std::vector<double> sizes = magnitudes(p);
    const int chosen = mq_cuda_kernel_for(&p.lin, MQ_ARCH, p.m);
    CHECK(chosen >= 0);
    check_kernel(p, chosen, want, sizes);
    const int other = static_cast<int>(below(mq_cuda_kernel_count()));
    if (mq_cuda_kernel_serves(other, &p.lin, MQ_ARCH)) check_kernel(p, other, want, sizes);
}

// Runs a step and breaks one contract of mixedquant_cuda.h, or none.
void break_contract(const std::string &contract) {
    const problem p = problem_of({2, 3, 100, 32, 5, S, 0});
    const bytes workspace(static_cast<int64_t>(mq_cuda_linear_workspace(&p.lin, 0, p.dtype, p.m)));
    const unsigned char *x = p.x.as<unsigned char>();
    mq_linear lin = p.lin;
    if (contract == "x") x += 2;
    if (contract == "scales") lin.scales++;
    const int kernel = contract == "kernel" ? mq_cuda_kernel_count() : 0;
    CHECK(!mq_cuda_linear_quantize(&lin, kernel, p.dtype, x, p.m, workspace.as<void>(), nullptr));
}

}  // namespace

int main(int argc, char **argv) {
    if (argc == 2) break_contract(argv[1]);
    if (argc == 2) return 0;
    CHECK(argc == 3);
    srand(static_cast<unsigned>(atoi(argv[1])));
    const int cases = atoi(argv[2]);
    for (const sizes &of : kClasses) check_by_all(of, true);
    for (size_t i = 0; i < std::size(kClasses); i += 5) check_by_all(kClasses[i], true, true);
    for (const sizes &of : kRings) check_by_all(of, false);
    for (const sizes &of : kQuantized) check_quantized(of);
    for (const auto &run : wraps) CHECK(run.second > 1);
    if (kinds.count("prefill_wgmma")) CHECK(kinds["prefill_wgmma"].size() == 3);
    for (int kernel = 0; kernel < mq_cuda_kernel_count(); kernel++) {
        const mq_cuda_kernel &row = *mq_cuda_kernel_at(kernel);
        const bool for_any_group = row.group_multiple == 1;
        if (for_any_group && MQ_ARCH >= row.oldest && MQ_ARCH <= row.newest)
            CHECK(kinds[row.name].size() == 4 * 3);
    }
    for (int i = 0; i < cases; i++) {
        check_groups();
        check_stats();
        check_columns();
        check_linear();
    }
    printf("%d cases: architecture %d\n", cases, MQ_ARCH);
    for (const auto &run : runs) printf("%s %d\n", run.first.c_str(), run.second);
    return 0;
}
