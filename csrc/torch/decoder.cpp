// The parts of a decoder layer between its attention product and the next one, each as one call.
// For calls without gradients on the CPU, in eager mode: smoothquant/layers/decoder.py passes
// addresses and keeps the tensors alive. Through the dispatcher, the arguments of such a call would
// cost more than a small layer's arithmetic.
#include "decoder.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "linear.h"

namespace py = pybind11;

namespace mixedquant {
namespace {

constexpr Op kOp{"decoder_layer"};
constexpr size_t kMostKept = 16 << 20;  // bytes of scratch that a thread keeps between calls
constexpr int64_t kRowsAtOnce = 2048;   // so that scratch does not grow with the prompt

struct Free {
    void operator()(void *p) const { std::free(p); }
};

// Memory for the values between two linears, reused by all calls of a thread. A thread has one at a
// time.
class Scratch {
   public:
    explicit Scratch(size_t bytes) {
        thread_local std::unique_ptr<void, Free> kept;
        thread_local size_t kept_bytes = 0;
        if (bytes > kMostKept) {
            own_ = std::shared_ptr<void>(allocate(bytes), Free());
            at_ = static_cast<char *>(own_.get());
            return;
        }
        if (bytes > kept_bytes) {
            kept.reset();
            kept_bytes = 0;
            kept.reset(allocate(bytes));
            kept_bytes = bytes;
        }
        at_ = static_cast<char *>(kept.get());
    }
    char *take(int64_t bytes) {
        char *part = at_;
        at_ += aligned(bytes);
        return part;
    }
    static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

   private:
    static void *allocate(size_t bytes) {
        void *p = std::aligned_alloc(64, static_cast<size_t>(aligned(static_cast<int64_t>(bytes))));
        if (!p) throw std::bad_alloc();
        return p;
    }
    std::shared_ptr<void> own_;  // copies share the memory
    char *at_;
};

mq_dtype dtype_at(int dtype) {
    require(dtype >= MQ_F32 && dtype <= MQ_BF16, kOp, "dtype must be 0, 1 or 2; got ", dtype);
    return static_cast<mq_dtype>(dtype);
}

int64_t size_of(mq_dtype dtype) { return dtype == MQ_F32 ? 4 : 2; }

template <typename T>
const T *at(uintptr_t address) {
    return reinterpret_cast<const T *>(address);
}

struct Linear {
    mq_linear lin{};
    mq_shape shape{};

    // The same with the instruction set of this call. Another thread may force another one at any
    // time, and the workspace depends on it.
    Linear now(mq_isa isa) const {
        Linear copy = *this;
        copy.lin.isa = isa;
        return copy;
    }
    int64_t workspace(int64_t rows) const {
        size_t bytes;
        check(kOp, mq_linear_workspace_size(&lin, rows, &bytes));
        return static_cast<int64_t>(bytes);
    }
    void run(mq_dtype dtype, const void *x, int64_t rows, void *space, void *out) const {
        quantize_tokens(kOp, lin, dtype, x, rows, space);
        multiply_tokens(kOp, lin, shape, dtype, rows, space, out);
    }
};

Linear linear(int64_t n, int64_t k, int64_t k_salient, int64_t group_size, uintptr_t qweight,
              uintptr_t scales, uintptr_t salient, int salient_dtype, uintptr_t salient_scales,
              uintptr_t perm, uintptr_t bias, int bias_dtype, int rotation, int act_bits,
              const std::string &act_format, bool per_token, double clip) {
    Linear made;
    mq_linear &lin = made.lin;
    lin.n = n, lin.k = k, lin.k_salient = k_salient, lin.group_size = group_size;
    lin.qweight = at<uint8_t>(qweight), lin.scales = at<uint16_t>(scales);
    lin.salient = at<void>(salient), lin.salient_dtype = static_cast<mq_dtype>(salient_dtype);
    lin.salient_scales = at<uint16_t>(salient_scales), lin.perm = at<int32_t>(perm);
    lin.bias = at<void>(bias), lin.bias_dtype = static_cast<mq_dtype>(bias_dtype);
    lin.rotation = rotation;
    set_activations(kOp, &lin, act_bits, act_format, per_token, clip);
    check(kOp, mq_shape_of(n, k, k_salient, group_size, &made.shape));
    return made;
}

struct Norm {
    mq_norm norm;

    void run(mq_dtype dtype, const void *x, int64_t rows, void *out) const {
        const int64_t row_bytes = norm.k * size_of(dtype);
        parallel(kOp, rows, grain_of(kGrainValues, norm.k), [&](int64_t begin, int64_t end) {
            return mq_rms_norm(&norm, dtype, static_cast<const char *>(x) + begin * row_bytes,
                               end - begin, norm.k, static_cast<char *>(out) + begin * row_bytes);
        });
    }
};

void add(mq_dtype dtype, const void *a, const void *b, int64_t count, void *out) {
    parallel(kOp, count, kGrainValues, [&](int64_t begin, int64_t end) {
        const int64_t offset = begin * size_of(dtype);
        return mq_add(dtype, static_cast<const char *>(a) + offset,
                      static_cast<const char *>(b) + offset, end - begin,
                      static_cast<char *>(out) + offset);
    });
}

void gated(mq_activation activation, mq_dtype dtype, const void *gate_up, int64_t rows, int64_t n,
           void *out) {
    const int64_t row_bytes = n * size_of(dtype);
    parallel(kOp, rows, grain_of(kGrainValues, n), [&](int64_t begin, int64_t end) {
        return mq_gated(activation, dtype,
                        static_cast<const char *>(gate_up) + begin * 2 * row_bytes, end - begin, n,
                        static_cast<char *>(out) + begin * row_bytes);
    });
}

int64_t norm_linear_bytes(const Linear &linear, mq_dtype dtype, int64_t rows) {
    return Scratch::aligned(rows * linear.lin.k * size_of(dtype)) + linear.workspace(rows);
}

// out [rows][linear.n] = linear(norm(x)).
void compute_norm_linear(const Norm &norm, const Linear &linear, mq_dtype dtype, const void *x,
                         int64_t rows, Scratch scratch, void *out) {
    char *y = scratch.take(rows * linear.lin.k * size_of(dtype));
    norm.run(dtype, x, rows, y);
    linear.run(dtype, y, rows, scratch.take(linear.workspace(rows)), out);
}

void norm_linear(const Norm &norm, const Linear &given, int dtype_number, uintptr_t x, int64_t rows,
                 uintptr_t out) {
    const py::gil_scoped_release released;
    const mq_dtype dtype = dtype_at(dtype_number);
    const Linear linear = given.now(mq_isa_active());
    require(norm.norm.k == linear.lin.k, kOp, "norm and linear must have the same channels");
    for (int64_t first = 0; first < rows; first += kRowsAtOnce) {
        const int64_t n = std::min(kRowsAtOnce, rows - first), size = size_of(dtype);
        const Scratch scratch(static_cast<size_t>(norm_linear_bytes(linear, dtype, n)));
        compute_norm_linear(norm, linear, dtype, at<char>(x) + first * linear.lin.k * size, n,
                            scratch, reinterpret_cast<char *>(out) + first * linear.lin.n * size);
    }
}

// A cache of keys and values [sequences][kv_heads][capacity][head_dim] with room for a token more,
// and the blocks before them.
struct Past {
    char *keys, *values;
    int64_t capacity, tokens;  // tokens: in it already
    mq_kv_blocks blocks;       // of the first sequence; the others follow
    const uint8_t *mask;       // [sequences][all + 1] or nullptr

    int64_t all() const { return MQ_KV_BLOCK * blocks.count + tokens; }
    mq_kv_blocks blocks_of(int64_t sequence, int64_t kv_heads) const {
        mq_kv_blocks moved = blocks;
        if (!blocks.count) return moved;
        const int64_t heads = sequence * kv_heads;
        moved.keys = static_cast<const char *>(blocks.keys) + heads * blocks.key_stride;
        moved.values = static_cast<const char *>(blocks.values) + heads * blocks.value_stride;
        return moved;
    }
};

// Attention with rotary position embeddings, for one token per sequence.
struct Attention {
    int64_t heads, kv_heads, head_dim;
    float scale;

    int64_t width() const { return (heads + 2 * kv_heads) * head_dim; }  // of q, k and v

    // qkv [sequences][width]: rotates q and k in place, appends k and v to the cache. attended
    // [sequences][heads * head_dim]. cos, sin [sequences][head_dim], or one row for all of them.
    void run(mq_dtype dtype, char *qkv, int64_t sequences, const char *cos, const char *sin,
             bool one_position, const Past &past, char *attended) const {
        const int64_t row = head_dim * size_of(dtype), tokens = past.tokens + 1;
        const int64_t head_bytes = past.capacity * row, all = past.all() + 1;
        // a few microseconds of work are worth a thread
        const int64_t grain = grain_of(kGrainValues, all * head_dim * 2 * heads / kv_heads);
        for (int64_t i = 0; i < sequences; i++) {
            const int64_t position = one_position ? 0 : i * row;
            check(kOp, mq_rotary(dtype, cos + position, sin + position, heads + kv_heads, head_dim,
                                 qkv + i * width() * size_of(dtype)));
        }
        parallel(kOp, sequences * kv_heads, grain, [&](int64_t begin, int64_t end) {
            for (int64_t at = begin; at < end; at++) {
                const int64_t sequence = at / kv_heads, kv = at % kv_heads;
                char *q = qkv + sequence * width() * size_of(dtype), *k = q + heads * row;
                char *keys = past.keys + sequence * kv_heads * head_bytes;
                char *values = past.values + sequence * kv_heads * head_bytes;
                const int64_t place = kv * head_bytes + past.tokens * row;
                std::memcpy(keys + place, k + kv * row, static_cast<size_t>(row));
                std::memcpy(values + place, k + (kv_heads + kv) * row, static_cast<size_t>(row));
                const mq_attention of = {heads,
                                         kv_heads,
                                         head_dim,
                                         tokens,
                                         past.capacity * head_dim,
                                         keys,
                                         values,
                                         past.mask ? past.mask + sequence * all : nullptr,
                                         scale,
                                         past.blocks_of(sequence, kv_heads)};
                thread_local std::vector<float> scores;
                scores.resize(static_cast<size_t>(heads / kv_heads * all));
                const mq_status status = mq_attend(&of, dtype, q, kv, kv + 1, scores.data(),
                                                   attended + sequence * heads * row);
                if (status != MQ_OK) return status;
            }
            return MQ_OK;
        });
    }
};

// What follows the attention product in a layer with a gated MLP. A norm that is nullptr is left
// out.
struct Rest {
    Linear o, gate_up, down;
    mq_activation activation;
    const Norm *attention_post, *mlp_pre, *mlp_post;

    Rest now(mq_isa isa) const {
        Rest copy = *this;
        copy.o = o.now(isa), copy.gate_up = gate_up.now(isa), copy.down = down.now(isa);
        return copy;
    }

    int64_t workspace(int64_t rows) const {
        return std::max({o.workspace(rows), gate_up.workspace(rows), down.workspace(rows)});
    }
    int64_t bytes(mq_dtype dtype, int64_t rows) const {
        const int64_t narrow = Scratch::aligned(rows * o.lin.n * size_of(dtype));
        const int64_t wide = Scratch::aligned(rows * down.lin.k * size_of(dtype));
        return 3 * narrow + 3 * wide + workspace(rows);
    }

    // out [rows][hidden] = h + mlp_post(down(activation(gate) up)), gate_up(mlp_pre(h)),
    // h = residual + attention_post(o(attended)).
    void compute(mq_dtype dtype, const void *attended, const void *residual, int64_t rows,
                 Scratch scratch, void *out) const {
        const int64_t hidden = o.lin.n, inner = down.lin.k, size = size_of(dtype);
        const int64_t narrow = rows * hidden * size, wide = rows * inner * size;
        char *a = scratch.take(narrow), *b = scratch.take(narrow), *h = scratch.take(narrow);
        char *both = scratch.take(2 * wide), *product = scratch.take(wide);
        char *space = scratch.take(workspace(rows));

        o.run(dtype, attended, rows, space, a);
        if (attention_post) attention_post->run(dtype, a, rows, b), std::swap(a, b);
        add(dtype, residual, a, rows * hidden, h);
        mlp_pre->run(dtype, h, rows, b);
        gate_up.run(dtype, b, rows, space, both);
        gated(activation, dtype, both, rows, inner, product);
        down.run(dtype, product, rows, space, a);
        if (mlp_post) mlp_post->run(dtype, a, rows, b), std::swap(a, b);
        add(dtype, h, a, rows * hidden, out);
    }

    void run(int dtype_number, uintptr_t attended, uintptr_t residual, int64_t rows,
             uintptr_t out) const {
        const py::gil_scoped_release released;
        const mq_dtype dtype = dtype_at(dtype_number);
        const Rest rest = now(mq_isa_active());
        for (int64_t first = 0; first < rows; first += kRowsAtOnce) {
            const int64_t n = std::min(kRowsAtOnce, rows - first), size = size_of(dtype);
            const int64_t at_hidden = first * o.lin.n * size;
            const Scratch scratch(static_cast<size_t>(rest.bytes(dtype, n)));
            rest.compute(dtype, at<char>(attended) + first * o.lin.k * size,
                         at<char>(residual) + at_hidden, n, scratch,
                         reinterpret_cast<char *>(out) + at_hidden);
        }
    }
};

Rest rest(const Linear &o, const Norm *attention_post, const Norm *mlp_pre, const Linear &gate_up,
          const std::string &activation, const Linear &down, const Norm *mlp_post) {
    const std::string names[] = {"silu", "gelu_tanh", "relu"};
    const auto found = std::find(std::begin(names), std::end(names), activation);
    require(found != std::end(names), kOp, "activation must be silu, gelu_tanh or relu; got '",
            activation, "'");
    const int64_t hidden = o.lin.n;
    const auto fits = [&](const Norm *norm) { return !norm || norm->norm.k == hidden; };
    require(mlp_pre && fits(mlp_pre) && fits(attention_post) && fits(mlp_post) &&
                gate_up.lin.k == hidden && down.lin.n == hidden && gate_up.lin.n == 2 * down.lin.k,
            kOp, "the parts of a decoder layer do not fit together");
    return {o,
            gate_up,
            down,
            static_cast<mq_activation>(found - std::begin(names)),
            attention_post,
            mlp_pre,
            mlp_post};
}

// A decoder layer whose attention is `Attention`.
struct Layer {
    const Norm *norm;
    const Linear *qkv;
    const Attention *attention;
    const Rest *rest;
};

// Where a layer's cache is: keys, values, capacity, and the fields of mq_kv_blocks.
using CacheFields = std::tuple<uintptr_t, uintptr_t, int64_t, uintptr_t, uintptr_t, int64_t,
                               int64_t, int64_t, int, int64_t>;

// The caches of some layers, with room for a token more.
struct Caches {
    std::vector<Past> pasts;  // without tokens and mask
};

Caches caches(const std::vector<CacheFields> &given) {
    Caches made;
    for (const auto &[keys, values, capacity, key_blocks, value_blocks, key_stride, value_stride,
                      blocks, bits, group_size] : given) {
        require(blocks >= 0, kOp, "blocks must be at least 0; got ", blocks);
        made.pasts.push_back({reinterpret_cast<char *>(keys),
                              reinterpret_cast<char *>(values),
                              capacity,
                              0,
                              {at<void>(key_blocks), at<void>(value_blocks), key_stride,
                               value_stride, blocks, bits, group_size},
                              nullptr});
    }
    return made;
}

void run_layer(const Layer &layer, mq_isa isa, mq_dtype dtype, const void *x, int64_t sequences,
               const char *cos, const char *sin, bool one_position, const Past &past, void *out) {
    const Attention &attention = *layer.attention;
    const Linear qkv = layer.qkv->now(isa);
    const Rest rest = layer.rest->now(isa);
    const int64_t wide = sequences * attention.width() * size_of(dtype);
    const int64_t narrow = sequences * rest.o.lin.k * size_of(dtype);
    const int64_t after =
        std::max(norm_linear_bytes(qkv, dtype, sequences), rest.bytes(dtype, sequences));
    Scratch scratch(static_cast<size_t>(Scratch::aligned(wide) + Scratch::aligned(narrow) + after));
    char *both = scratch.take(wide), *attended = scratch.take(narrow);
    compute_norm_linear(*layer.norm, qkv, dtype, x, sequences, scratch, both);
    attention.run(dtype, both, sequences, cos, sin, one_position, past, attended);
    rest.compute(dtype, attended, x, sequences, scratch, out);
}

// Decoder layers, one after another, for one token per sequence: x, out [sequences][hidden]. tokens:
// how many each cache has beside its blocks. cos, sin: [sequences][head_dim], or one row for all
// sequences. mask: as in Past.
void decode(const std::vector<const Layer *> &layers, const Caches &caches, int64_t tokens,
            uintptr_t cos, uintptr_t sin, bool one_position, uintptr_t mask, int dtype_number,
            uintptr_t x, int64_t sequences, uintptr_t out) {
    const mq_dtype dtype = dtype_at(dtype_number);
    require(layers.size() == caches.pasts.size(), kOp, "caches must be as many as layers");
    for (size_t i = 0; i < layers.size(); i++)
        require(layers[i] && layers[i]->rest->o.lin.n == layers[0]->rest->o.lin.n && tokens >= 0 &&
                    tokens < caches.pasts[i].capacity,
                kOp, "layer ", i, " does not fit its cache or the layer before it");
    if (sequences == 0) return;
    const py::gil_scoped_release released;
    const mq_isa isa = mq_isa_active();
    const void *from = at<void>(x);
    for (size_t i = 0; i < layers.size(); i++) {
        void *to = reinterpret_cast<void *>(out);
        Past past = caches.pasts[i];
        past.tokens = tokens, past.mask = at<uint8_t>(mask);
        run_layer(*layers[i], isa, dtype, from, sequences, at<char>(cos), at<char>(sin),
                  one_position, past, to);
        from = to;
    }
}

}  // namespace

void bind_decoder(py::module_ &m) {
    py::class_<Linear>(m, "Linear").def(py::init(&linear));
    py::class_<Norm>(m, "Norm").def(
        py::init([](int64_t k, uintptr_t weight, double eps, double offset) {
            return Norm{{k, at<void>(weight), static_cast<float>(eps), static_cast<float>(offset)}};
        }));
    py::class_<Rest>(m, "Rest")
        .def(py::init(&rest), py::keep_alive<1, 3>(), py::keep_alive<1, 4>(),
             py::keep_alive<1, 8>())
        .def("run", &Rest::run);
    py::class_<Attention>(m, "Attention")
        .def(py::init([](int64_t heads, int64_t kv_heads, int64_t head_dim, double scale) {
            require(kv_heads >= 1 && heads >= 1 && heads % kv_heads == 0 && head_dim >= 1, kOp,
                    "heads must be a multiple of kv_heads; got ", heads, " and ", kv_heads);
            return Attention{heads, kv_heads, head_dim, static_cast<float>(scale)};
        }));
    py::class_<Layer>(m, "Layer")
        .def(py::init([](const Norm &norm, const Linear &qkv, const Attention &attention,
                         const Rest &rest) {
                 require(qkv.lin.n == attention.width() && qkv.lin.k == norm.norm.k &&
                             rest.o.lin.k == attention.heads * attention.head_dim &&
                             rest.o.lin.n == qkv.lin.k,
                         kOp, "the attention does not fit its linears");
                 return Layer{&norm, &qkv, &attention, &rest};
             }),
             py::keep_alive<1, 2>(), py::keep_alive<1, 3>(), py::keep_alive<1, 4>(),
             py::keep_alive<1, 5>());
    py::class_<Caches>(m, "Caches").def(py::init(&caches));
    m.def("norm_linear", &norm_linear);
    m.def("decode", &decode);
}

}  // namespace mixedquant
