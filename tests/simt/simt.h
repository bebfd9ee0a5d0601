// A GPU of fibers: the CUDA sources of csrc/cuda, compiled by g++, run on one processor core, one fiber per thread.
//
// Every primitive that a kernel uses is a rendezvous: a fiber parks until the rest of its warp or block has arrived.
// Fibers switch only there, so a run can be repeated: the same seed gives the same order of threads. Shared memory
// starts as NaN, and guards on both sides reveal writes beyond it.
// Global memory that is named in `delayed` shows other blocks a store only after a fence, see store_buffers.h.
// Shown by such a run: wrong indices and fragments, missing barriers and fences, reads before writes, deadlock.
// Not shown: speed, bank conflicts, how tensor cores round.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "simt/store_buffers.h"

#define SIMT_DEVICE inline
#define SIMT_FUNCTION static

namespace simt {

struct Options {
  int grid, block;               // blocks, all resident at once, and threads per block, a multiple of 32
  size_t shared_bytes;           // per block
  unsigned order = 0;            // 0: warps in the order of their numbers; else the seed of a random order
  int dropped = 0;               // source line of a barrier or a fence to skip, to prove that a test would notice
  std::vector<Range> delayed{};  // global memory, see store_buffers.h
};

using WarpOp = void (*)(void** operand);  // operand[lane] points at that lane's arguments
struct Index {
  unsigned x;
};
struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Index index;
};
struct Warp {
  uint32_t runnable = ~0u, priority = 0;
  int arrived = 0;
  WarpOp op;
  void* operand[32];
};
struct Block {
  std::vector<char> memory;
  char* shared;
  int at_barrier = 0;
  Index index;
};
struct Machine {
  Options options;
  const char* fault = nullptr;
  std::function<void()> kernel;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  std::mt19937 random;
  ucontext_t host;
  size_t current = 0, finished = 0;
  std::optional<StoreBuffers> stores;  // where stores are delayed
};
inline Machine* machine;
inline Index grid_size;
inline Thread& this_thread() { return machine->threads[machine->current]; }
inline Warp& this_warp() { return machine->warps[machine->current / 32]; }
inline size_t block_number() { return machine->current / machine->options.block; }
inline Block& this_block() { return machine->blocks[block_number()]; }
inline void park() { this_warp().runnable &= ~(1u << machine->current % 32); }

// Next fiber to run, or -1: a runnable lane of the runnable warp of highest priority, so that one warp gets as far
// ahead of the others as barriers allow. In random order lanes are shuffled too, and priorities change at times.
inline int pick_next() {
  Machine& m = *machine;
  const bool shuffle = m.options.order != 0;
  if (shuffle && m.random() % 256 == 0) this_warp().priority = m.random();
  const Warp* best = nullptr;
  for (const Warp& warp : m.warps)
    if (warp.runnable && (!best || warp.priority > best->priority)) best = &warp;
  if (!best) return -1;
  const int first_lane = shuffle ? m.random() % 32 : 0;
  const uint64_t lanes_twice = best->runnable * 0x100000001ull;
  return static_cast<int>(best - m.warps.data()) * 32 + (first_lane + __builtin_ctzll(lanes_twice >> first_lane)) % 32;
}

// Abandons all fibers and returns to launch(): at the end of the last fiber, or on a fault.
inline void stop(const char* fault) {
  machine->fault = fault;
  setcontext(&machine->host);
}

inline void switch_fiber() {
  const int next = pick_next(), previous = static_cast<int>(machine->current);
  if (next < 0) stop(machine->finished == machine->threads.size() ? nullptr : "deadlock");
  if (next == previous) return;
  if (machine->stores) machine->stores->leave(previous);
  machine->current = next;
  if (machine->stores) machine->stores->enter(block_number(), next);
  swapcontext(&machine->threads[previous].context, &machine->threads[next].context);
}

// All 32 lanes hand in their arguments; the last one to arrive performs the instruction for the whole warp.
inline void warp_rendezvous(void* operand, WarpOp op) {
  Warp& warp = this_warp();
  if (warp.arrived && warp.op != op) stop("lanes of one warp meet in different instructions");
  warp.op = op;
  warp.operand[machine->current % 32] = operand;
  park();
  if (++warp.arrived == 32) {
    op(warp.operand);
    warp.arrived = 0;
    warp.runnable = ~0u;
  }
  switch_fiber();
}

// Runs `kernel` once per thread; null, or what went wrong.
inline const char* launch(const Options& options, std::function<void()> kernel) {
  constexpr size_t kGuard = 64 * 1024, kStack = 64 * 1024;
  Machine m;
  machine = &m;
  grid_size.x = options.grid;
  m.options = options;
  m.kernel = std::move(kernel);
  m.random.seed(options.order);
  m.blocks.resize(options.grid);
  m.warps.resize(options.grid * options.block / 32);
  m.threads.resize(options.grid * options.block);
  for (size_t w = 0; w < m.warps.size(); ++w) m.warps[w].priority = options.order ? m.random() : ~w;
  for (size_t b = 0; b < m.blocks.size(); ++b) {
    Block& block = m.blocks[b];
    block.index.x = b;
    // 0xFF everywhere is NaN in float16, bfloat16 and float32.
    block.memory.assign(options.shared_bytes + 2 * kGuard, '\xff');
    block.shared = block.memory.data() + kGuard;
  }
  for (size_t t = 0; t < m.threads.size(); ++t) {
    Thread& thread = m.threads[t];
    thread.index.x = t % options.block;
    thread.stack.reset(new char[kStack]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    makecontext(
        &thread.context,
        [] {
          machine->kernel();
          ++machine->finished;
          park();
          switch_fiber();
        },
        0);
  }
  if (!options.delayed.empty()) m.stores.emplace(options.delayed, m.blocks.size(), m.threads.size());
  swapcontext(&m.host, &m.threads[0].context);  // comes back through stop()
  if (m.stores) m.stores->end(m.current);
  for (const Block& block : m.blocks)
    for (size_t i = 0; i < kGuard; ++i)
      if ((block.memory[i] & block.shared[options.shared_bytes + i]) != '\xff') m.fault = "shared memory overrun";
  return m.fault;
}

// Every lane reads `value` of the lane that `from` names.
template <class T>
T shuffle(T value, int from) {
  struct Lane {
    T in, out;
    int from;
  } mine{value, value, from};
  warp_rendezvous(&mine, [](void** lane) {
    for (int l = 0; l < 32; ++l) {
      Lane* const mine = static_cast<Lane*>(lane[l]);
      mine->out = static_cast<Lane*>(lane[mine->from])->in;
    }
  });
  return mine.out;
}

}  // namespace simt

#define threadIdx (simt::this_thread().index)
#define blockIdx (simt::this_block().index)
#define gridDim (simt::grid_size)

// The fiber parks until every thread of its block has called it; a thread that returned never arrives: deadlock.
inline void __syncthreads(int line = __builtin_LINE()) {
  if (line == simt::machine->options.dropped) return;
  simt::park();
  if (++simt::this_block().at_barrier == simt::machine->options.block) {
    const size_t block = simt::machine->options.block, number = simt::block_number();
    if (simt::machine->stores) {
      simt::machine->stores->leave(simt::machine->current);
      simt::machine->stores->meet(number, number * block, block);
      simt::machine->stores->enter(number, simt::machine->current);
    }
    simt::this_block().at_barrier = 0;
    const int warps = simt::machine->options.block / 32,
              first = static_cast<int>(simt::machine->current) / 32 / warps * warps;
    for (int w = 0; w < warps; ++w) simt::machine->warps[first + w].runnable = ~0u;
  }
  simt::switch_fiber();
}

inline int simt_lane() { return static_cast<int>(simt::machine->current % 32); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int bits) {
  return simt::shuffle(value, simt_lane() ^ bits);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return simt::shuffle(value, lane % 32);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  return simt::shuffle(value, simt_lane() < distance ? simt_lane() : simt_lane() - distance);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned votes = 0;
  for (int l = 0; l < 32; ++l) votes |= static_cast<unsigned>(simt::shuffle(static_cast<int>(vote), l) != 0) << l;
  return votes;
}
inline void __syncwarp(unsigned = ~0u) { simt::shuffle(0, 0); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline void __threadfence(int line = __builtin_LINE()) {
  if (line == simt::machine->options.dropped || !simt::machine->stores) return;
  simt::machine->stores->fence(simt::block_number(), simt::machine->current);
}
inline void __trap() { simt::stop("trap"); }
// Where stores are delayed: other warps run before an atomic and after it, unless they wait at one, too.
inline void simt_let_others_run() {
  simt::this_warp().priority = simt::machine->random() % 1024;
  simt::switch_fiber();
}
// Fibers never run at the same time, so a plain read-modify-write is already atomic.
template <class T>
T atomicAdd(T* target, T value) {
  if (auto& stores = simt::machine->stores) {
    simt_let_others_run();
    const T old = stores->add(simt::block_number(), simt::machine->current, target, value);
    simt_let_others_run();
    return old;
  }
  const T old = *target;
  *target += value;
  return old;
}
template <class T>
T __ldg(const T* source) {
  return *source;
}

namespace eefast::cuda {

// ldmatrix: lane 8m+r names row r of matrix m; lane l receives elements 2(l%4), 2(l%4)+1 of row l/4 of every matrix.
inline void load_matrices(uint32_t (&fragment)[4], const void* row) {
  struct Lane {
    const uint32_t* row;
    uint32_t* fragment;
  } mine{static_cast<const uint32_t*>(row), fragment};
  simt::warp_rendezvous(&mine, [](void** lane) {
    for (int m = 0; m < 4; ++m)
      for (int l = 0; l < 32; ++l)
        static_cast<Lane*>(lane[l])->fragment[m] = static_cast<Lane*>(lane[m * 8 + l / 4])->row[l % 4];
  });
}

inline float simt_float(uint16_t bits, __half) { return __half2float(__half(__half_raw{bits})); }
inline float simt_float(uint16_t bits, __nv_bfloat16) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}

// mma.sync: collect A and B from the lanes' fragments (layout of the PTX manual), multiply, add to every lane's C.
template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  struct Lane {
    float* c;
    uint32_t ab[6];
  } mine{c, {a[0], a[1], a[2], a[3], b0, b1}};
  simt::warp_rendezvous(&mine, [](void** lane) {
    float A[16][16], B[8][16];
    for (int l = 0; l < 32; ++l)
      for (int r = 0; r < 6; ++r) {  // registers 0..3: A, rows l/4 and l/4+8, k low and high; 4..5: B, k low and high
        const uint32_t both = static_cast<Lane*>(lane[l])->ab[r];
        float* const k = r < 4 ? &A[l / 4 + r % 2 * 8][r / 2 * 8 + l % 4 * 2] : &B[l / 4][(r - 4) * 8 + l % 4 * 2];
        k[0] = simt_float(both & 0xffff, T{}), k[1] = simt_float(both >> 16, T{});
      }
    for (int l = 0; l < 32; ++l)
      for (int r = 0; r < 4; ++r) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += A[l / 4 + r / 2 * 8][k] * B[l % 4 * 2 + r % 2][k];
        static_cast<Lane*>(lane[l])->c[r] += sum;
      }
  });
}

}  // namespace eefast::cuda
