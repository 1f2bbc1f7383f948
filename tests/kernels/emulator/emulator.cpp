// The fibers of emulator.h: who runs, who waits, and what a warp computes together.
#include "emulator.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <deque>
#include <memory>
#include <vector>

#include "races.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

extern "C" {
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
[[gnu::weak]] void __asan_unpoison_memory_region(const void* memory, size_t size);
[[gnu::weak]] void __asan_handle_no_return();
}

namespace emulator {

int current = -1;

namespace {

constexpr int MAX_THREADS = 1024, MAX_SHARED = 227 * 1024;
constexpr size_t STACK = 128 * 1024;
constexpr int FAILED = 719;  // cudaErrorLaunchFailure

// A stack, and where it stopped. GCC's own jumps are a hundred times faster than swapcontext, which sets signal masks.
using Place = void* [5];
struct Fiber {
  Place stopped;
  const void* bottom = nullptr;
  size_t size = 0;
};

struct Copy {
  Site site;
  void* to;
  const void* from;  // null: zeros
  uint32_t write;
};

struct Thread : Fiber {
  dim3 index;
  bool started = false, done;
  enum { RUNS, AT_BARRIER, AT_COLLECTIVE } state;
  Site site;
  void (*together)(void** lanes);
  void* mine;
  std::deque<std::vector<Copy>> copies;  // the groups under way, the last one still open
};

Fiber scheduler;
Place failure;
std::vector<Thread> threads;
int count = 0;
char* stacks = nullptr;
std::vector<int> runnable;
std::unique_ptr<uint8_t, void (*)(void*)> shared_of_block{nullptr, free};
std::vector<uint64_t> order;
void (*body)(const void*);
const void* context;
uint64_t random_state = 1;
char message[512];

// AddressSanitizer has to know which stack is in use. This file is not compiled for it: it may not be there.
void leave_for(const Fiber& to) {
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(nullptr, to.bottom, to.size);
}
void arrive(Fiber* from) {
  const void* bottom;
  size_t size;
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (from) from->bottom = bottom, from->size = size;
}

uint32_t draw(uint32_t below) {  // xorshift64*
  uint64_t& s = random_state;
  s ^= s >> 12, s ^= s << 25, s ^= s >> 27;
  return (uint32_t)((s * 2685821657736338717ull) >> 32) % below;
}

const char* base(const char* file) {
  const char* slash = strrchr(file, '/');
  return slash ? slash + 1 : file;
}

Thread& self() { return threads[current]; }

[[gnu::noinline, noreturn]] void jump(Place& place) { __builtin_longjmp(place, 1); }

[[gnu::noinline]] void switch_to(Fiber& from, Fiber& to) {
  leave_for(to);
  if (!__builtin_setjmp(from.stopped)) jump(to.stopped);
  arrive(nullptr);
}

[[gnu::noinline]] void start(Fiber& fiber, void (*function)()) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = const_cast<void*>(fiber.bottom), context.uc_stack.ss_size = fiber.size;
  context.uc_link = nullptr;
  makecontext(&context, function, 0);
  leave_for(fiber);
  if (!__builtin_setjmp(scheduler.stopped)) setcontext(&context);
  arrive(nullptr);
}

// A fiber serves one thread of block after block.
void serve() {
  arrive(&scheduler);
  for (;;) {
    body(context);
    Thread& thread = self();
    for (const auto& group : thread.copies)
      for (const Copy& copy : group)
        fail("returns before it has waited for its copy_async (%s:%d)", base(copy.site.file), copy.site.line);
    thread.done = true;
    switch_to(thread, scheduler);
  }
}

void resume(int t) {
  Thread& thread = threads[t];
  current = t, threadIdx = thread.index;
  if (thread.started) {
    switch_to(scheduler, thread);
  } else {
    thread.started = true;
    thread.bottom = stacks + t * STACK, thread.size = STACK;
    start(thread, serve);
  }
  current = -1;
}

bool same(const Site& a, const Site& b) { return a.line == b.line && !strcmp(a.file, b.file); }

[[noreturn]] void fail_apart(int a, int b) {
  const Site &at = threads[a].site, &other = threads[b].site;
  fail("thread %d waits at %s (%s:%d) and thread %d at %s (%s:%d)", a, at.name, base(at.file), at.line, b,
       other.name, base(other.file), other.line);
}

// All lanes of the warp wait at one collective: it happens.
bool release_warp(int first) {
  void* lanes[WARP] = {};
  int one = -1;
  for (int t = first; t < first + WARP && t < count; t++) {
    const Thread& thread = threads[t];
    if (thread.done) continue;
    if (thread.state != Thread::AT_COLLECTIVE) return false;
    if (one >= 0 && !same(threads[one].site, thread.site)) fail_apart(one, t);
    one = t, lanes[t - first] = thread.mine;
  }
  if (one < 0) return false;
  threads[one].together(lanes);
  for (int t = first; t < first + WARP && t < count; t++)
    if (!threads[t].done) threads[t].state = Thread::RUNS, runnable.push_back(t);
  return true;
}

// Nobody runs and no warp is complete: all have to wait at one barrier.
void release_block() {
  int one = -1;
  for (int t = 0; t < count; t++) {
    if (threads[t].done) continue;
    if (one < 0) one = t;
    if (threads[t].state != Thread::AT_BARRIER || !same(threads[one].site, threads[t].site)) fail_apart(one, t);
  }
  races::block_barrier();
  for (int t = 0; t < count; t++)
    if (!threads[t].done) threads[t].state = Thread::RUNS, runnable.push_back(t);
}

void run_block() {
  runnable.clear();
  for (int t = 0; t < count; t++) {
    Thread& thread = threads[t];
    thread.done = false, thread.state = Thread::RUNS;
    thread.copies.assign(1, {});
    thread.index = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
    runnable.push_back(t);
  }
  int live = count;
  while (live) {
    while (!runnable.empty()) {
      const uint32_t pick = draw((uint32_t)runnable.size());
      const int t = runnable[pick];
      runnable[pick] = runnable.back(), runnable.pop_back();
      resume(t);
      live -= threads[t].done;
    }
    bool released = false;
    for (int first = 0; first < count; first += WARP) released |= release_warp(first);
    if (!released && live) release_block();
  }
}

void run_grid(int shared_bytes) {
  const uint64_t blocks = (uint64_t)gridDim.x * gridDim.y * gridDim.z;
  order.resize(blocks);
  for (uint64_t i = 0; i < blocks; i++) {
    const uint64_t j = draw((uint32_t)i + 1);
    order[i] = order[j], order[j] = i;
  }
  for (const uint64_t i : order) {
    blockIdx = dim3((unsigned)(i % gridDim.x), (unsigned)(i / gridDim.x % gridDim.y),
                    (unsigned)(i / gridDim.x / gridDim.y));
    void* shared = nullptr;
    if (shared_bytes && posix_memalign(&shared, 128, shared_bytes)) fail("out of memory");
    if (shared) memset(shared, 0xff, shared_bytes);
    shared_of_block.reset(static_cast<uint8_t*>(shared));
    races::begin_block((uint32_t)i, shared, shared_bytes);
    run_block();
  }
}

// One mma of a warp: lane 4 g + t has rows g and g + 8 of A, column g of B and columns 2 t and 2 t + 1 of D, in registers
// as PTX numbers them (m16n8k16 of 16-bit values, m16n8k32 of bytes).
template <class Sum, class Wide, int K>
struct Mma {
  static constexpr int PER_REGISTER = K / 8;
  Sum* d;
  Wide a[4][PER_REGISTER], b[2][PER_REGISTER];

  template <class Value>
  Mma(Site site, Sum (&d_)[4], const Value (&a_)[4 * PER_REGISTER], const Value (&b_)[2 * PER_REGISTER]) : d(d_) {
    for (int i = 0; i < 4 * PER_REGISTER; i++) a[i / PER_REGISTER][i % PER_REGISTER] = a_[i];
    for (int i = 0; i < 2 * PER_REGISTER; i++) b[i / PER_REGISTER][i % PER_REGISTER] = b_[i];
    collective(site, ALL, together, this);
  }

  static void together(void** lanes) {
    Wide A[16][K], B[K][8];
    for (int i = 0; i < WARP; i++) {
      if (!lanes[i]) fail("lane %d has returned before an mma of its warp", i);
      const Mma& lane = *static_cast<const Mma*>(lanes[i]);
      const int g = i >> 2, t = i & 3;
      for (int e = 0; e < PER_REGISTER; e++) {
        for (int j = 0; j < 4; j++) A[g + 8 * (j & 1)][PER_REGISTER * (t + 4 * (j >> 1)) + e] = lane.a[j][e];
        for (int j = 0; j < 2; j++) B[PER_REGISTER * (t + 4 * j) + e][g] = lane.b[j][e];
      }
    }
    for (int row = 0; row < 16; row++) {
      Wide sums[8] = {};
      for (int k = 0; k < K; k++)
        for (int n = 0; n < 8; n++) sums[n] += A[row][k] * B[k][n];
      for (int n = 0; n < 8; n++) {
        Sum& d = static_cast<Mma*>(lanes[row % 8 * 4 + n / 2])->d[2 * (row / 8) + n % 2];
        d = (Sum)((Wide)d + sums[n]);
      }
    }
  }
};

}  // namespace

void fail(const char* format, ...) {
  char what[sizeof message - 128], who[32] = "";
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  if (current >= 0) snprintf(who, sizeof who, ", thread %d", current);
  snprintf(message, sizeof message, "block (%u, %u, %u)%s: %s", blockIdx.x, blockIdx.y, blockIdx.z, who, what);
  if (__asan_handle_no_return) __asan_handle_no_return();
  if (current >= 0) leave_for(scheduler);
  jump(failure);
}

int run(dim3 grid, dim3 block, int shared_bytes, void (*body_)(const void*), const void* context_) {
  gridDim = grid, blockDim = block, body = body_, context = context_;
  count = (int)(block.x * block.y * block.z);
  if (message[0]) return FAILED;  // as in CUDA: an earlier failure stays until somebody clears it
  if (__builtin_setjmp(failure)) {
    if (current >= 0) arrive(nullptr);
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stacks, MAX_THREADS * STACK);
    current = -1;
    threads.clear();  // their fibers stopped somewhere
    return FAILED;
  }
  if (count < 1 || count > MAX_THREADS) fail("%d threads, a block has 1 to %d", count, MAX_THREADS);
  if (shared_bytes > MAX_SHARED) fail("%d bytes of shared memory, a block has at most %d", shared_bytes, MAX_SHARED);
  if (grid.y > 65535 || grid.z > 65535) fail("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  if (!stacks) {
    void* made = mmap(nullptr, MAX_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED) fail("no memory for stacks");
    stacks = static_cast<char*>(made);
    races::ignore(stacks, MAX_THREADS * STACK);
  }
  if ((int)threads.size() < count) threads.resize(count);
  races::begin_launch();
  run_grid(shared_bytes);
  return 0;
}

const char* error() { return message; }

void barrier(Site site) {
  Thread& thread = self();
  thread.state = Thread::AT_BARRIER, thread.site = site;
  switch_to(thread, scheduler);
}

void collective(Site site, unsigned mask, void (*together)(void** lanes), void* mine) {
  if (mask != ALL) fail("%s (%s:%d) with the mask 0x%x", site.name, base(site.file), site.line, mask);
  Thread& thread = self();
  thread.state = Thread::AT_COLLECTIVE, thread.site = site, thread.together = together, thread.mine = mine;
  switch_to(thread, scheduler);
}

void warp_barrier(Site site, unsigned mask) {
  int warp = current / WARP;
  collective(
      site, mask,
      [](void** lanes) {
        for (int i = 0; i < WARP; i++)
          if (lanes[i]) return races::warp_barrier(*static_cast<int*>(lanes[i]));
      },
      &warp);
}

void check_aligned(Site site, const void* pointer) {
  const auto past = reinterpret_cast<uintptr_t>(pointer) % 16;
  if (past) fail("%s (%s:%d) at an address %d past a multiple of 16", site.name, base(site.file), site.line, (int)past);
}

int lane() { return current % WARP; }

uint8_t* shared() { return shared_of_block.get(); }

void copy(Site site, void* to, const void* from) {
  check_aligned(site, to), check_aligned(site, from);
  self().copies.back().push_back({site, to, from, races::begin_copy(to, __builtin_return_address(0))});
}

void commit() { self().copies.emplace_back(); }

void wait(int pending) {
  auto& copies = self().copies;
  for (; (int)copies.size() - 1 > pending; copies.pop_front())
    for (const Copy& copy : copies.front()) {
      races::end_copy(copy.write);
      if (copy.from)
        memcpy(copy.to, copy.from, 16);
      else
        memset(copy.to, 0, 16);
    }
}

void mma(Site site, float (&d)[4], const float (&a)[8], const float (&b)[4]) {
  Mma<float, double, 16>(site, d, a, b);
}

void mma(Site site, int32_t (&d)[4], const int8_t (&a)[16], const int8_t (&b)[8]) {
  Mma<int32_t, int64_t, 32>(site, d, a, b);
}

}  // namespace emulator

// Another order of threads and blocks from here on; what failed is forgotten.
extern "C" void emulator_seed(uint64_t seed) {
  emulator::random_state = seed * 2 + 1;
  emulator::message[0] = 0;
}
