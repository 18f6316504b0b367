// The weighted embedding bag on CUDA. Definition: vlp_ops/reference.py.
//
// Forward: a warp per bag and slice of channels. Backward: the uses of the table are sorted by row (a stable sort, so their order and with it
// every sum is the same in each run) and dealt in chunks; a warp adds up the uses in its chunk, row after row, and makes the gradient of the
// weights from the same reads. A row that goes on beyond a chunk leaves a part for each, which a second kernel adds in order: a popular row
// is the work of many warps.
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
__device__ __forceinline__ bool is_row(I index, int64_t rows) {
  return index >= 0 && index < rows;
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
    const I row = indices[b * bag + j];
    // A row that is not there gives NaN: nothing is read outside, and nothing goes on in silence. VLP_OPS_VALIDATE=1 names it.
    const bool there = is_row(row, rows);
    const A factor = there ? load(share[b * bag + j]) : not_a_number<A>();
    A item[kPack] = {};
    if (there) load_pack<kPack>(weight + row * width + channel, item);
#pragma unroll
    for (int c = 0; c < kPack; ++c) sum[c] += factor * item[c];
  }
  store_pack<kPack>(out + b * width + channel, sum);
}

template <typename I>
__global__ void __launch_bounds__(kThreads) number_kernel(const I* indices, int32_t* keys, int32_t* places, int64_t count, int64_t rows) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  // What is no row comes last in the order and is passed over.
  keys[i] = is_row(indices[i], rows) ? static_cast<int32_t>(indices[i]) : static_cast<int32_t>(rows);
  places[i] = static_cast<int32_t>(i);
}

struct Uses {
  const int32_t *keys, *places;  // sorted by key
  int64_t count, bag, rows, width, chunk;
};

// A warp for each chunk of sorted uses. The part of a row that began in an earlier chunk goes to carried[chunk][0], that of one that begins
// here and goes on to carried[chunk][1]; a row that lies in the chunk as a whole is done.
template <typename T, typename W, int kPack>
__global__ void __launch_bounds__(kThreads, 4) backward_kernel(
    Uses uses, const T* grad, const T* weight, const W* share, T* grad_weight, acc_t<T>* grad_share, acc_t<T>* carried) {
  using A = acc_t<T>;
  const int64_t chunk = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int64_t begin = chunk * uses.chunk;
  const int lane = threadIdx.x % 32;
  // The same for all lanes of a warp, so none is missing below.
  if (begin >= uses.count) return;
  const int64_t end = begin + uses.chunk < uses.count ? begin + uses.chunk : uses.count;
  for (int64_t start = 0; start < uses.width; start += 32 * kPack) {
    const int64_t channel = start + lane * kPack;
    const bool inside = channel < uses.width;
    A own[kPack] = {}, sum[kPack] = {};
    int64_t row = -1;
    for (int64_t i = begin; i < end; ++i) {
      if (uses.keys[i] != row) {
        row = uses.keys[i];
        if (row >= uses.rows) break;
#pragma unroll
        for (int c = 0; c < kPack; ++c) sum[c] = own[c] = 0;
        if (inside && grad_share != nullptr) load_pack<kPack>(weight + row * uses.width + channel, own);
      }
      const int64_t place = uses.places[i];
      const A factor = load(share[place]);
      A upstream[kPack] = {};
      if (inside) load_pack<kPack>(grad + place / uses.bag * uses.width + channel, upstream);
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
      const bool last = i + 1 == end || uses.keys[i + 1] != row;
      if (!last || !inside || grad_weight == nullptr) continue;
      const bool from_before = begin > 0 && uses.keys[begin - 1] == row, goes_on = end < uses.count && uses.keys[end] == row;
      if (!from_before && !goes_on) {
        store_pack<kPack>(grad_weight + row * uses.width + channel, sum);
        continue;
      }
      A* target = carried + (2 * chunk + (from_before ? 0 : 1)) * uses.width + channel;
#pragma unroll
      for (int c = 0; c < kPack; ++c) target[c] = sum[c];
    }
  }
}

// A warp for each chunk in which a row begins that goes on: adds the parts of the row in the order of the chunks.
template <typename T, int kPack>
__global__ void __launch_bounds__(kThreads, 4) carried_kernel(Uses uses, const acc_t<T>* carried, T* grad_weight) {
  using A = acc_t<T>;
  const int64_t chunk = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int64_t begin = chunk * uses.chunk, end = begin + uses.chunk;
  if (end >= uses.count) return;
  const int64_t row = uses.keys[end];
  if (row >= uses.rows || uses.keys[end - 1] != row || (begin > 0 && uses.keys[begin - 1] == row)) return;
  for (int64_t channel = static_cast<int64_t>(threadIdx.x % 32) * kPack; channel < uses.width; channel += 32 * kPack) {
    A sum[kPack];
    const A* own = carried + (2 * chunk + 1) * uses.width + channel;
#pragma unroll
    for (int c = 0; c < kPack; ++c) sum[c] = own[c];
    for (int64_t next = chunk + 1; next * uses.chunk < uses.count && uses.keys[next * uses.chunk] == row; ++next) {
      const A* part = carried + 2 * next * uses.width + channel;
#pragma unroll
      for (int c = 0; c < kPack; ++c) sum[c] += part[c];
    }
    store_pack<kPack>(grad_weight + row * uses.width + channel, sum);
  }
}

// At least this many uses for a warp, and at most this many chunks: their parts take 2 * kChunks * width numbers.
constexpr int64_t kChunk = 32, kChunks = 8192;

int64_t chunk_for(int64_t count) {
  int64_t chunk = kChunk;
  while (chunk * kChunks < count) chunk *= 2;
  return chunk;
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
  while (bits < 31 && (int64_t{1} << bits) <= rows) ++bits;
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
      const Uses uses{sorted_keys, sorted_places, count, bag, rows, width, chunk_for(count)};
      const int64_t chunks = (count + uses.chunk - 1) / uses.chunk;
      const Tensor carried = torch::stable::new_empty(weight, {mask[0] ? 2 * chunks * width : 0}, sums);
      T* target = mask[0] ? static_cast<T*>(grad_weight.mutable_data_ptr()) : nullptr;
      launch(
          packed ? &backward_kernel<T, W, kFull> : &backward_kernel<T, W, 1>,
          blocks_for(chunks * 32),
          kThreads,
          stream,
          uses,
          static_cast<const T*>(grad.const_data_ptr()),
          static_cast<const T*>(weight.const_data_ptr()),
          static_cast<const W*>(share.const_data_ptr()),
          target,
          mask[1] ? static_cast<A*>(grad_share.mutable_data_ptr()) : static_cast<A*>(nullptr),
          static_cast<A*>(carried.mutable_data_ptr()));
      if (mask[0])
        launch(
            packed ? &carried_kernel<T, kFull> : &carried_kernel<T, 1>,
            blocks_for(chunks * 32),
            kThreads,
            stream,
            uses,
            static_cast<const A*>(carried.const_data_ptr()),
            target);
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
