// Kernels for few tokens. A block computes 32 output channels of 8, 16 or 32 tokens. Its warps
// split the input channels and load weights straight into registers, many at a time, since loading
// is the bottleneck. Their sums are added in the order of the warps.
//
// Products are of bytes even where tensor cores multiply nibbles. Weights are nibbles in memory
// anyway; unpacking 512 bytes takes 12 of the more than 60 instructions of a step. Nibbles would
// save those, half of the products, and half of the tokens' bytes (which come from L2), but need
// two more kernels per size, for zero-points and unsigned codes.
#include "multiply.cuh"

namespace mq {
namespace {

// Returns the group of a slot.
__device__ __forceinline__ int64_t group_of(const slots &of, int64_t slot) {
    const int64_t period = int64_t{1} << of.period;  // of groups, and the slots of so many:
    const int64_t slots_in_period = of.group_quads * period / 8 + period - 1;
    int64_t group = smaller(slot * period / slots_in_period, of.groups - 1);
    while (group > 0 && of.first(group) > slot) group--;
    while (group + 1 < of.groups && of.first(group + 1) <= slot) group++;
    return group;
}

template <int NT>
struct worker {
    const multiply_args &args;
    int64_t token, panel;  // the block's first token; the lane's panel
    bool in_n;             // whether the panel exists
    pair_sums<NT> sums;

    __device__ __forceinline__ explicit worker(const multiply_args &args_)
        : args(args_),
          token(static_cast<int64_t>(blockIdx.x) * NT * 8),
          panel(static_cast<int64_t>(blockIdx.y) * 2 + lane_panel()),
          in_n(panel < args_.shape.panels) {}

    // 8 bytes of a record of each of the lane's tokens
    __device__ __forceinline__ void load_right(const unsigned char *records, int64_t record,
                                               bool valid, fragment_b (&b)[NT]) const {
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const int64_t at = token + 8 * n + lane() / 4;
            uint2 bytes = {0, 0};
            if (valid && at < args.from.m)
                bytes = *reinterpret_cast<const uint2 *>(
                    records + (record * args.from.stride + at) * 32 + lane_t() * 8);
            b[n] = {{bytes.x, bytes.y}};
        }
    }

    // Adds terms begin .. end of chunks. words: those load_salient returned for the first one.
    __device__ __forceinline__ void add_chunks(int begin, int end, salient_words words) {
        fragment_b b[NT];
        for (int record = begin; record < end; record++) {
            const salient_words now = words;
            if (record + 1 < end) words = load_salient(args, panel, record + 1);
            load_right(args.from.salient, record, true, b);
            add_salient(sums, now, b, args.lin.salient_dtype, args.from.is_f16);
        }
        if (args.lin.salient_dtype == MQ_I8 && in_n)
            sums.scale_channels(*reinterpret_cast<const uint2 *>(
                args.lin.salient_scales + panel * MQ_PANEL + lane_channel()));
    }

    struct group_scales {
        uint2 sw;
        float2 sa[NT];
    };

    __device__ __forceinline__ void load_scales(int64_t group, group_scales &to) const {
        to.sw = {0, 0};
        if (in_n && group < args.shape.groups)
            to.sw = *reinterpret_cast<const uint2 *>(
                args.lin.scales + (panel * args.shape.groups + group) * MQ_PANEL + lane_channel());
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const int64_t at = token + 8 * n + 2 * lane_t();
            to.sa[n] = {0, 0};
            if (group >= args.shape.groups || at >= args.from.m) continue;
            const float *scales = args.from.scales + group * args.from.stride + at;
            to.sa[n].x = scales[0];
            if (at + 1 < args.from.m) to.sa[n].y = scales[1];
        }
    }

    // Adds slots begin .. end. A group that other warps share contributes only the part here.
    __device__ __forceinline__ void add_slots(int64_t begin, int64_t end) {
        // 512 bytes per warp each; with 8, ptxas spills registers on sm_120 if a warp has few
        // tokens
        constexpr int kAhead = NT > 2 ? 4 : NT == 1 && MQ_ARCH >= 120 ? 6 : 8;
        if (begin >= end) return;
        const slots &slot = args.slot;
        const bool is_long = is_long_group(args);
        const unsigned char *weights =
            args.lin.qweight + panel * args.shape.blocks * MQ_BLOCK_BYTES + lane_channel() * 4;
        int64_t asked = group_of(slot, begin), group = asked;
        int64_t asked_end = slot.end(asked), group_end = asked_end;
        group_scales scales, next_scales;  // scales are loaded one group ahead
        load_scales(group, scales);
        load_scales(group + 1, next_scales);
        sums.start_group();
        for (int64_t first = begin; first < end; first += kAhead) {
            uint4 words[kAhead];
            fragment_b b[kAhead][NT];
#pragma unroll
            for (int i = 0; i < kAhead; i++) {
                const int64_t s = first + i;
                if (s == asked_end && s < end) asked_end = slot.end(++asked);
                const int64_t block = slot.step(s, asked) * 4 + lane_t();
                words[i] = {0, 0, 0, 0};
                if (in_n && s < end && block < args.shape.blocks)
                    words[i] = load_once(weights + block * MQ_BLOCK_BYTES);
                load_right(args.from.codes, s, s < end, b[i]);
            }
#pragma unroll
            for (int i = 0; i < kAhead; i++) {
                const int64_t s = first + i;
                if (s >= end) break;
                fragment_a a[2];
                unpack(words[i], a);
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                    for (int n = 0; n < NT; n++)
                        multiply_s8(sums.dots[h][n], a[h], b[i][n], sums.dots[h][n]);
                if (s + 1 < group_end && s + 1 < end) continue;
                sums.add_group(scales.sw, kUnpackedUnit, scales.sa, is_long);
                sums.start_group();
                if (s + 1 == end) break;
                group_end = slot.end(++group);
                scales = next_scales;
                load_scales(group + 1, next_scales);
            }
        }
    }
};

// The same sums where every slot is a step, with fewer instructions, which are the bottleneck
// otherwise.
template <int NT>
struct step_worker {
    // Steps loaded together; twice as many are in flight. With more, ptxas spills registers for few
    // tokens.
    static constexpr int kAhead = NT == 1 && MQ_ARCH >= 80 ? 5 : 4;

    const multiply_args &args;
    const unsigned char *weights, *codes;  // the lane's weights of step 0
    const float *scales;
    const uint16_t *weight_scales;
    int64_t code_stride, scale_stride;
    int at[NT], at_scale[NT][2];  // its tokens; those past the last repeat it
    int last_block, group_steps;

    struct steps {
        uint4 words[kAhead];
        fragment_b b[kAhead][NT];
    };
    struct group_scales {
        uint2 sw;
        float2 sa[NT];
    };

    __device__ __forceinline__ step_worker(const multiply_args &args_, int64_t token, int64_t panel)
        : args(args_) {
        // a missing panel is replaced by another one, whose sums are not stored
        const int64_t own = smaller(panel, args.shape.panels - 1);
        weights = args.lin.qweight + own * args.shape.blocks * MQ_BLOCK_BYTES + lane_channel() * 4;
        weight_scales = args.lin.scales + own * args.shape.groups * MQ_PANEL + lane_channel();
        codes = args.from.codes + lane_t() * 8;
        scales = args.from.scales;
        code_stride = args.from.stride * 32, scale_stride = args.from.stride;
        last_block = static_cast<int>(args.shape.blocks) - 1;
        group_steps = static_cast<int>(args.shape.group_quads / 8);
        const int64_t last = args.from.m - 1;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            at[n] = static_cast<int>(smaller(token + 8 * n + lane() / 4, last));
#pragma unroll
            for (int j = 0; j < 2; j++)
                at_scale[n][j] = static_cast<int>(smaller(token + 8 * n + 2 * lane_t() + j, last));
        }
    }

    // Loads steps first .. end, at most kAhead.
    __device__ __forceinline__ void load_weights(int first, int end, steps &to) const {
#pragma unroll
        for (int i = 0; i < kAhead; i++)
            if (first + i < end)
                to.words[i] =
                    load_once(weights + int64_t{smaller((first + i) * 4 + lane_t(), last_block)} *
                                            MQ_BLOCK_BYTES);
    }
    __device__ __forceinline__ void load_codes(int first, int end, steps &to) const {
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            if (first + i >= end) break;
            const unsigned char *record = codes + (first + i) * code_stride;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const uint2 bytes = *reinterpret_cast<const uint2 *>(record + int64_t{at[n]} * 32);
                to.b[i][n] = {{bytes.x, bytes.y}};
            }
        }
    }
    __device__ __forceinline__ void load_scales(int group, group_scales &to) const {
        if (group >= args.shape.groups) return;
        to.sw = *reinterpret_cast<const uint2 *>(weight_scales + group * MQ_PANEL);
        const float *of_group = scales + group * scale_stride;
#pragma unroll
        for (int n = 0; n < NT; n++)
            to.sa[n] = {of_group[at_scale[n][0]], of_group[at_scale[n][1]]};
    }

    // Adds steps begin .. end. A group that other warps share contributes only the part here.
    // first, second: the first steps, already loaded. now, next: the scales of this group and of
    // the next one; scales are loaded one group ahead.
    __device__ __forceinline__ void add(int begin, int end, steps &first, steps &second,
                                        group_scales &now, group_scales &next,
                                        pair_sums<NT> &sums) const {
        if (begin >= end) return;
        int group = begin / group_steps, left = group_steps - begin % group_steps;
        clear(sums);
        const auto multiply = [&](int from, const steps &with) {
#pragma unroll
            for (int i = 0; i < kAhead; i++) {
                if (from + i >= end) break;
                fragment_a a[2];
                unpack(with.words[i], a);
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                    for (int n = 0; n < NT; n++)
                        multiply_s8(sums.dots[h][n], a[h], with.b[i][n], sums.dots[h][n]);
                if (--left && from + i + 1 < end) continue;
                sums.add_plain_half(0, now.sw.x, kUnpackedUnit, now.sa);
                sums.add_plain_half(1, now.sw.y, kUnpackedUnit, now.sa);
                clear(sums);
                left = group_steps;
                now = next;
                load_scales(++group + 1, next);
            }
        };
        for (int at_step = begin; at_step < end; at_step += 2 * kAhead) {
            multiply(at_step, first);
            load_weights(at_step + 2 * kAhead, end, first);
            load_codes(at_step + 2 * kAhead, end, first);
            multiply(at_step + kAhead, second);
            load_weights(at_step + 3 * kAhead, end, second);
            load_codes(at_step + 3 * kAhead, end, second);
        }
    }

   private:
    static __device__ __forceinline__ void clear(pair_sums<NT> &sums) {
        fill(sums.dots[0], 0), fill(sums.dots[1], 0);
    }
};

template <int NT, bool WHOLE>
__global__ void __launch_bounds__(kThreads, NT == 1 && WHOLE ? 2 : 1)
    decode(const __grid_constant__ multiply_args args) {
    // [warp][token][4 channels], padded by one unit so that lanes use different banks
    __shared__ float4 parts[kWarps][NT * 8][2 * MQ_PANEL / 4 + 1];
    worker<NT> work(args);
    work.sums.clear();
    const int64_t records = args.from.chunks * args.from.terms, slots = args.slot.total;
    const int first_record = static_cast<int>(records * warp() / kWarps);
    const int last_record = static_cast<int>(records * (warp() + 1) / kWarps);
    // load weights before waiting for the tokens
    salient_words words{};
    if (first_record < last_record) words = load_salient(args, work.panel, first_record);
    if constexpr (WHOLE) {
        const step_worker<NT> steps(args, work.token, work.panel);
        const int begin = static_cast<int>(slots * warp() / kWarps);
        const int end = static_cast<int>(slots * (warp() + 1) / kWarps);
        typename step_worker<NT>::steps first, second;
        steps.load_weights(begin, end, first);
        steps.load_weights(begin + steps.kAhead, end, second);
        wait_for_previous();
        steps.load_codes(begin, end, first);
        steps.load_codes(begin + steps.kAhead, end, second);
        typename step_worker<NT>::group_scales now, next;
        steps.load_scales(begin / steps.group_steps, now);
        steps.load_scales(begin / steps.group_steps + 1, next);
        work.add_chunks(first_record, last_record, words);
        steps.add(begin, end, first, second, now, next, work.sums);
    } else {
        wait_for_previous();
        work.add_chunks(first_record, last_record, words);
        work.add_slots(slots * warp() / kWarps, slots * (warp() + 1) / kWarps);
    }
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 2; j++)
            parts[warp()][8 * n + 2 * lane_t() + j][lane() / 4] = {
                work.sums.y[0][n][j], work.sums.y[0][n][2 + j], work.sums.y[1][n][j],
                work.sums.y[1][n][2 + j]};
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < NT * 8 * 8; i += kThreads) {
        float y[4] = {0, 0, 0, 0};
        for (int w = 0; w < kWarps; w++) {
            const float4 part = parts[w][i / 8][i % 8];
            y[0] += part.x, y[1] += part.y, y[2] += part.z, y[3] += part.w;
        }
        const int64_t token = work.token + i / 8;
        const int64_t first = static_cast<int64_t>(blockIdx.y) * 2 * MQ_PANEL + i % 8 * 4;
        if (token < args.from.m && first < args.lin.n)
            store_channels(args, token, first, load_bias(args, first), y);
    }
}

template <int NT>
int run(const multiply_args &args, int arch, void *stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(args.from.m, NT * 8)),
                    static_cast<unsigned>(ceil_div<int64_t>(args.shape.panels, 2)));
    const auto kernel =
        args.slot.whole() && args.shape.groups ? decode<NT, true> : decode<NT, false>;
    return launch_behind(arch, kernel, grid, 0, stream, args);
}

}  // namespace
}  // namespace mq

int mq_multiply_decode_8(const mq::multiply_args &args, int arch, void *stream) {
    return mq::run<1>(args, arch, stream);
}

int mq_multiply_decode_16(const mq::multiply_args &args, int arch, void *stream) {
    return mq::run<2>(args, arch, stream);
}

int mq_multiply_decode_32(const mq::multiply_args &args, int arch, void *stream) {
    return mq::run<4>(args, arch, stream);
}
