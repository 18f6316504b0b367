// Shared by the CUDA kernels. Only the stable ABI of LibTorch is used (TORCH_TARGET_VERSION 2.10).
//
// With VLP_EMULATE the same sources compile as plain C++ over a header that runs the lanes of a block as coroutines on the CPU: the logic of
// the kernels is tested where there is no GPU (tests/emulation).
#pragma once

#include <torch/csrc/stable/macros.h>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <limits>
#include <vector>

// VLP_DYNAMIC_SHARED: the name of a pointer to the dynamic shared memory of the block.
#ifdef VLP_EMULATE
#define VLP_DEVICE_KEY CPU
#define VLP_DYNAMIC_SHARED(name) void* name = vlp_emulation::shared.data()
#else
#define VLP_DEVICE_KEY CUDA
#define VLP_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace vlp {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 128;
constexpr unsigned kAllLanes = 0xffffffffu;

// Sums of everything narrower than double are made in float.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulate<T>::type;

__device__ __forceinline__ float load(float value) { return value; }
__device__ __forceinline__ double load(double value) { return value; }
__device__ __forceinline__ float load(Half value) { return static_cast<float>(value); }
__device__ __forceinline__ float load(BFloat16 value) { return static_cast<float>(value); }

template <typename A>
__device__ __forceinline__ A not_a_number() {
  return std::numeric_limits<A>::quiet_NaN();
}

// Numbers that travel in one load: 16 bytes when kCount fills them.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T item[kCount];
};

template <int kCount, typename T>
__device__ __forceinline__ void load_pack(const T* source, acc_t<T>* target) {
  const Pack<T, kCount> pack = *reinterpret_cast<const Pack<T, kCount>*>(source);
#pragma unroll
  for (int i = 0; i < kCount; ++i) target[i] = load(pack.item[i]);
}

template <int kCount, typename T>
__device__ __forceinline__ void store_pack(T* target, const acc_t<T>* source) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.item[i] = static_cast<T>(source[i]);
  *reinterpret_cast<Pack<T, kCount>*>(target) = pack;
}

// Sum over the lanes of a group of `width` (a power of two); every lane of the warp has to come here.
template <typename A>
__device__ __forceinline__ A group_sum(A value, int width) {
  for (int distance = width / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

inline cudaStream_t stream_of(const Tensor& tensor) {
#ifdef VLP_EMULATE
  return nullptr;
#else
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
#endif
}

// `shared` bytes of dynamic shared memory, 48 KB at most.
template <typename... Parameters>
void launch_with(
    void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, cudaStream_t stream, Parameters... parameters) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "vlp_ops: the problem needs more than 2^31 thread blocks");
#ifdef VLP_EMULATE
  (void)stream;
  emulate(blocks, threads, shared, [&] { kernel(parameters...); });
#else
  kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(parameters...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
#endif
}

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream, Parameters... parameters) {
  launch_with(kernel, blocks, threads, 0, stream, parameters...);
}

inline int64_t blocks_for(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

// Calls action with a zero of the element type.
template <typename Action>
void by_element(const char* op, ScalarType type, Action action) {
  switch (type) {
    case ScalarType::Float: return action(float{});
    case ScalarType::Double: return action(double{});
    case ScalarType::Half: return action(Half{});
    case ScalarType::BFloat16: return action(BFloat16{});
    default: STD_TORCH_CHECK(false, op, ": unsupported dtype");
  }
}

#ifdef VLP_EMULATE
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
};
#else
struct OnDevice : torch::stable::accelerator::DeviceGuard {
  explicit OnDevice(const Tensor& tensor) : DeviceGuard(tensor.get_device_index()) {}
};
#endif

inline bool aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0; }

// Lanes that share one row of `width` numbers, `pack` at a time: a power of two, at most a warp.
inline int lanes_for(int64_t width, int pack) {
  int lanes = 1;
  while (lanes < 32 && lanes * pack < width) lanes *= 2;
  return lanes;
}

inline Tensor converted(const Tensor& tensor, ScalarType type) {
  return torch::stable::contiguous(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

}  // namespace vlp
