// Fibers that emulate the threads of one CUDA block: each has a stack and runs until it waits for its block or its
// warp.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulate {

struct Dim3 {
  unsigned x, y, z;
  Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  size_t count() const { return static_cast<size_t>(x) * y * z; }
};

constexpr size_t kStack = 256 * 1024, kMostThreads = 1024, kMostShared = 163 * 1024;
constexpr int kLanes = 32;

enum class Waits { kNot, kForBlock, kForWarp, kForever };

struct Fiber {
  ucontext_t context;
  Dim3 thread;
  int index = 0;
  Waits waits = Waits::kNot;
  int line = 0;            // of the barrier or shuffle it waits in
  unsigned mask = 0;       // of the shuffle
  unsigned exchanges = 0;  // so far; the parity selects the half of its warp slots
  void* fake_stack = nullptr;
};

struct Running {
  Dim3 thread, block, block_size, grid_size;
  unsigned char* shared = nullptr;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<unsigned char*> stacks;
  std::vector<uint64_t> slots;  // [warp][2][lane]
  ucontext_t scheduler;
  Running running;
  Fiber* current = nullptr;
  const std::function<void()>* body = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  std::mt19937 random{1};
};

inline Machine& machine() {
  static Machine one;
  return one;
}
inline Running& running() { return machine().running; }
inline int lane() { return machine().current->index % kLanes; }

[[noreturn]] inline void fail(const char* what, int line) {
  const Machine& m = machine();
  std::fprintf(stderr, "emulated CUDA: %s, near line %d, thread %d of block (%u, %u, %u)\n", what, line,
               m.current ? m.current->index : -1, m.running.block.x, m.running.block.y, m.running.block.z);
  std::fflush(stderr);
  std::abort();
}

inline void switch_to_scheduler(bool for_good) {
  Machine& m = machine();
  Fiber* self = m.current;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self->fake_stack, m.scheduler_stack, m.scheduler_size);
#endif
  swapcontext(&self->context, &m.scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
}

inline void fiber_main() {
  Machine& m = machine();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_size);
#endif
  (*m.body)();
  m.current->waits = Waits::kForever;
  switch_to_scheduler(true);
}

inline void resume(Fiber& fiber) {
  Machine& m = machine();
  m.current = &fiber;
  m.running.thread = fiber.thread;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, m.stacks[fiber.index], kStack);
#endif
  swapcontext(&m.scheduler, &fiber.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  m.current = nullptr;
}

inline void wait_for_block(int line) {
  Fiber& self = *machine().current;
  self.waits = Waits::kForBlock;
  self.line = line;
  switch_to_scheduler(false);
}

// Publishes `value` to the warp, waits for the lanes of `mask`, and returns the values of all lanes. The halves
// alternate: a lane that is already in the next exchange does not overwrite what slower lanes have yet to read, and
// cannot be two ahead.
inline const uint64_t* exchange(unsigned mask, uint64_t value, int line) {
  Machine& m = machine();
  Fiber& self = *m.current;
  uint64_t* half = &m.slots[(self.index / kLanes * 2 + self.exchanges % 2) * kLanes];
  half[self.index % kLanes] = value;
  ++self.exchanges;
  self.waits = Waits::kForWarp;
  self.line = line;
  self.mask = mask;
  switch_to_scheduler(false);
  return half;
}

// Releases the block when all its fibers wait at one barrier. Returns false while some still run.
inline bool release_block(int threads) {
  Machine& m = machine();
  const Fiber& first = m.fibers[0];
  for (int i = 0; i < threads; ++i) {
    const Fiber& fiber = m.fibers[i];
    if (fiber.waits == Waits::kNot) return false;
  }
  for (int i = 0; i < threads; ++i) {
    const Fiber& fiber = m.fibers[i];
    if (fiber.waits != Waits::kForBlock || fiber.line != first.line) {
      m.current = &m.fibers[i];
      fail("divergent barrier: the threads of this block wait at different places, or some have ended", fiber.line);
    }
  }
  for (int i = 0; i < threads; ++i) m.fibers[i].waits = Waits::kNot;
  return true;
}

// Releases the lanes of a warp whose mask is complete in one shuffle. Returns false when there are none.
inline bool release_warp(int first, int threads) {
  Machine& m = machine();
  const int last = first + kLanes < threads ? first + kLanes : threads;
  bool released = false;
  for (int i = first; i < last; ++i) {
    const Fiber waiting = m.fibers[i];
    if (waiting.waits != Waits::kForWarp) continue;
    bool complete = true;
    for (int j = 0; j < kLanes && complete; ++j) {
      if (!(waiting.mask >> j & 1u)) continue;
      const bool there = first + j < last && m.fibers[first + j].waits == Waits::kForWarp;
      complete = there && m.fibers[first + j].line == waiting.line && m.fibers[first + j].mask == waiting.mask;
    }
    if (!complete) continue;
    if (!(waiting.mask >> (i - first) & 1u)) fail("a lane of this shuffle is not in its own mask", waiting.line);
    for (int j = 0; j < kLanes; ++j) {
      if (waiting.mask >> j & 1u) m.fibers[first + j].waits = Waits::kNot;
    }
    released = true;
  }
  return released;
}

inline void run_block(int threads) {
  Machine& m = machine();
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  while (true) {
    // Own Fisher-Yates: std::shuffle differs between standard libraries.
    for (int i = threads - 1; i > 0; --i) std::swap(order[i], order[m.random() % (i + 1)]);
    bool ran = false, ended = true;
    for (int i : order) {
      if (m.fibers[i].waits == Waits::kNot) resume(m.fibers[i]), ran = true;
    }
    for (int first = 0; first < threads; first += kLanes) ran |= release_warp(first, threads);
    for (int i = 0; i < threads; ++i) ended &= m.fibers[i].waits == Waits::kForever;
    if (ended) return;
    if (ran) continue;
    for (int i = 0; i < threads; ++i) {
      m.current = &m.fibers[i];
      if (m.fibers[i].waits == Waits::kForWarp) fail("lanes of this shuffle's mask did not arrive", m.fibers[i].line);
    }
    release_block(threads);
  }
}

inline void prepare(Fiber& fiber, int index, const Dim3& block) {
  Machine& m = machine();
  while (m.stacks.size() <= static_cast<size_t>(index))
    m.stacks.push_back(static_cast<unsigned char*>(std::malloc(kStack)));
#ifdef __SANITIZE_ADDRESS__
  // The previous fiber left this stack in the middle of a frame.
  __asan_unpoison_memory_region(m.stacks[index], kStack);
#endif
  fiber = Fiber{};
  fiber.index = index;
  const unsigned number = static_cast<unsigned>(index);
  fiber.thread = Dim3(number % block.x, number / block.x % block.y, number / (block.x * block.y));
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = m.stacks[index];
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

inline void run(const Dim3& grid, const Dim3& block, size_t shared, const std::function<void()>& body) {
  Machine& m = machine();
  const size_t threads = block.count();
  if (!threads || threads > kMostThreads || !grid.count() || grid.y > 65535 || grid.z > 65535 || shared > kMostShared) {
    fail("invalid launch: 1 to 1024 threads, a non-empty grid, at most 163 KB of shared memory", __LINE__);
  }
  m.fibers.resize(threads);
  m.slots.assign((threads + kLanes - 1) / kLanes * kLanes * 2, 0);
  m.body = &body;
  m.running.block_size = block;
  m.running.grid_size = grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        m.running.block = Dim3(x, y, z);
        // A separate allocation of the exact size for each block, filled with NaN, so that uninitialized and
        // out-of-bounds reads are found.
        unsigned char* memory = static_cast<unsigned char*>(std::malloc(shared ? shared : 1));
        std::memset(memory, 0xff, shared);
        m.running.shared = memory;
        for (size_t i = 0; i < threads; ++i) prepare(m.fibers[i], static_cast<int>(i), block);
        run_block(static_cast<int>(threads));
        std::free(memory);
      }
    }
  }
}

}  // namespace emulate
