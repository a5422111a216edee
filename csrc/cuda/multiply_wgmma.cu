// Kernel for many tokens on Hopper. A block computes 256 output channels of 64 tokens; a warp
// computes 32 of all of them. Tokens go through a ring of stages in shared memory, as in
// multiply_prefill.cu. Weights, which no two warps share, go straight into registers, one stage
// ahead. The two halves of a lane's channels are separate products: while one runs, the sums of the
// other are converted to floats.
//
// The bottleneck is the instructions besides the products (counts in docs/results.md). So addresses
// are incremented, not recomputed, and out-of-range reads are redirected instead of predicated:
// weights of missing channels meet codes of 0, and sums of missing panels are not stored.
#include "multiply.cuh"

namespace mq {
namespace {

constexpr int kTiles = kColumnTiles, kTokens = 8 * kTiles;  // per block
constexpr int kPanels = 2 * kWarps;
constexpr int kSlots = 4;  // per stage, or as many terms of chunks of salient channels
constexpr int kStages = 6;

struct stage {
    unsigned char tokens[kSlots][kTokens][2][16];  // units of a row are swizzled
    float token_scales[kTokens];                   // of the stage's group
};
static_assert(sizeof(stage) % 256 == 0, "products want rows at a multiple of 256 bytes");
static_assert(kSlots == kLeftSides, "a stage's left sides are fenced together");

#ifdef MQ_HAS_WGMMA

constexpr int kAhead = kStages - 2;  // stages in flight; products of two more may be running

// Fills the ring in order: the records of the salient channels, then the codes.
struct loader {
    static constexpr int kUnits = kTokens * 2;           // of a slot, 16 bytes each
    static constexpr int kTogether = kThreads / kUnits;  // slots that the block copies at once
    static constexpr int kCopies = kSlots / kTogether;   // per thread and stage
    static constexpr int kScaleThreads = kTokens / 4;

    const unsigned char *from;  // the thread's unit of its next record
    const float *scales;        // the thread's scales of the next stage's group
    int64_t slot_bytes, scale_stride;
    unsigned char *ring;
    int bytes, scale_bytes;  // valid bytes of a unit, and of a thread's scales
    int record, end;         // the thread's next record, and the end
    int in_group, group_stages;
    int at, place;  // the stage to fill, and the thread's unit in it

    __device__ __forceinline__ loader(const multiply_args &args, int64_t token, int group_stages_)
        : ring(dynamic_shared()), in_group(0), group_stages(group_stages_), at(0) {
        const int thread = static_cast<int>(threadIdx.x);
        const int row = thread / 2 % kTokens, unit = thread % 2;
        place = (thread / kUnits * kTokens + row) * 32 + swizzled(row, unit) * 16;
        slot_bytes = args.from.stride * 32;
        bytes = token + row < args.from.m ? 16 : 0;
        const int64_t left = args.from.m - token - thread * 4;
        scale_bytes = left >= 4 ? 16 : left > 0 ? static_cast<int>(left) * 4 : 0;
        scale_stride = args.from.stride;
        scales = args.from.scales + token + thread * 4;
    }

    // Continues with records [records][stride][32 bytes].
    __device__ __forceinline__ void begin(const unsigned char *records, int64_t token, int count) {
        const int thread = static_cast<int>(threadIdx.x);
        record = thread / kUnits, end = count;
        from =
            records + record * slot_bytes + (token + thread / 2 % kTokens) * 32 + thread % 2 * 16;
    }

    __device__ __forceinline__ void load(bool is_code) {
        if (record - static_cast<int>(threadIdx.x) / kUnits < end) {
            unsigned char *to = ring + at * static_cast<int>(sizeof(stage));
#pragma unroll
            for (int i = 0; i < kCopies; i++) {
                copy_async(to + place + i * kTogether * kUnits * 16, from,
                           record < end ? bytes : 0);
                from += kTogether * slot_bytes, record += kTogether;
            }
            if (is_code) {
                if (threadIdx.x < kScaleThreads)
                    copy_async(to + offsetof(stage, token_scales) + threadIdx.x * 16, scales,
                               scale_bytes);
                if (++in_group == group_stages) in_group = 0, scales += scale_stride;
            }
        }
        commit_copies();  // commits empty groups at the end, to keep the count
        at = at + 1 == kStages ? 0 : at + 1;
    }
};

struct worker {
    const multiply_args &args;
    int64_t panel;                 // the lane's
    const unsigned char *weights;  // the lane's, of the next stage
    const uint16_t *scales;        // of group 0
    int blocks_left, last_group;
    pair_sums<kTiles> sums;
    fragment_a left[2][kSlots];

    __device__ __forceinline__ explicit worker(const multiply_args &args_)
        : args(args_),
          panel(static_cast<int64_t>(blockIdx.y) * kPanels + warp() * 2 + lane_panel()),
          left{} {
        const int64_t own = smaller(panel, args.shape.panels - 1);
        weights = args.lin.qweight + (own * args.shape.blocks + lane_t()) * MQ_BLOCK_BYTES +
                  lane_channel() * 4;
        scales = args.lin.scales + own * args.shape.groups * MQ_PANEL + lane_channel();
        blocks_left = static_cast<int>(args.shape.blocks) - lane_t();
        last_group = static_cast<int>(args.shape.groups) - 1;
    }

    // ---- Salient channels, a stage of records ----

    struct salient {
        salient_words words[kSlots];
    };

    __device__ __forceinline__ salient load_records(int first) const {
        salient to;
#pragma unroll
        for (int s = 0; s < kSlots; s++)
            to.words[s] = load_salient<AS_IN_ROWS>(args, panel, first + s);
        return to;
    }

    template <bool IS_F16>
    __device__ __forceinline__ void multiply_records(const stage &from) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            fence_products(sums.y[h], left[h]);
#pragma unroll
            for (int s = 0; s < kSlots; s++)
                multiply_later<IS_F16>(sums.y[h], left[h][s], from.tokens[s]);
            commit_products();
        }
#pragma unroll
        for (int h = 0; h < 2; h++) wait_products<0>(sums.y[h], left[h]);
    }

    __device__ __forceinline__ void add_records(const salient &of, const stage &from) {
        fragment_a rest[2][kSlots];
        const mq_dtype stored = args.lin.salient_dtype;
        const bool in_two = stored == MQ_F16 && !args.from.is_f16;
#pragma unroll
        for (int s = 0; s < kSlots; s++) {
            fragment_a a[2];
            salient_left(of.words[s], stored, args.from.is_f16, a);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                if (in_two) split_halves(a[h], rest[h][s]);
                left[h][s] = a[h];
            }
        }
        __syncwarp();
        if (args.from.is_f16) {
            multiply_records<true>(from);
            return;
        }
        multiply_records<false>(from);
        if (!in_two) return;
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int s = 0; s < kSlots; s++) left[h][s] = rest[h][s];
        __syncwarp();
        multiply_records<false>(from);
    }

    // ---- INT4 channels ----

    struct stage_weights {
        uint4 words[kSlots];
        uint2 scales;
    };

    // Loads the next stage's weights. Missing ones keep their previous values.
    __device__ __forceinline__ void load_weights(int group, stage_weights &to) {
#pragma unroll
        for (int s = 0; s < kSlots; s++)
            if (s * 4 < blocks_left) to.words[s] = load_once(weights + s * 4 * MQ_BLOCK_BYTES);
        weights += kSlots * 4 * MQ_BLOCK_BYTES, blocks_left -= kSlots * 4;
        to.scales = *reinterpret_cast<const uint2 *>(scales + int64_t{smaller(group, last_group)} *
                                                                  MQ_PANEL);
    }

    __device__ __forceinline__ void put(const stage_weights &of, int h) {
#pragma unroll
        for (int s = 0; s < kSlots; s++) {
            fragment_a &a = left[h][s];
            unpack(h ? of.words[s].z : of.words[s].x, a.r[0], a.r[2]);
            unpack(h ? of.words[s].w : of.words[s].y, a.r[1], a.r[3]);
        }
    }

    __device__ __forceinline__ void multiply(int h, const stage &from, bool starts) {
        __syncwarp();
        fence_products(sums.dots[h], left[h]);
#pragma unroll
        for (int s = 0; s < kSlots; s++)
            multiply_later(sums.dots[h], left[h][s], from.tokens[s], s > 0 || !starts);
        commit_products();
    }

    __device__ __forceinline__ void add_half(int h, uint32_t sw, const stage &from) {
        float2 sa[kTiles];
#pragma unroll
        for (int n = 0; n < kTiles; n++)
            sa[n] = *reinterpret_cast<const float2 *>(&from.token_scales[8 * n + 2 * lane_t()]);
        sums.add_plain_half(h, sw, kUnpackedUnit, sa);
    }
};

__device__ __forceinline__ void prefill(const multiply_args &args) {
    const stage *ring = reinterpret_cast<const stage *>(dynamic_shared());
    const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens;
    worker work(args);
    const int records = static_cast<int>(args.from.chunks) * args.from.terms;
    const int slots = static_cast<int>(args.slot.total);
    const int salient_stages = ceil_div(records, kSlots), code_stages = ceil_div(slots, kSlots);
    // a group is whole stages, or the only group
    const int group_stages = args.shape.groups == 1
                                 ? code_stages
                                 : static_cast<int>(args.shape.group_quads) / (8 * kSlots);
    worker::stage_weights words{};
    worker::salient next_records{};
    if (code_stages) work.load_weights(0, words);
    if (salient_stages) next_records = work.load_records(0);
    wait_for_previous();

    loader loads(args, token, group_stages);
    loads.begin(args.from.salient, token, records);
    int loaded = 0;  // stages
    const auto load = [&] {
        if (loaded == salient_stages) loads.begin(args.from.codes, token, slots);
        loads.load(loaded >= salient_stages);
        loaded++;
    };
    int at = 0;  // of the ring
    // Makes the next stage readable and starts to load the one that replaces the stage before the
    // last.
    const auto advance = [&]() -> const stage & {
        wait_copies<kAhead - 1>();
        fence_for_products();
        __syncthreads();
        load();
        const stage &now = ring[at];
        at = at + 1 == kStages ? 0 : at + 1;
        return now;
    };
    for (int i = 0; i < kAhead; i++) load();

    work.sums.clear();
    for (int i = 0; i < salient_stages; i++) {
        const stage &from = advance();
        const worker::salient now = next_records;
        next_records = work.load_records((i + 1) * kSlots);
        work.add_records(now, from);
    }
    if (args.lin.salient_dtype == MQ_I8 && work.panel < args.shape.panels)
        work.sums.scale_channels(*reinterpret_cast<const uint2 *>(
            args.lin.salient_scales + work.panel * MQ_PANEL + lane_channel()));

    fill(work.sums.dots[1], 0);
    const stage *before = ring;
    uint32_t before_scales = 0;
    bool ended = false;  // whether the group ended with the stage before
    for (int i = 0, in_group = 0, group = 0; i < code_stages; i++) {
        const stage &from = advance();
        const bool starts = in_group == 0;
        const bool ends = ++in_group == group_stages || i + 1 == code_stages;
        if (ends) in_group = 0, group++;
        const uint2 scales = words.scales;
        work.put(words, 0);
        // ptxas does not track products across iterations and would add a wait here
        wait_products<0>(work.sums.dots[1], work.left[1]);
        work.multiply(0, from, starts);
        if (ended) work.add_half(1, before_scales, *before);
        work.put(words, 1);
        work.load_weights(group, words);  // in place: copies would cost more than the wait
        work.multiply(1, from, starts);
        wait_products<1>(work.sums.dots[0], work.left[0]);
        if (ends) work.add_half(0, scales.x, from);
        before = &from, before_scales = scales.y, ended = ends;
    }
    wait_copies<0>();
    wait_products<0>(work.sums.dots[1], work.left[1]);
    if (ended) work.add_half(1, before_scales, *before);
    store_sums(args, token, work.panel, work.sums);
}
#endif

__global__ void __launch_bounds__(kThreads, 1)
    prefill_wgmma(const __grid_constant__ multiply_args args) {
#ifdef MQ_HAS_WGMMA
    prefill(args);
#else
    (void)args, __trap();  // never launched: the kernel table excludes it
#endif
}

}  // namespace
}  // namespace mq

int mq_multiply_prefill_wgmma(const mq::multiply_args &args, int arch, void *stream) {
    using namespace mq;
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(args.from.m, kTokens)),
                    static_cast<unsigned>(ceil_div<int64_t>(args.shape.panels, kPanels)));
    return launch_behind(arch, prefill_wgmma, grid, kStages * sizeof(stage), stream, args);
}
