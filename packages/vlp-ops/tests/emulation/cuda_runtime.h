// Stands in for the CUDA runtime when a .cu file is compiled as plain C++ with VLP_EMULATE: each lane of a block is a coroutine, and a shuffle
// or barrier waits until all 32 lanes of its warp have come to it. In between a lane runs alone, in ascending order in one block and descending
// in the next, so that a missing barrier shows. Slow, exact about who reads what from whom; nothing is known here about speed, memory order
// between warps or launch limits.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

typedef void* cudaStream_t;

struct Dimensions {
  unsigned x = 0, y = 0, z = 0;
};
inline Dimensions threadIdx, blockIdx, blockDim, gridDim;

namespace vlp_emulation {

struct Warp {
  uint64_t slot[2][32];
  int arrived = 0;
  unsigned long turn = 0;
};

struct Lane {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool finished = false;
};

inline ucontext_t scheduler;
inline std::vector<Lane> lanes;
inline std::vector<Warp> warps;
inline unsigned current;
inline std::function<void()> body;
// Dynamic shared memory of the running block.
inline std::vector<std::max_align_t> shared;

inline void entry() {
  body();
  lanes[current].finished = true;
  swapcontext(&lanes[current].context, &scheduler);
}

inline void yield() { swapcontext(&lanes[current].context, &scheduler); }

constexpr size_t kStack = 1 << 16;

}  // namespace vlp_emulation

template <typename Body>
void emulate(int64_t blocks, int threads, size_t bytes, Body kernel) {
  using namespace vlp_emulation;
  if (threads % 32 != 0) std::abort();
  body = kernel;
  lanes.resize(threads);
  blockDim.x = threads;
  gridDim.x = static_cast<unsigned>(blocks);
  shared.resize(bytes / sizeof(std::max_align_t) + 1);
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    // NaN, so that what nobody wrote is noticed.
    std::memset(shared.data(), 0xff, shared.size() * sizeof(std::max_align_t));
    warps.assign(threads / 32, Warp());
    for (Lane& lane : lanes) {
      if (!lane.stack) lane.stack.reset(new char[kStack]);
      getcontext(&lane.context);
      lane.context.uc_stack.ss_sp = lane.stack.get();
      lane.context.uc_stack.ss_size = kStack;
      lane.context.uc_link = &scheduler;
      lane.finished = false;
      makecontext(&lane.context, entry, 0);
    }
    for (unsigned left = threads, before = 0; left > 0;) {
      unsigned done = 0;
      unsigned long turns = 0;
      for (unsigned i = 0; i < static_cast<unsigned>(threads); ++i) {
        current = block % 2 ? threads - 1 - i : i;
        if (!lanes[current].finished) {
          threadIdx.x = current;
          swapcontext(&scheduler, &lanes[current].context);
        }
        done += lanes[current].finished;
        turns += warps[current / 32].turn;
      }
      // Nobody finished and no shuffle was completed in a whole round: lanes wait for lanes that have left.
      if (done + turns == before && done < static_cast<unsigned>(threads)) {
        std::fprintf(stderr, "emulation: a lane is missing at a shuffle\n");
        std::abort();
      }
      before = done + static_cast<unsigned>(turns);
      left = threads - done;
    }
  }
}

namespace vlp_emulation {

// Every lane gives a number; returns those of all 32 once the last has come.
template <typename T>
const uint64_t* exchange(unsigned mask, T value) {
  static_assert(sizeof(T) <= 8, "one slot per lane");
  if (mask != 0xffffffffu) std::abort();
  Warp& warp = warps[current / 32];
  const unsigned long turn = warp.turn;
  std::memcpy(&warp.slot[turn % 2][current % 32], &value, sizeof(T));
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.turn;
  }
  while (warp.turn == turn) yield();
  return warp.slot[turn % 2];
}

template <typename T>
T from_lane(unsigned mask, T value, int lane) {
  T result;
  std::memcpy(&result, &exchange(mask, value)[lane], sizeof(T));
  return result;
}

}  // namespace vlp_emulation

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return vlp_emulation::from_lane(mask, value, static_cast<int>(vlp_emulation::current % 32) ^ distance);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return vlp_emulation::from_lane(mask, value, lane);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const uint64_t* votes = vlp_emulation::exchange(mask, static_cast<uint64_t>(vote));
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= static_cast<unsigned>(votes[lane]) << lane;
  return result;
}

inline void __syncwarp() { vlp_emulation::exchange(0xffffffffu, 0); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

struct alignas(16) float4 {
  float x, y, z, w;
};

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float4 atomicAdd(float4* target, float4 value) {
  // A device faults there.
  if (reinterpret_cast<uintptr_t>(target) % sizeof(float4) != 0) std::abort();
  const float4 old = *target;
  *target = {old.x + value.x, old.y + value.y, old.z + value.z, old.w + value.w};
  return old;
}

template <typename T>
T atomicAdd(T* target, T value) {
  const T old = *target;
  *target += value;
  return old;
}

using std::exp;
using std::floor;
using std::fmax;
using std::log;
using std::log1p;
