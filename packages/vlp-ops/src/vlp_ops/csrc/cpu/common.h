// Shared by the CPU kernels: element types, the choice of instruction set at run time, argument checks.
//
// Only the stable ABI of LibTorch is used (TORCH_TARGET_VERSION 2.10), so one library serves every later torch.
#pragma once

#include <torch/csrc/stable/macros.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

// A function marked VLP_CLONES is compiled three times, and the loader takes the best one this processor can run. What it calls must be inlined
// into it to be compiled with it, hence VLP_INLINE on every template below it and no lambdas inside.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define VLP_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VLP_CLONES
#endif
#define VLP_INLINE inline __attribute__((always_inline))
#define VLP_RESTRICT __restrict__

namespace vlp {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

// Vectors of 32 bytes: one AVX register, two SSE registers, half an AVX-512 one.
template <typename A>
struct Lanes {};
template <>
struct Lanes<float> {
  typedef float type __attribute__((vector_size(32)));
  typedef int32_t integer __attribute__((vector_size(32)));  // what a comparison gives
  typedef int32_t narrow __attribute__((vector_size(32)));   // int32 of each lane
  static constexpr int count = 8;
};
template <>
struct Lanes<double> {
  typedef double type __attribute__((vector_size(32)));
  typedef int64_t integer __attribute__((vector_size(32)));
  typedef int32_t narrow __attribute__((vector_size(16)));
  static constexpr int count = 4;
};
template <typename A>
using vec_t = typename Lanes<A>::type;

typedef uint16_t Bits16 __attribute__((vector_size(16)));
typedef uint32_t Bits32 __attribute__((vector_size(32)));

VLP_INLINE vec_t<float> load_vector(const float* source) {
  vec_t<float> result;
  std::memcpy(&result, source, sizeof(result));
  return result;
}
VLP_INLINE vec_t<double> load_vector(const double* source) {
  vec_t<double> result;
  std::memcpy(&result, source, sizeof(result));
  return result;
}
VLP_INLINE vec_t<float> load_vector(const BFloat16* source) {
  Bits16 narrow;
  std::memcpy(&narrow, source, sizeof(narrow));
  return (vec_t<float>)(__builtin_convertvector(narrow, Bits32) << 16);
}
VLP_INLINE vec_t<float> load_vector(const Half* source) {
  // Exponent and mantissa shifted into place and scaled by 2^112 give every finite value, subnormals included; infinity and NaN keep the
  // largest exponent.
  Bits16 narrow;
  std::memcpy(&narrow, source, sizeof(narrow));
  const Bits32 bits = __builtin_convertvector(narrow, Bits32), magnitude = bits & 0x7fff;
  const Bits32 scaled = (Bits32)((vec_t<float>)(magnitude << 13) * 0x1p112f);
  const Bits32 special = (Bits32)(magnitude >= 0x7c00) & 0x7f800000u;
  return (vec_t<float>)(scaled | special | ((bits & 0x8000) << 16));
}
template <typename A>
VLP_INLINE void store_vector(A* target, vec_t<A> value) {
  std::memcpy(target, &value, sizeof(value));
}
template <typename A>
VLP_INLINE A sum_of(vec_t<A> value) {
  A sum = 0;
  for (int i = 0; i < Lanes<A>::count; ++i) sum += value[i];
  return sum;
}

VLP_INLINE float load(float value) { return value; }
VLP_INLINE double load(double value) { return value; }
VLP_INLINE float load(BFloat16 value) {
  uint32_t bits = static_cast<uint32_t>(value.x) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
VLP_INLINE float load(Half value) { return static_cast<float>(value); }

template <typename T>
VLP_INLINE void store(T* target, acc_t<T> value) {
  *target = static_cast<T>(value);
}

template <typename T>
inline const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
inline T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Asks for large pages: a fresh gradient of a large table costs about as much in page faults as in arithmetic.
inline void advise_large_pages(const Tensor& tensor, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kLarge = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (begin + kLarge - 1) / kLarge * kLarge, last = (begin + bytes) / kLarge * kLarge;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace vlp
