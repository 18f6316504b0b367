// Product-key top-k and the gradient of the weighted embedding bag on the CPU. Definitions: vlp_ops/reference.py.
// The forward of the bag is PyTorch's own (its generated kernels prefetch and cannot be beaten by much).
#include "common.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <memory>

namespace vlp {
namespace {

// ---- top-k ---------------------------------------------------------------------------------------------------------

template <typename A>
struct Candidate {
  A score;
  int64_t index;
};

// Better first: NaN before everything (as torch.topk has it), then larger scores, then smaller indices.
template <typename A>
VLP_INLINE bool better(const Candidate<A>& a, const Candidate<A>& b) {
  const bool nan_a = a.score != a.score, nan_b = b.score != b.score;
  if (nan_a || nan_b) return nan_a && (!nan_b || a.index < b.index);
  return a.score != b.score ? a.score > b.score : a.index < b.index;
}

template <typename A>
struct Better {
  bool operator()(const Candidate<A>& a, const Candidate<A>& b) const { return better(a, b); }
};

// As keep_best for at most kFew: each counts the scores above its own, without a branch. False, and nothing done, when two are equal or one is NaN.
constexpr int kFew = 16;
template <int kCount, typename A>
VLP_INLINE bool keep_best_of_few(std::vector<Candidate<A>>& found, int64_t k) {
  const int count = static_cast<int>(found.size());
  A score[kCount];
  int32_t above[kCount] = {};
  Candidate<A> before[kCount];
  for (int i = 0; i < kCount; ++i) score[i] = i < count ? found[i].score : -std::numeric_limits<A>::infinity();
  for (int j = 0; j < kCount; ++j)
    for (int i = 0; i < kCount; ++i) above[i] += score[j] > score[i] ? 1 : 0;
  int total = 0;
  for (int i = 0; i < count; ++i) {
    total += above[i];
    before[i] = found[i];
  }
  if (total != count * (count - 1) / 2) return false;
  for (int i = 0; i < count; ++i) found[above[i]] = before[i];
  if (count > k) found.resize(k);
  return true;
}

// Leaves the k best in `found`, best first.
template <typename A>
VLP_INLINE void keep_best(std::vector<Candidate<A>>& found, int64_t k) {
  const int64_t count = static_cast<int64_t>(found.size());
  if (count <= kFew / 2 ? keep_best_of_few<kFew / 2>(found, k) : count <= kFew && keep_best_of_few<kFew>(found, k)) return;
  if (static_cast<int64_t>(found.size()) > k) {
    std::nth_element(found.begin(), found.begin() + k, found.end(), Better<A>());
    found.resize(k);
  }
  std::sort(found.begin(), found.end(), Better<A>());
}

// The k best of one row in `found`, best first. The row is dealt to `columns` >= 2k columns like cards; the k-th largest of the column maxima is
// reached by at least k scores, so only scores that reach it are candidates, a few more than k of them in ordinary data.
template <typename T>
VLP_INLINE void best_of_row(
    const T* scores,
    int64_t n,
    int64_t k,
    std::vector<acc_t<T>>& maxima,
    std::vector<acc_t<T>>& ordered,
    std::vector<int32_t>& places,
    std::vector<Candidate<acc_t<T>>>& found) {
  using A = acc_t<T>;
  found.clear();
  const int64_t columns = std::max<int64_t>(64, 2 * k);
  if (n < 4 * columns) {
    for (int64_t i = 0; i < n; ++i) found.push_back({load(scores[i]), i});
    return keep_best(found, k);
  }
  maxima.assign(columns, -std::numeric_limits<A>::infinity());
  A* VLP_RESTRICT largest = maxima.data();
  int64_t i = 0;
  for (; i + columns <= n; i += columns)
    for (int64_t c = 0; c < columns; ++c) {
      const A score = load(scores[i + c]);
      largest[c] = score > largest[c] ? score : largest[c];
    }
  ordered = maxima;
  std::nth_element(ordered.begin(), ordered.begin() + (k - 1), ordered.end(), std::greater<A>());
  const A reached = ordered[k - 1];
  places.resize(n);
  int64_t count = 0;
  for (i = 0; i < n; ++i) {
    places[count] = static_cast<int32_t>(i);
    // NaN is not smaller: it stays.
    count += load(scores[i]) < reached ? 0 : 1;
  }
  for (i = 0; i < count; ++i) found.push_back({load(scores[places[i]]), places[i]});
  keep_best(found, k);
}

struct TopK {
  const void *scores1, *scores2;
  void* scores;
  int64_t* indices;
  int64_t n1, n2, k;
};

template <typename T>
VLP_INLINE void topk_rows(const TopK& t, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  std::vector<Candidate<A>> first, second, sums;
  std::vector<A> maxima, ordered;
  std::vector<int32_t> places;
  for (int64_t row = begin; row < end; ++row) {
    best_of_row(static_cast<const T*>(t.scores1) + row * t.n1, t.n1, t.k, maxima, ordered, places, first);
    best_of_row(static_cast<const T*>(t.scores2) + row * t.n2, t.n2, t.k, maxima, ordered, places, second);
    // Ranks (u, v): the (u+1)(v+1) pairs up to it are at least as good, so beyond k it cannot be chosen.
    sums.clear();
    for (int64_t u = 0; u < t.k; ++u)
      for (int64_t v = 0; v < t.k / (u + 1); ++v)
        sums.push_back({first[u].score + second[v].score, first[u].index * t.n2 + second[v].index});
    keep_best(sums, t.k);
    T* scores = static_cast<T*>(t.scores) + row * t.k;
    for (int64_t i = 0; i < t.k; ++i) {
      store(scores + i, sums[i].score);
      t.indices[row * t.k + i] = sums[i].index;
    }
  }
}

VLP_CLONES void topk_f32(const TopK& t, int64_t begin, int64_t end) { topk_rows<float>(t, begin, end); }
VLP_CLONES void topk_f64(const TopK& t, int64_t begin, int64_t end) { topk_rows<double>(t, begin, end); }
VLP_CLONES void topk_f16(const TopK& t, int64_t begin, int64_t end) { topk_rows<Half>(t, begin, end); }
VLP_CLONES void topk_bf16(const TopK& t, int64_t begin, int64_t end) { topk_rows<BFloat16>(t, begin, end); }

std::tuple<Tensor, Tensor> product_key_topk(const Tensor& scores1_, const Tensor& scores2_, int64_t k) {
  const Tensor scores1 = torch::stable::contiguous(scores1_), scores2 = torch::stable::contiguous(scores2_);
  STD_TORCH_CHECK(
      scores1.dim() == 2 && scores2.dim() == 2 && scores1.size(0) == scores2.size(0) &&
          scores1.scalar_type() == scores2.scalar_type(),
      "product_key_topk: scores1 (R, n) and scores2 (R, n) of one dtype are wanted");
  STD_TORCH_CHECK(
      scores1.size(1) < INT32_MAX && scores2.size(1) < INT32_MAX, "product_key_topk: 2^31 keys per half or more");
  const int64_t rows = scores1.size(0), n1 = scores1.size(1), n2 = scores2.size(1);
  STD_TORCH_CHECK(
      k >= 1 && k <= n1 && k <= n2, "product_key_topk: k=", k, " exceeds the number of keys per half (", std::min(n1, n2), ")");
  Tensor scores = torch::stable::new_empty(scores1, {rows, k});
  Tensor indices = torch::stable::new_empty(scores1, {rows, k}, ScalarType::Long);
  const TopK t{
      scores1.const_data_ptr(), scores2.const_data_ptr(), scores.mutable_data_ptr(), mutable_data<int64_t>(indices), n1, n2, k};
  decltype(&topk_f32) kernel = nullptr;
  switch (scores1.scalar_type()) {
    case ScalarType::Float: kernel = topk_f32; break;
    case ScalarType::Double: kernel = topk_f64; break;
    case ScalarType::Half: kernel = topk_f16; break;
    case ScalarType::BFloat16: kernel = topk_bf16; break;
    default: STD_TORCH_CHECK(false, "product_key_topk: unsupported dtype");
  }
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) { kernel(t, begin, end); });
  return {scores, indices};
}

// ---- gradient of the bag -------------------------------------------------------------------------------------------

// One use of a table row: b * bag + j, b, and the weight there. The weight is kept here because the places of a row are anywhere in the tensor.
template <typename A>
struct Use {
  int32_t place, bag;
  A share;
};

struct Bag {
  const void *grad, *weight;
  void *grad_weight, *grad_share;  // null: not wanted; grad_share in the accumulation type
  const void* uses;                // grouped by table row, ascending inside a row
  const int64_t* first;            // K+1: where the uses of a row begin
  int64_t width;
};

template <typename T>
VLP_INLINE void bag_rows(const Bag& b, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int kLanes = Lanes<A>::count;
  const int64_t width = b.width;
  const T *grad = static_cast<const T*>(b.grad), *weight = static_cast<const T*>(b.weight);
  const Use<A>* uses = static_cast<const Use<A>*>(b.uses);
  std::vector<A> buffer(width);
  A* VLP_RESTRICT sum = buffer.data();
  const int64_t total = b.first[end];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t low = b.first[row], high = b.first[row + 1];
    T* target = b.grad_weight ? static_cast<T*>(b.grad_weight) + row * width : nullptr;
    if (low == high) {
      if (target) std::memset(target, 0, width * sizeof(T));
      continue;
    }
    const T* VLP_RESTRICT own = weight + row * width;
    for (int64_t c = 0; c < width; ++c) sum[c] = 0;
    for (int64_t i = low; i < high; ++i) {
      const int64_t place = uses[i].place;
      const T* VLP_RESTRICT upstream = grad + uses[i].bag * width;
      if (i + 2 < total) {
        // The next rows are anywhere in grad; most table rows are hit once or a few times, so look beyond this one.
        const char* ahead = reinterpret_cast<const char*>(grad + uses[i + 2].bag * width);
        for (int64_t byte = 0; byte < std::min<int64_t>(width * sizeof(T), 1024); byte += 64)
          __builtin_prefetch(ahead + byte);
      }
      const A factor = uses[i].share;
      // Two independent sums, or the additions of one would wait for each other.
      vec_t<A> even = {}, odd = {};
      int64_t c = 0;
      for (; c + 2 * kLanes <= width; c += 2 * kLanes) {
        const vec_t<A> u0 = load_vector(upstream + c), u1 = load_vector(upstream + c + kLanes);
        store_vector<A>(sum + c, load_vector(sum + c) + factor * u0);
        store_vector<A>(sum + c + kLanes, load_vector(sum + c + kLanes) + factor * u1);
        even += u0 * load_vector(own + c);
        odd += u1 * load_vector(own + c + kLanes);
      }
      A dot = sum_of<A>(even + odd);
      for (; c < width; ++c) {
        sum[c] += factor * load(upstream[c]);
        dot += load(upstream[c]) * load(own[c]);
      }
      if (b.grad_share) static_cast<A*>(b.grad_share)[place] = dot;
    }
    if (target)
      for (int64_t c = 0; c < width; ++c) store(target + c, sum[c]);
  }
}

VLP_CLONES void bag_f32(const Bag& b, int64_t begin, int64_t end) { bag_rows<float>(b, begin, end); }
VLP_CLONES void bag_f64(const Bag& b, int64_t begin, int64_t end) { bag_rows<double>(b, begin, end); }
VLP_CLONES void bag_f16(const Bag& b, int64_t begin, int64_t end) { bag_rows<Half>(b, begin, end); }
VLP_CLONES void bag_bf16(const Bag& b, int64_t begin, int64_t end) { bag_rows<BFloat16>(b, begin, end); }

template <typename I, typename A>
void group_by_row(
    const I* indices, const A* share, int64_t bags, int64_t bag, int64_t rows, std::vector<int64_t>& first, Use<A>* uses) {
  // Counting sort: stable, so the sums of a row have one order whatever the number of threads.
  first.assign(rows + 1, 0);
  for (int64_t i = 0; i < bags * bag; ++i) {
    const int64_t row = indices[i];
    STD_TORCH_CHECK(
        row >= 0 && row < rows, "embedding_bag: index ", row, " is out of range for a table of ", rows, " rows");
    ++first[row + 1];
  }
  for (int64_t row = 0; row < rows; ++row) first[row + 1] += first[row];
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t b = 0, place = 0; b < bags; ++b)
    for (int64_t j = 0; j < bag; ++j, ++place)
      uses[next[indices[place]]++] = {static_cast<int32_t>(place), static_cast<int32_t>(b), share[place]};
}

std::tuple<Tensor, Tensor> embedding_bag_backward(
    const Tensor& grad_,
    const Tensor& indices_,
    const Tensor& weight_,
    const Tensor& share_,
    std::vector<bool> mask) {
  const Tensor grad = torch::stable::contiguous(grad_), indices = torch::stable::contiguous(indices_),
               weight = torch::stable::contiguous(weight_);
  STD_TORCH_CHECK(
      indices.dim() == 2 && weight.dim() == 2 && grad.dim() == 2 && grad.size(0) == indices.size(0) &&
          grad.size(1) == weight.size(1) && share_.numel() == indices.numel() && grad.scalar_type() == weight.scalar_type(),
      "embedding_bag_backward: grad (B, D), indices (B, bag), weight (K, D) and per_sample_weights (B, bag) are wanted");
  STD_TORCH_CHECK(mask.size() == 2, "embedding_bag_backward: mask must hold 2 values");
  const int64_t rows = weight.size(0), count = indices.numel(), width = weight.size(1);
  decltype(&bag_f32) kernel = nullptr;
  switch (weight.scalar_type()) {
    case ScalarType::Float: kernel = bag_f32; break;
    case ScalarType::Double: kernel = bag_f64; break;
    case ScalarType::Half: kernel = bag_f16; break;
    case ScalarType::BFloat16: kernel = bag_bf16; break;
    default: STD_TORCH_CHECK(false, "embedding_bag: unsupported dtype for weight");
  }
  const ScalarType sums = weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(
      share_.scalar_type() == weight.scalar_type() || share_.scalar_type() == sums,
      "embedding_bag: per_sample_weights must have the dtype of weight or float32");
  const Tensor share =
      torch::stable::contiguous(share_.scalar_type() == sums ? share_ : torch::stable::to(share_, sums));
  STD_TORCH_CHECK(
      indices.scalar_type() == ScalarType::Long || indices.scalar_type() == ScalarType::Int,
      "embedding_bag: indices must be int64 or int32");
  STD_TORCH_CHECK(count < INT32_MAX, "embedding_bag: 2^31 indices or more");
  // Every element is written below: rows without a use are set to zero in passing.
  Tensor grad_weight = torch::stable::new_empty(weight, mask[0] ? weight.sizes() : std::vector<int64_t>{0});
  Tensor grad_share = torch::stable::new_empty(share, mask[1] ? indices.sizes() : std::vector<int64_t>{0});
  const auto share_back = [&] {
    return share_.scalar_type() == sums ? grad_share : torch::stable::to(grad_share, share_.scalar_type());
  };
  if (count == 0 || width == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_share);
    return {grad_weight, share_back()};
  }
  std::vector<int64_t> first;
  std::unique_ptr<Use<float>[]> single;
  std::unique_ptr<Use<double>[]> twice;
  const auto group = [&](auto& uses, auto number) {
    using A = decltype(number);
    uses.reset(new Use<A>[count]);
    if (indices.scalar_type() == ScalarType::Long)
      group_by_row(data<int64_t>(indices), data<A>(share), indices.size(0), indices.size(1), rows, first, uses.get());
    else
      group_by_row(data<int32_t>(indices), data<A>(share), indices.size(0), indices.size(1), rows, first, uses.get());
  };
  if (sums == ScalarType::Double)
    group(twice, double{});
  else
    group(single, float{});
  if (mask[0]) {
    const int64_t element = sums == ScalarType::Double ? 8 : sums == weight.scalar_type() ? 4 : 2;
    advise_large_pages(grad_weight, rows * width * element);
  }
  const Bag b{
      grad.const_data_ptr(),
      weight.const_data_ptr(),
      mask[0] ? grad_weight.mutable_data_ptr() : nullptr,
      mask[1] ? grad_share.mutable_data_ptr() : nullptr,
      sums == ScalarType::Double ? static_cast<const void*>(twice.get()) : single.get(),
      first.data(),
      width};
  // Equal shares of the places, cut at rows: a popular row is one thread's whole work.
  const int64_t threads = torch::stable::get_num_threads(), parts = threads > 1 ? 8 * threads : 1;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    // The first row that begins at or after the share; rows without a use go with the next used one.
    const auto row_at = [&](int64_t part) -> int64_t {
      if (part == 0 || part >= parts) return part == 0 ? 0 : rows;
      return std::lower_bound(first.begin(), first.end() - 1, count * part / parts) - first.begin();
    };
    for (int64_t part = begin; part < end; ++part) kernel(b, row_at(part), row_at(part + 1));
  });
  return {grad_weight, share_back()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlp_ops, CPU, m) {
  m.impl("product_key_topk", TORCH_BOX(&product_key_topk));
  m.impl("embedding_bag_backward", TORCH_BOX(&embedding_bag_backward));
}

}  // namespace vlp
