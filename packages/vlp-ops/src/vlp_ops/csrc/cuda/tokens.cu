// Keeping tokens and putting them back on CUDA. Definitions: vlp_ops/tokens.py.
//
// Both directions are copies of whole rows, 16 bytes at a time, and each row of a result is written exactly once: no cleared buffer, no index
// tensor of the size of the data, no atomic addition. PyTorch's index_select copies as well, but needs the ids turned into row numbers first,
// four small kernels before one that takes a few microseconds itself.
#include "common.cuh"

#include <type_traits>

namespace vlp {
namespace {

// The kernels ask for four blocks on a multiprocessor: without that number the compiler aims higher and some spill.
struct Rows {
  int64_t batch, count, width;  // of the result
  int64_t there;                // rows of a sample in what is read
};

// out[n, i] = source[n, ids[n, i]], or `other` where the id is not below `there`. A group of lanes copies a row.
template <typename T, typename I, int kPack>
__global__ void __launch_bounds__(kThreads, 4) copy_kernel(Rows p, const T* source, const I* ids, const T* other, T* out, int lanes) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
  if (row >= p.batch * p.count) return;
  const int64_t id = ids[row];
  using Unit = Pack<T, kPack>;
  if (id < 0 || (other == nullptr && id >= p.there)) {
    // A token that is not there gives NaN: nothing is read outside, and nothing goes on in silence. VLP_OPS_VALIDATE=1 names it.
    for (int64_t channel = threadIdx.x % lanes; channel < p.width; channel += lanes)
      out[row * p.width + channel] = static_cast<T>(not_a_number<acc_t<T>>());
    return;
  }
  const T* from = id < p.there ? source + (row / p.count * p.there + id) * p.width : other;
  for (int64_t channel = static_cast<int64_t>(threadIdx.x % lanes) * kPack; channel < p.width; channel += static_cast<int64_t>(lanes) * kPack)
    *reinterpret_cast<Unit*>(out + row * p.width + channel) = *reinterpret_cast<const Unit*>(from + channel);
}

// out[n, i] = sum of grad[n, k] over all k with ids[n, k] = i, in the order of k. A warp has a row of the result.
template <typename T, typename I, int kPack>
__global__ void __launch_bounds__(kThreads, 4) collect_kernel(Rows p, const T* grad, const I* ids, T* out) {
  using A = acc_t<T>;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (row >= p.batch * p.count) return;
  const int lane = threadIdx.x % 32;
  const int64_t sample = row / p.count, own = row - sample * p.count;
  for (int64_t start = 0; start < p.width; start += 32 * kPack) {
    const int64_t channel = start + lane * kPack;
    A sum[kPack] = {};
    for (int64_t k = 0; k < p.there; k += 32) {
      unsigned found = __ballot_sync(kAllLanes, k + lane < p.there && ids[sample * p.there + k + lane] == own);
      for (int place = 0; found != 0; ++place, found >>= 1) {
        if ((found & 1) == 0 || channel >= p.width) continue;
        A item[kPack];
        load_pack<kPack>(grad + (sample * p.there + k + place) * p.width + channel, item);
#pragma unroll
        for (int c = 0; c < kPack; ++c) sum[c] += item[c];
      }
    }
    if (channel < p.width) store_pack<kPack>(out + row * p.width + channel, sum);
  }
}

// Sums over a share of all rows whose id is not below `kept`: out (shares, width). A thread has its channels.
template <typename T, typename I, int kPack>
__global__ void __launch_bounds__(kThreads, 4) removed_kernel(
    const T* grad, const I* ids, acc_t<T>* out, int64_t rows, int64_t width, int64_t kept, int64_t share) {
  using A = acc_t<T>;
  const int64_t blocks = (width + static_cast<int64_t>(kThreads) * kPack - 1) / (static_cast<int64_t>(kThreads) * kPack);
  const int64_t part = blockIdx.x / blocks, channel = ((blockIdx.x - part * blocks) * kThreads + threadIdx.x) * kPack;
  if (channel >= width) return;
  const int64_t last = (part + 1) * share < rows ? (part + 1) * share : rows;
  A sum[kPack] = {};
  for (int64_t row = part * share; row < last; ++row) {
    if (ids[row] < kept) continue;
    A item[kPack];
    load_pack<kPack>(grad + row * width + channel, item);
#pragma unroll
    for (int c = 0; c < kPack; ++c) sum[c] += item[c];
  }
#pragma unroll
  for (int c = 0; c < kPack; ++c) out[part * width + channel + c] = sum[c];
}

// ---- host ----------------------------------------------------------------------------------------------------------

// Calls action(element, index, pack): a zero of each type and a number known at compile time.
template <typename Action>
void by_types(const char* op, const Tensor& tokens, const Tensor& ids, bool same_place, Action action) {
  STD_TORCH_CHECK(
      tokens.dim() == 3 && ids.dim() == 2 && tokens.size(0) == ids.size(0), op, ": tokens (N, L, D) and ids (N, K) are wanted");
  const bool wide = ids.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || ids.scalar_type() == ScalarType::Int, op, ": ids must be int64 or int32");
  by_element(op, tokens.scalar_type(), [&](auto element) {
    constexpr int kFull = 16 / sizeof(element);
    const auto with_index = [&](auto pack) { wide ? action(element, int64_t{}, pack) : action(element, int32_t{}, pack); };
    if (same_place && tokens.size(2) % kFull == 0 && aligned(tokens))
      with_index(std::integral_constant<int, kFull>{});
    else
      with_index(std::integral_constant<int, 1>{});
  });
}

Tensor copied(const char* op, const Tensor& source_, const Tensor& ids_, const Tensor* other) {
  const Tensor source = torch::stable::contiguous(source_), ids = torch::stable::contiguous(ids_);
  STD_TORCH_CHECK(source.dim() == 3 && ids.dim() == 2, op, ": tokens (N, L, D) and ids (N, K) are wanted");
  const OnDevice guard(source);
  const Rows p{ids.size(0), ids.size(1), source.size(2), source.size(1)};
  Tensor out = torch::stable::new_empty(source, {p.batch, p.count, p.width});
  if (out.numel() == 0) return out;
  by_types(op, source, ids, aligned(out) && (other == nullptr || aligned(*other)), [&](auto element, auto index, auto pack) {
    using T = decltype(element);
    using I = decltype(index);
    constexpr int kPack = decltype(pack)::value;
    const int lanes = lanes_for(p.width, kPack);
    launch(
        &copy_kernel<T, I, kPack>,
        blocks_for(p.batch * p.count * lanes),
        kThreads,
        stream_of(source),
        p,
        static_cast<const T*>(source.const_data_ptr()),
        static_cast<const I*>(ids.const_data_ptr()),
        other ? static_cast<const T*>(other->const_data_ptr()) : static_cast<const T*>(nullptr),
        static_cast<T*>(out.mutable_data_ptr()),
        lanes);
  });
  return out;
}

// grad and ids are contiguous.
Tensor collected(const char* op, const Tensor& grad, const Tensor& ids, int64_t count) {
  const Rows p{grad.size(0), count, grad.size(2), grad.size(1)};
  Tensor out = torch::stable::new_empty(grad, {p.batch, p.count, p.width});
  if (out.numel() == 0) return out;
  by_types(op, grad, ids, aligned(out), [&](auto element, auto index, auto pack) {
    using T = decltype(element);
    using I = decltype(index);
    launch(
        &collect_kernel<T, I, decltype(pack)::value>,
        blocks_for(p.batch * p.count * 32),
        kThreads,
        stream_of(grad),
        p,
        static_cast<const T*>(grad.const_data_ptr()),
        static_cast<const I*>(ids.const_data_ptr()),
        static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

void check_gradient(const char* op, const Tensor& grad, const Tensor& ids) {
  STD_TORCH_CHECK(
      grad.dim() == 3 && ids.dim() == 2 && grad.size(0) == ids.size(0) && grad.size(1) == ids.size(1),
      op, ": grad (N, K, D) and ids (N, K) are wanted");
}

Tensor take_tokens(const Tensor& x, const Tensor& ids) { return copied("take_tokens", x, ids, nullptr); }

Tensor take_tokens_backward(const Tensor& grad_, const Tensor& ids_, int64_t length) {
  const Tensor grad = torch::stable::contiguous(grad_), ids = torch::stable::contiguous(ids_);
  check_gradient("take_tokens_backward", grad, ids);
  const OnDevice guard(grad);
  return collected("take_tokens_backward", grad, ids, length);
}

Tensor restore_tokens(const Tensor& kept, const Tensor& ids, const Tensor& mask_token_) {
  const Tensor mask_token = torch::stable::contiguous(mask_token_);
  STD_TORCH_CHECK(
      kept.dim() == 3 && mask_token.numel() == kept.size(2) && mask_token.scalar_type() == kept.scalar_type(),
      "restore_tokens: kept (N, K, D) and mask_token (D) of one dtype are wanted");
  return copied("restore_tokens", kept, ids, &mask_token);
}

std::tuple<Tensor, Tensor> restore_tokens_backward(const Tensor& grad_, const Tensor& ids_, int64_t kept) {
  const Tensor grad = torch::stable::contiguous(grad_), ids = torch::stable::contiguous(ids_);
  check_gradient("restore_tokens_backward", grad, ids);
  const OnDevice guard(grad);
  const Tensor grad_kept = collected("restore_tokens_backward", grad, ids, kept);
  const int64_t rows = ids.numel(), width = grad.size(2), share = 64, shares = (rows + share - 1) / share;
  const ScalarType sums = grad.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor parts = torch::stable::new_empty(grad, {shares, width}, sums);
  if (parts.numel() > 0)
    by_types("restore_tokens_backward", grad, ids, true, [&](auto element, auto index, auto pack) {
      using T = decltype(element);
      using I = decltype(index);
      constexpr int kPack = decltype(pack)::value;
      launch(
          &removed_kernel<T, I, kPack>,
          shares * blocks_for((width + kPack - 1) / kPack),
          kThreads,
          stream_of(grad),
          static_cast<const T*>(grad.const_data_ptr()),
          static_cast<const I*>(ids.const_data_ptr()),
          static_cast<acc_t<T>*>(parts.mutable_data_ptr()),
          rows,
          width,
          kept,
          share);
    });
  const std::vector<int64_t> first{0};
  return {grad_kept, converted(torch::stable::sum(parts, first), grad.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlp_ops, VLP_DEVICE_KEY, m) {
  m.impl("take_tokens", TORCH_BOX(&take_tokens));
  m.impl("take_tokens_backward", TORCH_BOX(&take_tokens_backward));
  m.impl("restore_tokens", TORCH_BOX(&restore_tokens));
  m.impl("restore_tokens_backward", TORCH_BOX(&restore_tokens_backward));
}

}  // namespace vlp
