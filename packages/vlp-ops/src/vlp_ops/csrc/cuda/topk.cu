// Product-key top-k on CUDA. Definition: vlp_ops/reference.py; source: arXiv 1907.05242, section 3.2.
//
// A warp per row of scores. It walks along the row and puts whatever beats its k-th best so far into a buffer; a full buffer is sorted into the
// best ones. In unsorted data that happens about log(n / k) times. The sums of the two halves go the same way, without those that cannot be
// among the k best. The gradient has a warp per row, too, and adds the uses of one key in order: nothing is atomic.
#include "common.cuh"

#include <algorithm>
#include <limits>

namespace vlp {
namespace {

// k up to here keeps its entries in shared memory: 4 warps with 4 times 128 entries of 16 bytes are 32 KB.
constexpr int kSharedLimit = 128;
// Beyond it they are in device memory, of which the rows in flight share about this much.
constexpr int64_t kWorkspaceBytes = int64_t{64} << 20;

template <typename A>
struct alignas(16) Entry {
  A score;
  int64_t index;
};

// Better first: NaN before everything (as torch.topk has it), then larger scores, then smaller indices. Indices differ, so this is an order.
template <typename A>
__device__ __forceinline__ bool better(const Entry<A>& a, const Entry<A>& b) {
  const bool nan_a = a.score != a.score, nan_b = b.score != b.score;
  if (nan_a || nan_b) return nan_a && (!nan_b || a.index < b.index);
  return a.score != b.score ? a.score > b.score : a.index < b.index;
}

// Worse than every entry of a row.
template <typename A>
__device__ __forceinline__ Entry<A> nothing() {
  return {-std::numeric_limits<A>::infinity(), std::numeric_limits<int64_t>::max()};
}

// entries[0, size) are in order, best first; entries[size, 2 size) are not. Puts the best of all into the first half and empties the second.
// A bitonic sort: its number of steps does not depend on the data. Until the last stage only the second half takes part.
template <typename A>
__device__ __forceinline__ void merge(Entry<A>* entries, int size, int lane) {
  __syncwarp();
  for (int width = 2; width <= 2 * size; width *= 2) {
    for (int distance = width / 2; distance > 0; distance /= 2) {
      for (int pair = (width <= size ? size / 2 : 0) + lane; pair < size; pair += 32) {
        const int low = 2 * pair - (pair & (distance - 1)), high = low + distance;
        const Entry<A> a = entries[low], b = entries[high];
        if (better(b, a) == ((low & width) == 0)) {
          entries[low] = b;
          entries[high] = a;
        }
      }
      __syncwarp();
    }
  }
  for (int i = size + lane; i < 2 * size; i += 32) entries[i] = nothing<A>();
  __syncwarp();
}

// The k best of what a warp has been given; all lanes hold the same numbers. size: a power of two, at least 32 and at least k.
template <typename A>
struct Best {
  Entry<A>* entries;
  int size, k, lane, filled;
  Entry<A> least;

  __device__ __forceinline__ void start() {
    for (int i = lane; i < 2 * size; i += 32) entries[i] = nothing<A>();
    __syncwarp();
    filled = 0;
    least = nothing<A>();
  }

  __device__ __forceinline__ void add(const Entry<A>& entry, bool present) {
    const bool keep = present && better(entry, least);
    const unsigned votes = __ballot_sync(kAllLanes, keep);
    if (votes == 0) return;
    if (filled + __popc(votes) > size) finish();
    if (keep) entries[size + filled + __popc(votes & ((1u << lane) - 1))] = entry;
    filled += __popc(votes);
  }

  __device__ __forceinline__ void finish() {
    merge(entries, size, lane);
    filled = 0;
    least = entries[k - 1];
  }
};

template <int kPack, typename T>
__device__ __forceinline__ void best_of_row(Best<acc_t<T>>& best, const T* scores, int64_t n, Entry<acc_t<T>>* found) {
  best.start();
  for (int64_t start = 0; start < n; start += 32 * kPack) {
    const int64_t i = start + best.lane * kPack;
    bool any = false;
    if (i < n) {
      acc_t<T> item[kPack];
      load_pack<kPack>(scores + i, item);
      // NaN is not smaller.
#pragma unroll
      for (int c = 0; c < kPack; ++c) any = any || !(item[c] < best.least.score);
    }
    if (__ballot_sync(kAllLanes, any) == 0) continue;
    // Read again, from the cache: numbers that a loop selects from registers would have to lie in memory, too.
#pragma unroll 1
    for (int c = 0; c < kPack; ++c) best.add({i < n ? load(scores[i + c]) : acc_t<T>(0), i + c}, i < n);
  }
  best.finish();
  for (int i = best.lane; i < best.k; i += 32) found[i] = best.entries[i];
  __syncwarp();
}

// Four blocks on a multiprocessor, as in deformable.cu: without the second number the compiler aims higher and spills.
template <typename T, int kPack, bool kShared>
__global__ void __launch_bounds__(kThreads, 4) topk_kernel(
    const T* scores1,
    const T* scores2,
    T* scores,
    int64_t* indices,
    Entry<acc_t<T>>* workspace,
    int64_t rows,
    int64_t n1,
    int64_t n2,
    int k,
    int size) {
  using A = acc_t<T>;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * blockDim.x / 32;
  const int lane = threadIdx.x % 32;
  Entry<A>* entries = workspace + warp * 4 * size;
  if constexpr (kShared) {
    VLP_DYNAMIC_SHARED(bytes);
    entries = reinterpret_cast<Entry<A>*>(bytes) + static_cast<int64_t>(threadIdx.x / 32) * 4 * size;
  }
  Entry<A> *first = entries + 2 * size, *second = entries + 3 * size;
  Best<A> best{entries, size, k, lane, 0, nothing<A>()};
  for (int64_t row = warp; row < rows; row += warps) {
#pragma unroll 1
    for (int half = 0; half < 2; ++half)
      best_of_row<kPack>(best, half == 0 ? scores1 + row * n1 : scores2 + row * n2, half == 0 ? n1 : n2, half == 0 ? first : second);
    best.start();
    // Ranks (u, v): the (u+1)(v+1) pairs up to it are at least as good, so beyond k it cannot be chosen.
    for (int u = 0; u < k; ++u) {
      const Entry<A> left = first[u];
      for (int start = 0; start < k / (u + 1); start += 32) {
        const int v = start + lane;
        const bool present = v < k / (u + 1);
        const Entry<A> right = second[present ? v : 0];
        best.add({left.score + right.score, left.index * n2 + right.index}, present);
      }
    }
    best.finish();
    for (int i = lane; i < k; i += 32) {
      scores[row * k + i] = static_cast<T>(entries[i].score);
      indices[row * k + i] = entries[i].index;
    }
    __syncwarp();
  }
}

// The gradients are zero already. Of the uses of one key the first adds up all of them.
template <typename T>
__global__ void __launch_bounds__(kThreads) topk_backward_kernel(
    const T* grad, const int64_t* indices, T* grad1, T* grad2, int64_t rows, int64_t n1, int64_t n2, int k) {
  using A = acc_t<T>;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  const T* upstream = grad + row * k;
  const int64_t* slots = indices + row * k;
  for (int start = 0; start < k; start += 32) {
    const int own = start + lane;
    const int64_t slot = own < k ? slots[own] : -1;
    // The slots are those of the forward pass; one that is not there, of a caller of the bare operator, has no gradient.
    const bool there = slot >= 0 && slot < n1 * n2;
    const int64_t i = there ? slot / n2 : -1, j = there ? slot - i * n2 : -1;
    A sum1 = 0, sum2 = 0;
    bool first1 = there, first2 = there;
    for (int other = 0; other < k; other += 32) {
      const int mine = other + lane;
      const int64_t slot_there = mine < k ? slots[mine] : -1;
      const A grad_there = mine < k ? load(upstream[mine]) : A(0);
      const bool is_slot = slot_there >= 0 && slot_there < n1 * n2;
      const int64_t i_there = is_slot ? slot_there / n2 : -1, j_there = is_slot ? slot_there - i_there * n2 : -1;
      for (int s = 0; s < 32 && other + s < k; ++s) {
        const bool same1 = __shfl_sync(kAllLanes, i_there, s) == i, same2 = __shfl_sync(kAllLanes, j_there, s) == j;
        const A value = __shfl_sync(kAllLanes, grad_there, s);
        if (same1) sum1 += value;
        if (same2) sum2 += value;
        if (other + s < own) {
          first1 = first1 && !same1;
          first2 = first2 && !same2;
        }
      }
    }
    if (first1) grad1[row * n1 + i] = static_cast<T>(sum1);
    if (first2) grad2[row * n2 + j] = static_cast<T>(sum2);
  }
}

// ---- host ----------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> product_key_topk(const Tensor& scores1_, const Tensor& scores2_, int64_t k) {
  const Tensor scores1 = torch::stable::contiguous(scores1_), scores2 = torch::stable::contiguous(scores2_);
  STD_TORCH_CHECK(
      scores1.dim() == 2 && scores2.dim() == 2 && scores1.size(0) == scores2.size(0) &&
          scores1.scalar_type() == scores2.scalar_type(),
      "product_key_topk: scores1 (R, n) and scores2 (R, n) of one dtype are wanted");
  const int64_t rows = scores1.size(0), n1 = scores1.size(1), n2 = scores2.size(1);
  STD_TORCH_CHECK(n1 < INT32_MAX && n2 < INT32_MAX, "product_key_topk: 2^31 keys per half or more");
  STD_TORCH_CHECK(
      k >= 1 && k <= n1 && k <= n2, "product_key_topk: k=", k, " exceeds the number of keys per half (", std::min(n1, n2), ")");
  STD_TORCH_CHECK(k <= 1 << 20, "product_key_topk: k=", k, " is more than 2^20 on CUDA");
  const OnDevice guard(scores1);
  Tensor scores = torch::stable::new_empty(scores1, {rows, k});
  Tensor indices = torch::stable::new_empty(scores1, {rows, k}, ScalarType::Long);
  if (rows == 0) return {scores, indices};
  const cudaStream_t stream = stream_of(scores1);
  int size = 32;
  while (size < k) size *= 2;
  by_element("product_key_topk", scores1.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using E = Entry<acc_t<T>>;
    constexpr int kFull = 16 / sizeof(T), kWarps = kThreads / 32;
    const bool packed = n1 % kFull == 0 && n2 % kFull == 0 && aligned(scores1) && aligned(scores2);
    const bool in_shared = size <= kSharedLimit;
    const int64_t bytes = int64_t{4} * kWarps * size * sizeof(E);
    int64_t blocks = blocks_for(rows * 32);
    if (!in_shared) blocks = std::min(blocks, std::max<int64_t>(1, kWorkspaceBytes / bytes));
    const Tensor workspace = torch::stable::new_empty(scores1, {in_shared ? 0 : blocks * bytes}, ScalarType::Byte);
    launch_with(
        !in_shared     ? &topk_kernel<T, 1, false>
            : packed ? &topk_kernel<T, kFull, true>
                     : &topk_kernel<T, 1, true>,
        blocks,
        kThreads,
        in_shared ? bytes : 0,
        stream,
        static_cast<const T*>(scores1.const_data_ptr()),
        static_cast<const T*>(scores2.const_data_ptr()),
        static_cast<T*>(scores.mutable_data_ptr()),
        static_cast<int64_t*>(indices.mutable_data_ptr()),
        static_cast<E*>(workspace.mutable_data_ptr()),
        rows,
        n1,
        n2,
        static_cast<int>(k),
        size);
  });
  return {scores, indices};
}

std::tuple<Tensor, Tensor> product_key_topk_backward(const Tensor& grad_, const Tensor& indices_, int64_t n1, int64_t n2) {
  const Tensor grad = torch::stable::contiguous(grad_), indices = torch::stable::contiguous(indices_);
  STD_TORCH_CHECK(
      grad.dim() == 2 && indices.dim() == 2 && grad.size(0) == indices.size(0) && grad.size(1) == indices.size(1) &&
          indices.scalar_type() == ScalarType::Long,
      "product_key_topk_backward: grad (R, k) and int64 indices (R, k) are wanted");
  const int64_t rows = grad.size(0), k = grad.size(1);
  STD_TORCH_CHECK(n1 < INT32_MAX && n2 < INT32_MAX && k <= 1 << 20, "product_key_topk: 2^31 keys per half or more");
  const OnDevice guard(grad);
  Tensor grad1 = torch::stable::new_zeros(grad, {rows, n1}), grad2 = torch::stable::new_zeros(grad, {rows, n2});
  if (grad.numel() == 0) return {grad1, grad2};
  by_element("product_key_topk_backward", grad.scalar_type(), [&](auto element) {
    using T = decltype(element);
    launch(
        &topk_backward_kernel<T>,
        blocks_for(rows * 32),
        kThreads,
        stream_of(grad),
        static_cast<const T*>(grad.const_data_ptr()),
        static_cast<const int64_t*>(indices.const_data_ptr()),
        static_cast<T*>(grad1.mutable_data_ptr()),
        static_cast<T*>(grad2.mutable_data_ptr()),
        rows,
        n1,
        n2,
        static_cast<int>(k));
  });
  return {grad1, grad2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlp_ops, VLP_DEVICE_KEY, m) {
  m.impl("product_key_topk", TORCH_BOX(&product_key_topk));
  m.impl("product_key_topk_backward", TORCH_BOX(&product_key_topk_backward));
}

}  // namespace vlp
