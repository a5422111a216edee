// Many tokens on Hopper: a block computes 256 output channels of 64 tokens, a warp 32 of all of
// them. Tokens come through a ring of stages in shared memory, as in multiply_prefill.cu; weights,
// which no two warps share, straight into registers, a stage ahead. The two halves of a lane's
// channels are products of their own: while one is under way, the sums of the other become floats.
#include "multiply.cuh"

namespace mq {
namespace {

constexpr int kTiles = kColumnTiles, kTokens = 8 * kTiles;  // of a block
constexpr int kPanels = 2 * kWarps;
constexpr int kSlots = 4;  // of a stage, or so many terms of chunks of salient channels
constexpr int kStages = 6;

struct stage {
    unsigned char tokens[kSlots][kTokens][2][16];  // units of a row are swizzled
    float token_scales[kTokens];                   // of the stage's group
};
static_assert(sizeof(stage) % 256 == 0, "products want rows at a multiple of 256 bytes");

#ifdef MQ_HAS_WGMMA

constexpr int kAhead = kStages - 2;  // stages asked for; products of two may be under way

struct worker {
    const multiply_args &args;
    int64_t token, panel;  // the block's first token; the lane's panel
    bool in_n;             // whether the panel exists
    pair_sums<kTiles> sums;

    __device__ __forceinline__ explicit worker(const multiply_args &args_)
        : args(args_),
          token(static_cast<int64_t>(blockIdx.x) * kTokens),
          panel(static_cast<int64_t>(blockIdx.y) * kPanels + warp() * 2 + lane_panel()),
          in_n(panel < args_.shape.panels) {}

    // ---- Tokens, to shared memory ----

    // Records first .. of [records][stride][32 bytes]; zeros from `end` on
    __device__ __forceinline__ void load_records(const unsigned char *records, int first, int end,
                                                 stage &to) const {
#pragma unroll
        for (int i = 0; i < kSlots * kTokens * 2 / kThreads; i++) {
            const int job = i * kThreads + static_cast<int>(threadIdx.x);
            const int s = job / (2 * kTokens), row = job / 2 % kTokens, unit = job % 2;
            const bool valid = first + s < end && token + row < args.from.m;
            copy_async(to.tokens[s][row][swizzled(row, unit)],
                       records + ((first + s) * args.from.stride + token + row) * 32 + unit * 16,
                       valid ? 16 : 0);
        }
    }

    // ---- Salient channels, as in multiply_prefill.cu ----

    __device__ __forceinline__ void add_record(const salient_words &words, const stage &from,
                                               int s) {
        fragment_b b[kTiles];
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
            const int row = 8 * n + lane() / 4;
            const unsigned char *unit = from.tokens[s][row][swizzled(row, lane_t() / 2)];
            const uint2 bytes = *reinterpret_cast<const uint2 *>(unit + lane_t() % 2 * 8);
            b[n] = {{bytes.x, bytes.y}};
        }
        add_salient(sums, words, b, args.lin.salient_dtype, args.from.is_f16);
    }

    // ---- INT4 channels ----

    struct weights {
        uint4 words[kSlots];
        uint2 scales;
    };

    __device__ __forceinline__ weights load_weights(int i, int group) const {
        weights to;
#pragma unroll
        for (int s = 0; s < kSlots; s++) {
            const int block = (i * kSlots + s) * 4 + lane_t();
            to.words[s] = {0, 0, 0, 0};
            if (in_n && block < args.shape.blocks)
                to.words[s] = load_once(args.lin.qweight +
                                        (panel * args.shape.blocks + block) * MQ_BLOCK_BYTES +
                                        lane_channel() * 4);
        }
        to.scales = {0, 0};
        if (in_n && group < args.shape.groups)
            to.scales = *reinterpret_cast<const uint2 *>(
                args.lin.scales + (panel * args.shape.groups + group) * MQ_PANEL + lane_channel());
        return to;
    }

    __device__ __forceinline__ void add_half(int h, uint32_t sw, const stage &from, bool is_long) {
        float2 sa[kTiles];
#pragma unroll
        for (int n = 0; n < kTiles; n++)
            sa[n] = *reinterpret_cast<const float2 *>(&from.token_scales[8 * n + 2 * lane_t()]);
        sums.add_half(h, sw, kUnpackedUnit, sa, is_long);
    }
};

__device__ __forceinline__ void prefill(const multiply_args &args) {
    stage *ring = reinterpret_cast<stage *>(dynamic_shared());
    worker work(args);
    const bool is_long = args.shape.group_quads > kMagicQuads;
    const int records = static_cast<int>(args.from.chunks) * args.from.terms;
    const int slots = static_cast<int>(args.slot.total);
    const int salient_stages = ceil_div(records, kSlots), code_stages = ceil_div(slots, kSlots);
    // a group is whole stages, or the only one
    const int group_stages = args.shape.groups == 1
                                 ? code_stages
                                 : static_cast<int>(args.shape.group_quads) / (8 * kSlots);
    const auto load = [&](int i) {
        if (i < salient_stages) {
            work.load_records(args.from.salient, i * kSlots, records, ring[i % kStages]);
        } else if (i - salient_stages < code_stages) {
            const int at = i - salient_stages;
            work.load_records(args.from.codes, at * kSlots, slots, ring[i % kStages]);
            const int first = static_cast<int>(threadIdx.x) * 4;
            if (first < kTokens)
                copy_by_token(args, args.from.scales, at / group_stages, work.token + first,
                              &ring[i % kStages].token_scales[first]);
        }
        commit_copies();  // of nothing at the end, so that the count stays
    };
    // Makes stage i readable, and asks for the one that takes the place of stage i - 2.
    const auto advance = [&](int i) -> const stage & {
        wait_copies<kAhead - 1>();
        fence_for_products();
        __syncthreads();
        load(i + kAhead);
        return ring[i % kStages];
    };

    for (int i = 0; i < kAhead; i++) load(i);
    work.sums.clear();
    salient_words next_words[kSlots];
#pragma unroll
    for (int s = 0; s < kSlots; s++) next_words[s] = load_salient(args, work.panel, s);
    for (int i = 0; i < salient_stages; i++) {
        const stage &from = advance(i);
#pragma unroll
        for (int s = 0; s < kSlots; s++) {
            const salient_words words = next_words[s];
            next_words[s] = load_salient(args, work.panel, (i + 1) * kSlots + s);
            work.add_record(words, from, s);
        }
    }
    if (args.lin.salient_dtype == MQ_I8 && work.in_n)
        work.sums.scale_channels(*reinterpret_cast<const uint2 *>(
            args.lin.salient_scales + work.panel * MQ_PANEL + lane_channel()));

    fragment_a left[2][kSlots] = {};
    work.sums.start_group();
    worker::weights next = work.load_weights(0, 0);
    const stage *before = ring;
    uint32_t before_scales = 0;
    bool ended = false;  // the group, with the stage before
    for (int i = 0, in_group = 0, group = 0; i < code_stages; i++) {
        const stage &from = advance(salient_stages + i);
        const worker::weights now = next;
        const bool starts = in_group == 0;
        const bool ends = ++in_group == group_stages || i + 1 == code_stages;
        if (ends) in_group = 0, group++;
        next = work.load_weights(i + 1, group);
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int s = 0; s < kSlots; s++) {
                fragment_a &a = left[h][s];
                unpack(h ? now.words[s].z : now.words[s].x, a.r[0], a.r[2]);
                unpack(h ? now.words[s].w : now.words[s].y, a.r[1], a.r[3]);
            }
            // ptxas does not follow products around a loop: without this wait it adds one
            if (h == 0) wait_products<0>(work.sums.dots[1], left[1]);
            if (starts) work.sums.start_half(h);
            __syncwarp();
            fence_products(work.sums.dots[h], left[h]);
#pragma unroll
            for (int s = 0; s < kSlots; s++)
                multiply_later(work.sums.dots[h], left[h][s], from.tokens[s]);
            commit_products();
            if (h == 0) {
                if (ended) work.add_half(1, before_scales, *before, is_long);
            } else {
                wait_products<1>(work.sums.dots[0], left[0]);
                if (ends) work.add_half(0, now.scales.x, from, is_long);
            }
        }
        before = &from, before_scales = now.scales.y, ended = ends;
    }
    wait_copies<0>();
    wait_products<0>(work.sums.dots[1], left[1]);
    if (ended) work.add_half(1, before_scales, *before, is_long);
    store_sums(args, work.token, work.panel, work.sums);
}
#endif

__global__ void __launch_bounds__(kThreads, 1)
    prefill_wgmma(const __grid_constant__ multiply_args args) {
#ifdef MQ_HAS_WGMMA
    prefill(args);
#else
    (void)args, __trap();  // never launched: the table of kernels knows
#endif
}

}  // namespace
}  // namespace mq

int mq_multiply_prefill_wgmma(const mq::multiply_args &args, int, void *stream) {
    using namespace mq;
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(args.from.m, kTokens)),
                    static_cast<unsigned>(ceil_div<int64_t>(args.shape.panels, kPanels)));
    return launch(prefill_wgmma, grid, kStages * sizeof(stage), stream, args);
}
