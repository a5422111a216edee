#include "emulator.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

schedule order = FORWARD;
place here;
unsigned char *shared_bytes;

namespace {

constexpr int kOrdinaryShared = 47 << 10;  // leaves 1 KiB to static shared memory
int allowed_shared = kOrdinaryShared;      // at the next launch

constexpr size_t kStack = 64 << 10;

struct copy {
    void *to;
    const void *from;
    size_t bytes, zeros;
};

constexpr unsigned kRows = 64, kRowBytes = 32;  // of a product's matrix in shared memory

struct product {
    void *d;
    const unsigned *a;
    uint64_t descriptor;
    bool adds, is_float;
    unsigned char before[32 * 4],
        sums[32 * 4];  // the initial d; what is added, or replaces it
    unsigned left[4];  // the initial a
    std::vector<unsigned char> right;
};

// The state of a suspended thread of control, for __builtin_longjmp.
struct place_in_code {
    void *at[5];
};

struct fiber {
    ucontext_t entry;
    place_in_code left;
    bool entered = false;
    void *stack = nullptr;
    dim3 thread;
    bool done = false;
    const int64_t *counter = nullptr;  // waits until *counter >= target
    int64_t target = 0;
    int64_t exchanges = 0, barriers = 0;
    std::vector<std::vector<copy>> copies{1};  // committed groups, then the open one
    std::vector<std::vector<product>> products{1};
    int unseen = 0;  // completed copies that are not yet visible to products
    // the fence since the last commit, if any, and the registers it saw
    const void *fenced_d = nullptr;
    const unsigned *fenced_a = nullptr;
    unsigned char fenced_sums[32 * 4];
    unsigned fenced_left[16];
    size_t asked = 0;  // index in its warpgroup's requests
};

struct warp {
    int64_t arrived[2] = {0, 0};
    alignas(16) unsigned char values[2][32 * 64];
    size_t sizes[2];
};

std::vector<std::unique_ptr<fiber>> fibers;
std::vector<warp> warps;

// A thread's request to the tensor cores: the products' descriptor, or one of these.
enum : uint64_t { FENCE, COMMIT, WAIT };
std::vector<std::vector<uint64_t>> asked;  // [warpgroup], from the first of its threads to arrive
int64_t block_arrived;
int64_t unseen;  // copies of all threads together, see fiber
int64_t any_set[2];
fiber *running;
bool waited;  // a thread of the block, for the previous kernel
unsigned char *hidden_at;
std::vector<unsigned char> hidden;  // what the previous kernel wrote there
place_in_code main_left;
const std::function<void()> *kernel;

}  // namespace

[[noreturn]] void fail(const char *what) {
    fprintf(stderr, "emulator: %s in block %u,%u thread %u\n", what, here.block.x, here.block.y,
            here.thread.x);
    abort();
}

namespace {

#if defined(__SANITIZE_ADDRESS__)
const void *main_bottom;
size_t main_size;
#endif

// Resumes a fiber, or main if `to` is null. (swapcontext would make a system call for the signal
// mask each time, and no code here changes the mask.)
[[noreturn]] __attribute__((noinline, no_sanitize("address"))) void go_on(fiber *to) {
    if (!to) __builtin_longjmp(main_left.at, 1);
    if (to->entered) __builtin_longjmp(to->left.at, 1);
    to->entered = true;
    setcontext(&to->entry);
    fail("no context,");
}

// Suspends the running thread of control and resumes a fiber, or main if `to` is null.
__attribute__((noinline, no_sanitize("address"))) void change_to(place_in_code *from, fiber *to) {
    running = to;
    if (to) here.thread = to->thread;
#if defined(__SANITIZE_ADDRESS__)
    void *fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, to ? to->stack : main_bottom, to ? kStack : main_size);
#endif
    if (!__builtin_setjmp(from->at)) go_on(to);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

bool can_run(const fiber &f) { return !f.done && (!f.counter || *f.counter >= f.target); }

// The next fiber after the running one; null if all are done.
fiber *next_fiber() {
    const size_t n = fibers.size();
    size_t at = running ? running->thread.x : 0;
    bool all_done = true;
    for (size_t step = 1; step <= n; step++) {
        const size_t i = order == FORWARD ? (at + step) % n : (at + n - step) % n;
        if (can_run(*fibers[i])) return fibers[i].get();
        all_done &= fibers[i]->done;
    }
    if (!all_done) fail("threads wait for each other and none can go on,");
    return nullptr;
}

void wait_until(const int64_t *counter, int64_t target) {
    fiber *me = running;
    me->counter = counter;
    me->target = target;
    if (*counter < target) change_to(&me->left, next_fiber());
    me->counter = nullptr;
}

// A fiber outlives blocks: it runs one thread of a block, then waits for the next block.
void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    const void *bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (!main_bottom) main_bottom = bottom, main_size = size;  // main enters the first one
#endif
    for (;;) {
        (*kernel)();
        fiber *me = running;
        if (me->copies.size() > 1 || !me->copies[0].empty()) fail("a cp.async nobody waited for");
        if (me->products.size() > 1 || !me->products[0].empty()) fail("products nobody waited for");
        if (me->asked != asked[me->thread.x / 128].size())
            fail("a warp that asks for fewer products than its warpgroup");
        me->done = true;
        change_to(&me->left, next_fiber());
    }
}

void add_fiber() {
    fibers.push_back(std::make_unique<fiber>());
    fiber &f = *fibers.back();
    f.thread = dim3(static_cast<unsigned>(fibers.size() - 1));
    f.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    getcontext(&f.entry);
    f.entry.uc_stack.ss_sp = f.stack;
    f.entry.uc_stack.ss_size = kStack;
    f.entry.uc_link = nullptr;
    makecontext(&f.entry, fiber_main, 0);
}

}  // namespace

void allow_shared(int bytes) {
    if (bytes > (MQ_ARCH < 80 ? 64 << 10 : 99 << 10))
        fail("more shared memory than a block can have");
    allowed_shared = bytes;
}

void hide_from_early(void *at, size_t bytes) {
    hidden_at = static_cast<unsigned char *>(at);
    hidden.assign(hidden_at, hidden_at + bytes);
}

void see_previous() {
    if (!waited) std::copy(hidden.begin(), hidden.end(), hidden_at);
    waited = true;
}

void run(dim3 grid, dim3 block, size_t shared, bool is_early, const std::function<void()> &body) {
    if (block.y != 1 || block.z != 1 || block.x % 32) fail("a block that is no row of warps");
    if (grid.y > 65535 || grid.z > 65535) fail("a grid that no card takes");
    if (shared > static_cast<size_t>(allowed_shared)) fail("more shared memory than was asked for");
    allowed_shared = kOrdinaryShared;
    if (!fibers.empty() && fibers.size() != block.x) fail("blocks of different sizes");
    while (fibers.size() < block.x) add_fiber();
    kernel = &body;
    here.block_size = block;
    here.grid_size = grid;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                here.block = dim3(x, y, z);
                const std::unique_ptr<unsigned char, void (*)(void *)> bytes(
                    static_cast<unsigned char *>(aligned_alloc(256, (shared + 255) / 256 * 256)),
                    [](void *p) { free(p); });
                memset(bytes.get(), 0xff, shared);
                shared_bytes = bytes.get();
                warps.assign(block.x / 32, warp());
                asked.assign((block.x + 127) / 128, {});
                block_arrived = any_set[0] = any_set[1] = unseen = 0;
                for (const auto &f : fibers) {
                    f->done = false;
                    f->exchanges = f->barriers = 0;
                    f->copies.resize(1);
                    f->products.resize(1);
                    f->unseen = 0;
                    f->fenced_d = nullptr;
                    f->asked = 0;
                }
                waited = !is_early;
                if (is_early) std::fill_n(hidden_at, hidden.size(), 0xff);
                running = nullptr;
                change_to(&main_left, fibers[order == FORWARD ? 0 : block.x - 1].get());
                if (!waited) fail("no wait for the kernel before");
            }
    hidden.clear();
}

void barrier() {
    const int64_t target = ++running->barriers * static_cast<int64_t>(fibers.size());
    block_arrived++;
    wait_until(&block_arrived, target);
}

int barrier_or(int value) {
    int64_t *set = &any_set[running->barriers % 2];
    if (value) *set = running->barriers + 1;
    const int64_t mine = running->barriers + 1;
    barrier();
    return *set == mine;
}

const unsigned char *exchange(const void *value, size_t size) {
    warp &w = warps[running->thread.x / 32];
    const int parity = static_cast<int>(running->exchanges % 2);
    const int64_t target = (running->exchanges++ / 2 + 1) * 32;
    if (w.arrived[parity] % 32 == 0)
        w.sizes[parity] = size;
    else if (w.sizes[parity] != size)
        fail("lanes of a warp in different exchanges");
    memcpy(w.values[parity] + 64 * (running->thread.x & 31), value, size);
    w.arrived[parity]++;
    wait_until(&w.arrived[parity], target);
    return w.values[parity];
}

void copy_later(void *to, const void *from, size_t bytes, size_t zeros) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
        fail("a cp.async that is not aligned to 16 bytes,");
    memset(to, 0xff, bytes + zeros);  // inaccessible from here on
    running->copies.back().push_back({to, from, bytes, zeros});
}

void commit_copies() { running->copies.emplace_back(); }

void wait_for_copies(int pending) {
    auto &groups = running->copies;
    while (groups.size() > static_cast<size_t>(pending) + 1) {
        for (const copy &c : groups.front()) {
            if (c.bytes) memcpy(c.to, c.from, c.bytes);
            memset(static_cast<char *>(c.to) + c.bytes, 0, c.zeros);
            running->unseen++, unseen++;
        }
        groups.erase(groups.begin());
    }
}

void fence_for_products() {
    unseen -= running->unseen;
    running->unseen = 0;
}

namespace {
void ask(uint64_t what) {
    std::vector<uint64_t> &all = asked[running->thread.x / 128];
    if (running->asked == all.size()) all.push_back(what);
    if (all[running->asked++] != what)
        fail("a warp that asks for other products than its warpgroup");
}
}  // namespace

void fence_products(const void *d, const unsigned *a) {
    ask(FENCE);
    running->fenced_d = d, running->fenced_a = a;
    memcpy(running->fenced_sums, d, sizeof running->fenced_sums);
    memcpy(running->fenced_left, a, sizeof running->fenced_left);
}

uint64_t shared_address(const void *at) {
    return static_cast<uint64_t>(static_cast<const unsigned char *>(at) - shared_bytes);
}

// The PTX manual's layout of K-major matrices: 8 contiguous rows of 32 bytes, the next 8 a stride
// further. Bit 7 of an address flips its bit 4.
const unsigned char *byte_of(uint64_t descriptor, unsigned row, unsigned byte) {
    const uint64_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 62 != 3 || (descriptor >> 49 & 7) != 0)
        fail("a swizzle other than of 32 bytes, or a base offset: not emulated,");
    if (start % 256 != 0) fail("a swizzled matrix that is not aligned to 256 bytes");
    const uint64_t address = start + row / 8 * stride + row % 8 * 32 + byte;
    return shared_bytes + (address ^ (address >> 7 & 1) << 4);
}

namespace {
void copy_matrix(uint64_t descriptor, unsigned char *to) {
    for (unsigned row = 0; row < kRows; row++)
        for (unsigned i = 0; i < kRowBytes; i += 16)
            memcpy(to + row * kRowBytes + i, byte_of(descriptor, row, i), 16);
}

void multiply(void *d, const void *sums, const unsigned *a, uint64_t descriptor, bool adds,
              bool is_float) {
    ask(descriptor);
    const fiber &me = *running;
    const ptrdiff_t first = me.fenced_d ? a - me.fenced_a : -1;
    if (d != me.fenced_d || first < 0 || first > 12) fail("products without wgmma.fence");
    if (memcmp(d, me.fenced_sums, sizeof me.fenced_sums)) fail("sums changed behind wgmma.fence");
    if (memcmp(a, me.fenced_left + first, 4 * sizeof *a))
        fail("registers changed behind wgmma.fence");
    product p;
    p.d = d, p.a = a, p.descriptor = descriptor, p.adds = adds, p.is_float = is_float;
    memcpy(p.before, d, sizeof p.before);
    memcpy(p.sums, sums, sizeof p.sums);
    memcpy(p.left, a, sizeof p.left);
    // all threads read the same: once per warp is enough
    if (lane() == 0) {
        p.right.resize(kRows * kRowBytes);
        copy_matrix(descriptor, p.right.data());
    }
    if (unseen) fail("products while what cp.async brought lacks a proxy fence,");
    running->products.back().push_back(p);
}

template <typename T>
void put_sums(const product &p) {
    for (size_t i = 0; i < 32; i++) {
        T sum;
        memcpy(&sum, p.sums + i * sizeof sum, sizeof sum);
        T *d = static_cast<T *>(p.d) + i;
        *d = p.adds ? *d + sum : sum;
    }
}
}  // namespace

void multiply_later(int *d, const int *sums, const unsigned *a, uint64_t descriptor, bool adds) {
    multiply(d, sums, a, descriptor, adds, false);
}
void multiply_later(float *d, const float *sums, const unsigned *a, uint64_t descriptor,
                    bool adds) {
    multiply(d, sums, a, descriptor, adds, true);
}

void commit_products() {
    ask(COMMIT);
    running->products.emplace_back();
    running->fenced_d = nullptr;
}

void wait_for_products(int pending) {
    ask(WAIT + static_cast<uint64_t>(pending));
    auto &groups = running->products;
    while (groups.size() > static_cast<size_t>(pending) + 1) {
        for (const product &p : groups.front()) {
            if (memcmp(p.before, p.d, sizeof p.before)) fail("sums changed before the wait");
            if (memcmp(p.left, p.a, sizeof p.left)) fail("registers changed before the wait");
            if (p.right.empty()) continue;
            unsigned char now[kRows * kRowBytes];
            copy_matrix(p.descriptor, now);
            if (memcmp(p.right.data(), now, sizeof now))
                fail("shared memory changed before the wait");
        }
        for (const product &p : groups.front()) p.is_float ? put_sums<float>(p) : put_sums<int>(p);
        groups.erase(groups.begin());
    }
}

}  // namespace emulator
