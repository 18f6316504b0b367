// The weighted embedding bag on CUDA. Definition: vlp_ops/reference.py.
//
// Forward: a warp per bag and slice of channels. Backward: the uses of the table are sorted by row (a stable sort, so their order and with it
// every sum is the same in each run), and a warp adds up the uses of one row; it makes the gradient of the weights from the same reads.
#include "common.cuh"

#ifdef VLP_EMULATE
#include <algorithm>
#include <numeric>
#else
#include <cub/device/device_radix_sort.cuh>
#endif

namespace vlp {
namespace {

template <typename I>
__device__ __forceinline__ int64_t checked(I index, int64_t rows) {
  assert(index >= 0 && index < rows && "vlp_ops: embedding_bag index out of range");
  return index;
}

// Warp number w: bag w / slices, channels of slice w % slices.
template <typename T, typename W, typename I, int kPack>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    const I* indices, const T* weight, const W* share, T* out, int64_t bags, int64_t bag, int64_t rows, int64_t width, int64_t slices) {
  using A = acc_t<T>;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int64_t b = warp / slices, channel = (warp % slices * 32 + threadIdx.x % 32) * kPack;
  if (b >= bags || channel >= width) return;
  A sum[kPack] = {};
#pragma unroll 4
  for (int64_t j = 0; j < bag; ++j) {
    const int64_t row = checked(indices[b * bag + j], rows);
    const A factor = load(share[b * bag + j]);
    A item[kPack];
    load_pack<kPack>(weight + row * width + channel, item);
#pragma unroll
    for (int c = 0; c < kPack; ++c) sum[c] += factor * item[c];
  }
  store_pack<kPack>(out + b * width + channel, sum);
}

template <typename I>
__global__ void __launch_bounds__(kThreads) number_kernel(const I* indices, int32_t* keys, int32_t* places, int64_t count, int64_t rows) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  keys[i] = static_cast<int32_t>(checked(indices[i], rows));
  places[i] = static_cast<int32_t>(i);
}

// A warp for each sorted use; the first of a row does the row, the others have nothing to do.
template <typename T, typename W, int kPack>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    const T* grad,
    const T* weight,
    const W* share,
    const int32_t* keys,
    const int32_t* places,
    T* grad_weight,
    acc_t<T>* grad_share,
    int64_t count,
    int64_t bag,
    int64_t width) {
  using A = acc_t<T>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  // The same for all lanes of a warp, so none is missing below.
  if (first >= count || (first > 0 && keys[first] == keys[first - 1])) return;
  const int64_t row = keys[first];
  for (int64_t start = 0; start < width; start += 32 * kPack) {
    const int64_t channel = start + lane * kPack;
    const bool inside = channel < width;
    A own[kPack] = {}, sum[kPack] = {};
    if (inside && grad_share != nullptr) load_pack<kPack>(weight + row * width + channel, own);
    for (int64_t i = first; i < count && keys[i] == row; ++i) {
      const int64_t place = places[i];
      const A factor = load(share[place]);
      A upstream[kPack] = {};
      if (inside) load_pack<kPack>(grad + place / bag * width + channel, upstream);
      A dot = 0;
#pragma unroll
      for (int c = 0; c < kPack; ++c) {
        sum[c] += factor * upstream[c];
        dot += upstream[c] * own[c];
      }
      if (grad_share != nullptr) {
        dot = group_sum(dot, 32);
        // Always the same lane, so a wide row adds its slices in order.
        if (lane == 0) grad_share[place] = start == 0 ? dot : grad_share[place] + dot;
      }
    }
    if (inside && grad_weight != nullptr) store_pack<kPack>(grad_weight + row * width + channel, sum);
  }
}

// ---- host ----------------------------------------------------------------------------------------------------------

template <typename Action>
void by_type(ScalarType weight, ScalarType share, Action action) {
  if (weight == ScalarType::Float && share == ScalarType::Float) return action(float{}, float{});
  if (weight == ScalarType::Double && share == ScalarType::Double) return action(double{}, double{});
  if (weight == ScalarType::Half && share == ScalarType::Half) return action(Half{}, Half{});
  if (weight == ScalarType::Half && share == ScalarType::Float) return action(Half{}, float{});
  if (weight == ScalarType::BFloat16 && share == ScalarType::BFloat16) return action(BFloat16{}, BFloat16{});
  STD_TORCH_CHECK(
      weight == ScalarType::BFloat16 && share == ScalarType::Float,
      "embedding_bag: unsupported dtypes; per_sample_weights must have the dtype of weight or float32");
  action(BFloat16{}, float{});
}

template <typename Action>
void by_index(ScalarType type, Action action) {
  if (type == ScalarType::Long) return action(int64_t{});
  STD_TORCH_CHECK(type == ScalarType::Int, "embedding_bag: indices must be int64 or int32");
  action(int32_t{});
}

void check(const Tensor& indices, const Tensor& weight, const Tensor& share) {
  STD_TORCH_CHECK(
      indices.dim() == 2 && weight.dim() == 2 && share.dim() == 2 && share.size(0) == indices.size(0) &&
          share.size(1) == indices.size(1),
      "embedding_bag: indices (B, bag), weight (K, D) and per_sample_weights (B, bag) are wanted");
}

Tensor embedding_bag(const Tensor& indices_, const Tensor& weight_, const Tensor& share_) {
  const Tensor indices = torch::stable::contiguous(indices_), weight = torch::stable::contiguous(weight_),
               share = torch::stable::contiguous(share_);
  check(indices, weight, share);
  const OnDevice guard(weight);
  const int64_t bags = indices.size(0), bag = indices.size(1), rows = weight.size(0), width = weight.size(1);
  Tensor out = torch::stable::new_empty(weight, {bags, width});
  if (out.numel() == 0) return out;
  const cudaStream_t stream = stream_of(weight);
  by_type(weight.scalar_type(), share.scalar_type(), [&](auto element, auto number) {
    by_index(indices.scalar_type(), [&](auto index) {
      using T = decltype(element);
      using W = decltype(number);
      using I = decltype(index);
      constexpr int kFull = 16 / sizeof(T);
      const bool packed = width % kFull == 0 && aligned(weight) && aligned(out);
      const int64_t slice = 32 * (packed ? kFull : 1), slices = (width + slice - 1) / slice;
      launch(
          packed ? &forward_kernel<T, W, I, kFull> : &forward_kernel<T, W, I, 1>,
          blocks_for(bags * slices * 32),
          kThreads,
          stream,
          static_cast<const I*>(indices.const_data_ptr()),
          static_cast<const T*>(weight.const_data_ptr()),
          static_cast<const W*>(share.const_data_ptr()),
          static_cast<T*>(out.mutable_data_ptr()),
          bags,
          bag,
          rows,
          width,
          slices);
    });
  });
  return out;
}

void sort_by_key(const Tensor& like, int32_t* keys, int32_t* sorted_keys, int32_t* places, int32_t* sorted_places, int64_t count, int64_t rows, cudaStream_t stream) {
  const int size = static_cast<int>(count);
#ifdef VLP_EMULATE
  (void)like, (void)rows, (void)stream;
  std::vector<int32_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return keys[a] < keys[b]; });
  for (int i = 0; i < size; ++i) {
    sorted_keys[i] = keys[order[i]];
    sorted_places[i] = places[order[i]];
  }
#else
  int bits = 1;
  while (bits < 31 && (int64_t{1} << bits) < rows) ++bits;
  size_t bytes = 0;
  STD_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(nullptr, bytes, keys, sorted_keys, places, sorted_places, size, 0, bits, stream));
  const Tensor workspace = torch::stable::new_empty(like, {static_cast<int64_t>(bytes) + 1}, ScalarType::Byte);
  STD_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(
      workspace.mutable_data_ptr(), bytes, keys, sorted_keys, places, sorted_places, size, 0, bits, stream));
#endif
}

std::tuple<Tensor, Tensor> embedding_bag_backward(
    const Tensor& grad_, const Tensor& indices_, const Tensor& weight_, const Tensor& share_, std::vector<bool> mask) {
  const Tensor grad = torch::stable::contiguous(grad_), indices = torch::stable::contiguous(indices_),
               weight = torch::stable::contiguous(weight_), share = torch::stable::contiguous(share_);
  check(indices, weight, share);
  STD_TORCH_CHECK(
      grad.dim() == 2 && grad.size(0) == indices.size(0) && grad.size(1) == weight.size(1) &&
          grad.scalar_type() == weight.scalar_type() && mask.size() == 2,
      "embedding_bag_backward: grad must be (B, D) in the dtype of weight, mask must hold 2 values");
  const OnDevice guard(weight);
  const int64_t count = indices.numel(), rows = weight.size(0), width = weight.size(1), bag = indices.size(1);
  STD_TORCH_CHECK(count < INT32_MAX && rows < INT32_MAX, "embedding_bag: 2^31 indices or table rows or more");
  const ScalarType sums = weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const std::vector<int64_t> none{0};
  Tensor grad_weight = torch::stable::new_zeros(weight, mask[0] ? weight.sizes() : none);
  Tensor grad_share = torch::stable::new_zeros(share, mask[1] ? share.sizes() : none, sums);
  if (count > 0 && width > 0 && (mask[0] || mask[1])) {
    const cudaStream_t stream = stream_of(weight);
    const Tensor numbers = torch::stable::new_empty(indices, {4, count}, ScalarType::Int);
    int32_t* keys = static_cast<int32_t*>(numbers.mutable_data_ptr());
    int32_t *places = keys + count, *sorted_keys = keys + 2 * count, *sorted_places = keys + 3 * count;
    by_index(indices.scalar_type(), [&](auto index) {
      using I = decltype(index);
      launch(
          &number_kernel<I>,
          blocks_for(count),
          kThreads,
          stream,
          static_cast<const I*>(indices.const_data_ptr()),
          keys,
          places,
          count,
          rows);
    });
    sort_by_key(weight, keys, sorted_keys, places, sorted_places, count, rows, stream);
    by_type(weight.scalar_type(), share.scalar_type(), [&](auto element, auto number) {
      using T = decltype(element);
      using W = decltype(number);
      using A = acc_t<T>;
      constexpr int kFull = 16 / sizeof(T);
      const bool packed = width % kFull == 0 && aligned(weight) && aligned(grad) && (!mask[0] || aligned(grad_weight));
      launch(
          packed ? &backward_kernel<T, W, kFull> : &backward_kernel<T, W, 1>,
          blocks_for(count * 32),
          kThreads,
          stream,
          static_cast<const T*>(grad.const_data_ptr()),
          static_cast<const T*>(weight.const_data_ptr()),
          static_cast<const W*>(share.const_data_ptr()),
          static_cast<const int32_t*>(sorted_keys),
          static_cast<const int32_t*>(sorted_places),
          mask[0] ? static_cast<T*>(grad_weight.mutable_data_ptr()) : static_cast<T*>(nullptr),
          mask[1] ? static_cast<A*>(grad_share.mutable_data_ptr()) : static_cast<A*>(nullptr),
          count,
          bag,
          width);
    });
  }
  return {grad_weight, converted(grad_share, share.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlp_ops, VLP_DEVICE_KEY, m) {
  m.impl("embedding_bag", TORCH_BOX(&embedding_bag));
  m.impl("embedding_bag_backward", TORCH_BOX(&embedding_bag_backward));
}

}  // namespace vlp
