// Kernels for many tokens. A block computes 128 output channels of 128 tokens; a warp computes 64
// of 32. Operands go through a ring of stages in shared memory, which cp.async fills ahead of use.
#include "multiply.cuh"

namespace mq {
namespace {

constexpr int kTokens = 128, kPanels = 8;    // per block
constexpr int kWarpTokens = 32, kPairs = 2;  // per warp: 4 panels
constexpr int kTiles = kWarpTokens / 8;
constexpr int kTokenWarps = kTokens / kWarpTokens;
constexpr int kSlots = 4;                       // per stage
constexpr int kChunks = 2;                      // or as many terms of chunks of salient channels
constexpr int kStages = MQ_ARCH >= 80 ? 3 : 2;  // Turing has 64 KiB of shared memory

struct stage {
    // [slot or chunk][token][32 or 16 bytes]
    unsigned char tokens[kSlots * kTokens * 32];
    // [panel][slot][block][4 channels][16 bytes], or [panel][chunk][16 rows][16 channels]
    unsigned char weights[kPanels * kSlots * 256];
    uint16_t weight_scales[kSlots][kPanels][MQ_PANEL];  // of the group that ends with the slot
    float token_scales[kSlots][kTokens];
    int token_zeros[kSlots][kTokens];  // where the workspace has them
};
static_assert(sizeof(stage::weights) == kPanels * kChunks * 512, "a chunk's panel has 512 bytes");

__device__ __forceinline__ void copy_if(bool valid, void *to, const void *from) {
    copy_async(to, from, valid ? 16 : 0);
}

// Walks over slots in order and tracks the group of each.
struct cursor {
    const slots *of;
    int64_t slot, group, end;

    __device__ __forceinline__ explicit cursor(const slots *of_)
        : of(of_), slot(0), group(0), end(of_->groups ? of_->end(0) : 0) {}
    __device__ __forceinline__ bool is_valid() const { return slot < of->total; }
    __device__ __forceinline__ bool is_last() const { return slot + 1 == end; }
    __device__ __forceinline__ void next() {
        slot++;
        if (slot < end || !is_valid()) return;
        group++;
        end = of->end(group);
    }
};

struct block_place {
    int64_t token, panel;  // the first ones
};

// Swizzles of 16-byte units, for weight blocks and for rows of salient weights: lanes that read
// together use different banks.
__device__ __forceinline__ int weight_unit(int block, int unit) {
    return block * 4 + (unit ^ (block & 2));
}
__device__ __forceinline__ int salient_row(int row) { return row ^ (row >> 2 & 3); }

__device__ __forceinline__ void load_slots(const multiply_args &args, const block_place &at,
                                           cursor &walk, stage &to) {
    const int record_units = args.from.record / 16, thread = static_cast<int>(threadIdx.x);
    for (int s = 0; s < kSlots; s++, walk.next()) {
        const bool valid = walk.is_valid();
        const int64_t slot = walk.slot;
        // kTokens * record_units is kThreads or half of it
        if (thread < kTokens * record_units) {
            const bool in_m = at.token + thread / record_units < args.from.m;
            const int64_t from = (slot * args.from.stride + at.token) * args.from.record;
            copy_if(valid && in_m, to.tokens + (s * kTokens * record_units + thread) * 16,
                    args.from.codes + from + thread * 16);
        }
        if (thread < kPanels * 16) {
            const int panel = thread / 16, block = thread / 4 % 4, unit = thread % 4;
            const int64_t b = args.slot.step(slot, walk.group) * 4 + block;
            const int64_t from = ((at.panel + panel) * args.shape.blocks + b) * MQ_BLOCK_BYTES;
            copy_if(valid && b < args.shape.blocks && at.panel + panel < args.shape.panels,
                    to.weights + (panel * kSlots + s) * 256 + weight_unit(block, unit) * 16,
                    args.lin.qweight + from + unit * 16);
        } else if (valid && walk.is_last() && thread < kPanels * 16 + kPanels * 2) {
            const int panel = thread % 16 / 2, half = thread % 2;
            const int64_t from =
                ((at.panel + panel) * args.shape.groups + walk.group) * MQ_PANEL + half * 8;
            copy_if(at.panel + panel < args.shape.panels, &to.weight_scales[s][panel][half * 8],
                    args.lin.scales + from);
        } else if (valid && walk.is_last() && thread >= kThreads - kTokens / 2) {
            const int token = thread % (kTokens / 4) * 4;
            if (thread >= kThreads - kTokens / 4)
                copy_by_token(args, args.from.scales, walk.group, at.token + token,
                              &to.token_scales[s][token]);
            else if (args.from.zeros)
                copy_by_token(args, args.from.zeros, walk.group, at.token + token,
                              &to.token_zeros[s][token]);
        }
    }
}

// Loads terms of chunks from `first` on.
__device__ __forceinline__ void load_chunks(const multiply_args &args, const block_place &at,
                                            int64_t first, stage &to) {
    const int thread = static_cast<int>(threadIdx.x);
    const int row_units = size_of(args.lin.salient_dtype);
    for (int s = 0; s < kChunks; s++) {
        const int64_t record = first + s, chunk = record / args.from.terms;
        const bool valid = chunk < args.from.chunks;
        const int64_t from = (record * args.from.stride + at.token) * 32;
        copy_if(valid && at.token + thread / 2 < args.from.m,
                to.tokens + (s * kTokens * 2 + thread) * 16,
                args.from.salient + from + thread * 16);
        if (thread < kPanels * 16 * row_units) {
            const int panel = thread / (16 * row_units);
            const int row = thread / row_units % 16, unit = thread % row_units;
            const int64_t channel = chunk * 16 + row;
            const int64_t at_row = (at.panel + panel) * args.lin.k_salient + channel;
            copy_if(valid && channel < args.lin.k_salient && at.panel + panel < args.shape.panels,
                    to.weights + (panel * kChunks + s) * 512 +
                        (salient_row(row) * row_units + unit) * 16,
                    static_cast<const unsigned char *>(args.lin.salient) +
                        (at_row * row_units + unit) * 16);
        }
    }
}

struct warp_place {
    int panel, token;  // the first ones of the block
};

// 8 bytes of record s of each of the lane's tokens
__device__ __forceinline__ void load_right(const warp_place &at, const stage &from, int s,
                                           fragment_b (&b)[kTiles]) {
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
        const int token = at.token + 8 * n + lane() / 4;
        const uint2 bytes = *reinterpret_cast<const uint2 *>(
            from.tokens + (s * kTokens + token) * 32 + lane_t() * 8);
        b[n] = {{bytes.x, bytes.y}};
    }
}

__device__ __forceinline__ void add_chunks(const multiply_args &args, const warp_place &at,
                                           const stage &from, pair_sums<kTiles> (&sums)[kPairs]) {
    const int row_bytes = size_of(args.lin.salient_dtype) * 16;
    for (int s = 0; s < kChunks; s++) {
        fragment_b b[kTiles];
        load_right(at, from, s, b);
#pragma unroll
        for (int p = 0; p < kPairs; p++) {
            const unsigned char *panel =
                from.weights + ((at.panel + 2 * p + lane_panel()) * kChunks + s) * 512;
            salient_words words;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const unsigned char *row = panel + salient_row(4 * lane_t() + i) * row_bytes;
                words.w[i] = salient_word(row, args.lin.salient_dtype);
            }
            add_salient(sums[p], words, b, args.lin.salient_dtype, args.from.is_f16);
        }
    }
}

__device__ __forceinline__ uint4 step_weights(const stage &from, int panel, int s) {
    return *reinterpret_cast<const uint4 *>(from.weights + (panel * kSlots + s) * 256 +
                                            weight_unit(lane_t(), lane_channel() / 4) * 16);
}

__device__ __forceinline__ void add_group(const warp_place &at, const stage &from, int s,
                                          float unit, bool is_long,
                                          pair_sums<kTiles> (&sums)[kPairs]) {
    float2 sa[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; n++)
        sa[n] = *reinterpret_cast<const float2 *>(
            &from.token_scales[s][at.token + 8 * n + 2 * lane_t()]);
#pragma unroll
    for (int p = 0; p < kPairs; p++) {
        const uint2 sw = *reinterpret_cast<const uint2 *>(
            &from.weight_scales[s][at.panel + 2 * p + lane_panel()][lane_channel()]);
        sums[p].add_group(sw, unit, sa, is_long);
    }
}

// Start of a product's sums. A direct operand if `first` is known at compile time.
__device__ __forceinline__ const int (&either(bool first, const int (&start)[4],
                                              const int (&before)[4]))[4] {
    if (first) return start;
    return before;
}

// Products of bytes.
struct by_bytes {
    static constexpr bool kHasPairs = false, kHasZeros = false;
    static constexpr float kUnit = kUnpackedUnit;

    __device__ __forceinline__ void add(const multiply_args &, const cursor &, const warp_place &at,
                                        const stage &from, int s, bool, bool starts,
                                        pair_sums<kTiles> (&sums)[kPairs]) {
        const int start[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
        fragment_b b[kTiles];
        load_right(at, from, s, b);
#pragma unroll
        for (int p = 0; p < kPairs; p++) {
            fragment_a a[2];
            unpack(step_weights(from, at.panel + 2 * p + lane_panel(), s), a);
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int n = 0; n < kTiles; n++)
                    multiply_s8(sums[p].dots[h][n], a[h], b[n],
                                either(starts, start, sums[p].dots[h][n]));
        }
    }
};

#ifdef MQ_HAS_S4
// Products of nibbles. Codes with zero-points are 0 .. 15. An extra column of the product sums the
// group's weights; at the end of the group that sum times the zero-point is subtracted.
template <mq_act_format FORMAT>
struct by_nibbles {
    static constexpr bool kHasPairs = true, kHasZeros = FORMAT == MQ_ACT_ZERO_POINT;
    static constexpr float kUnit = 1;
    static constexpr nibble_range kRight = FORMAT == MQ_ACT_SYMMETRIC ? SIGNED : UNSIGNED;
    int weight_sums[kPairs][2][4];  // offsets of the lane's dots; the same for all tokens

    // Adds slot s, where the walk is. pair: also the slot before it, of the same group. starts: the
    // group starts with them.
    __device__ __forceinline__ void add(const multiply_args &args, const cursor &walk,
                                        const warp_place &at, const stage &from, int s, bool pair,
                                        bool starts, pair_sums<kTiles> (&sums)[kPairs]) {
        const auto multiply = [&](int (&d)[4], const fragment_a &a, const fragment_b &b,
                                  int start) {
            const int starts_at[4] = {start, start, start, start};
            const int (&c)[4] = either(starts, starts_at, d);
            if (pair)
                multiply_s4<kRight>(d, a, b, c);
            else
                multiply_half_s4<kRight>(d, a, b, c);
        };
        fragment_b b[kTiles], ones;
#pragma unroll
        for (int h = 0; h < 1 + pair; h++) {
#pragma unroll
            for (int n = 0; n < kTiles; n++) {
                const int token = at.token + 8 * n + lane() / 4;
                b[n].r[h] = *reinterpret_cast<const uint32_t *>(
                    from.tokens + ((s - h) * kTokens + token) * 16 + lane_t() * 4);
            }
            if constexpr (kHasZeros) ones.r[h] = ones_of(args, walk.slot - h, walk.group);
        }
#pragma unroll
        for (int p = 0; p < kPairs; p++) {
            const int panel = at.panel + 2 * p + lane_panel();
            fragment_a a[2];
#pragma unroll
            for (int h = 0; h < 1 + pair; h++) put_nibbles(step_weights(from, panel, s - h), h, a);
#pragma unroll
            for (int h = 0; h < 2; h++) {
#pragma unroll
                for (int n = 0; n < kTiles; n++)
                    multiply(sums[p].dots[h][n], a[h], b[n], kMagicBits);
                if constexpr (kHasZeros) multiply(weight_sums[p][h], a[h], ones, 0);
            }
        }
    }

    // Runs at the end of the group of slot s.
    __device__ __forceinline__ void take_off_zeros(const warp_place &at, const stage &from, int s,
                                                   pair_sums<kTiles> (&sums)[kPairs]) const {
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
            const int2 zeros = *reinterpret_cast<const int2 *>(
                &from.token_zeros[s][at.token + 8 * n + 2 * lane_t()]);
#pragma unroll
            for (int p = 0; p < kPairs; p++)
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        sums[p].dots[h][n][e] -= weight_sums[p][h][e] * (e % 2 ? zeros.y : zeros.x);
        }
    }
};
#endif

template <typename Products>
__device__ __forceinline__ void prefill(const multiply_args &args) {
    stage *ring = reinterpret_cast<stage *>(dynamic_shared());
    const block_place block = {static_cast<int64_t>(blockIdx.x) * kTokens,
                               static_cast<int64_t>(blockIdx.y) * kPanels};
    const warp_place at = {warp() / kTokenWarps * 2 * kPairs, warp() % kTokenWarps * kWarpTokens};
    const bool is_long = is_long_group(args);
    const int64_t salient_stages = ceil_div<int64_t>(args.from.chunks * args.from.terms, kChunks);
    const int64_t stages = salient_stages + ceil_div<int64_t>(args.slot.total, kSlots);
    cursor loading(&args.slot), adding(&args.slot);

    const auto load = [&](int64_t i) {
        if (i < salient_stages)
            load_chunks(args, block, i * kChunks, ring[i % kStages]);
        else if (i < stages)
            load_slots(args, block, loading, ring[i % kStages]);
        commit_copies();  // commits empty groups at the end, to keep the count
    };
    // Makes stage i readable and starts to load the one that replaces stage i - 1.
    const auto advance = [&](int64_t i) -> const stage & {
        wait_copies<kStages - 2>();
        __syncthreads();
        load(i + kStages - 1);
        return ring[i % kStages];
    };

    pair_sums<kTiles> sums[kPairs];
#pragma unroll
    for (int p = 0; p < kPairs; p++) sums[p].clear();
    for (int i = 0; i < kStages - 1; i++) load(i);
    for (int64_t i = 0; i < salient_stages; i++) add_chunks(args, at, advance(i), sums);
    if (args.lin.salient_dtype == MQ_I8) {
#pragma unroll
        for (int p = 0; p < kPairs; p++) {
            const int64_t panel = block.panel + at.panel + 2 * p + lane_panel();
            if (panel < args.shape.panels)
                sums[p].scale_channels(*reinterpret_cast<const uint2 *>(
                    args.lin.salient_scales + panel * MQ_PANEL + lane_channel()));
        }
    }
    Products products;
    bool starts = true;  // add a group together with the next product
    for (int64_t i = salient_stages; i < stages; i++) {
        const stage &from = advance(i);
        bool pair = false;
#pragma unroll
        for (int s = 0; s < kSlots; s++, adding.next()) {
            if (!adding.is_valid()) break;
            if (s % 2 == 0) {
                pair = Products::kHasPairs && !adding.is_last();
                if (pair) continue;
            }
            // separate branches, so that the start of sums is an operand, not a move into registers
            const auto add = [&](bool in_pair, bool as_first) {
                products.add(args, adding, at, from, s, in_pair, as_first, sums);
            };
            if (pair && starts)
                add(true, true);
            else if (pair)
                add(true, false);
            else if (starts)
                add(false, true);
            else
                add(false, false);
            starts = adding.is_last();
            if (!starts) continue;
            if constexpr (Products::kHasZeros) products.take_off_zeros(at, from, s, sums);
            add_group(at, from, s, Products::kUnit, is_long, sums);
        }
    }
    wait_copies<0>();

#pragma unroll
    for (int p = 0; p < kPairs; p++)
        store_sums(args, block.token + at.token, block.panel + at.panel + 2 * p + lane_panel(),
                   sums[p]);
}

__global__ void __launch_bounds__(kThreads) prefill_s8(const __grid_constant__ multiply_args args) {
    prefill<by_bytes>(args);
}

template <mq_act_format FORMAT>
__global__ void __launch_bounds__(kThreads) prefill_s4(const __grid_constant__ multiply_args args) {
#ifdef MQ_HAS_S4
    prefill<by_nibbles<FORMAT>>(args);
#else
    (void)args, __trap();  // never launched: the kernel table excludes it
#endif
}

dim3 grid_of(const multiply_args &args) {
    return dim3(static_cast<unsigned>(ceil_div<int64_t>(args.from.m, kTokens)),
                static_cast<unsigned>(ceil_div<int64_t>(args.shape.panels, kPanels)));
}

// The number of stages is decided in device code. The host allocates what the newer architectures
// need, except for Turing.
size_t shared_of(int arch) { return (arch < 80 ? 2 : 3) * sizeof(stage); }

}  // namespace
}  // namespace mq

int mq_multiply_prefill_s8(const mq::multiply_args &args, int arch, void *stream) {
    return mq::launch(mq::prefill_s8, mq::grid_of(args), mq::shared_of(arch), stream, args);
}

int mq_multiply_prefill_s4(const mq::multiply_args &args, int arch, void *stream) {
    void (*kernel)(mq::multiply_args) = mq::prefill_s4<MQ_ACT_SYMMETRIC>;
    if (args.lin.act_format == MQ_ACT_UNSIGNED) kernel = mq::prefill_s4<MQ_ACT_UNSIGNED>;
    if (args.lin.act_format == MQ_ACT_ZERO_POINT) kernel = mq::prefill_s4<MQ_ACT_ZERO_POINT>;
    return mq::launch(kernel, mq::grid_of(args), mq::shared_of(arch), stream, args);
}
