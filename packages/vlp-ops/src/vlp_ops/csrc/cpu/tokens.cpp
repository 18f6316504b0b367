// Keeping tokens and putting them back on the CPU. Definitions: vlp_ops/tokens.py.
//
// All of it moves whole rows, so memory is the limit and the kernels are about that: the next rows are asked for ahead, because they are anywhere
// in the source; a large result is written past the caches, which saves reading it first; every row of a result is written once, and row
// numbers are never put into a tensor.
#include "common.h"

#include <algorithm>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace vlp {
namespace {

constexpr int64_t kLine = 64;
// A smaller result stays in the cache for whoever reads it next (measured: at 1 MB that is faster, at 2 MB it no longer is).
constexpr int64_t kStreamBytes = 2 << 20;

struct Rows {
  int64_t batch, count, bytes;  // of the result
  int64_t there;                // rows of a sample in what is read
};

// A line of the cache, or the end of a row.
VLP_INLINE void copy_line(const char* VLP_RESTRICT from, char* VLP_RESTRICT to, int64_t bytes, bool stream) {
#if defined(__SSE2__)
  if (stream && bytes == kLine) {
    for (int64_t part = 0; part < kLine; part += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + part), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + part)));
    return;
  }
#endif
  if (bytes == kLine)
    std::memcpy(to, from, kLine);
  else
    std::memcpy(to, from, bytes);
}

// kCount rows, side by side: the processor follows each of them as a stream of its own, which one row is too short for (measured: a quarter
// faster). `ahead` are the rows that come next.
template <int kCount>
VLP_INLINE void copy_rows(const char* const* from, const char* const* ahead, char* to, int64_t bytes, bool stream) {
  int64_t at = 0;
  for (; at + kLine <= bytes; at += kLine)
    for (int i = 0; i < kCount; ++i) {
      __builtin_prefetch(ahead[i] + at);
      copy_line(from[i] + at, to + i * bytes + at, kLine, stream);
    }
  if (at < bytes)
    for (int i = 0; i < kCount; ++i) {
      __builtin_prefetch(ahead[i] + at);
      copy_line(from[i] + at, to + i * bytes + at, bytes - at, stream);
    }
}

VLP_INLINE void clear_row(char* to, int64_t bytes, bool stream) {
  int64_t at = 0;
#if defined(__SSE2__)
  if (stream)
    for (; at + 16 <= bytes; at += 16) _mm_stream_si128(reinterpret_cast<__m128i*>(to + at), _mm_setzero_si128());
#endif
  std::memset(to + at, 0, bytes - at);
}

bool streams(const Tensor& out, int64_t rows, int64_t bytes) {
#if defined(__SSE2__)
  return rows * bytes >= kStreamBytes && bytes % 16 == 0 && reinterpret_cast<uintptr_t>(out.mutable_data_ptr()) % 16 == 0;
#else
  return false;
#endif
}

// What was written past the caches is seen by other threads only after this.
void finish(bool stream) {
#if defined(__SSE2__)
  if (stream) _mm_sfence();
#endif
}

// Calls work(begin, end) for parts of rows that are worth a thread.
template <typename Work>
void for_rows(int64_t rows, int64_t bytes, Work work) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, bytes)), work);
}

// Calls action(pointer) with the ids in their type.
template <typename Action>
void by_index(const Tensor& ids, Action action) {
  if (ids.scalar_type() == ScalarType::Long)
    action(data<int64_t>(ids));
  else
    action(data<int32_t>(ids));
}

// Without a call of PyTorch for what is contiguous already.
Tensor together(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

int64_t element_bytes(const char* op, const Tensor& tokens) {
  switch (tokens.scalar_type()) {
    case ScalarType::Double: return 8;
    case ScalarType::Float: return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    default: STD_TORCH_CHECK(false, op, ": unsupported dtype; use float32, float64, float16 or bfloat16");
  }
}

void check(const char* op, const Tensor& tokens, const Tensor& ids) {
  STD_TORCH_CHECK(
      tokens.dim() == 3 && ids.dim() == 2 && tokens.size(0) == ids.size(0), op, ": tokens (N, L, D) and ids (N, K) are wanted");
  STD_TORCH_CHECK(
      ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int, op, ": ids must be int64 or int32");
}

template <typename I>
void check_ids(const char* op, const I* ids, int64_t count, int64_t length) {
  I low = 0, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, ids[i]);
    high = std::max(high, ids[i]);
  }
  const int64_t worst = low < 0 ? low : high;
  STD_TORCH_CHECK(
      count == 0 || (worst >= 0 && worst < length), op, ": index ", worst, " is out of range for ", length, " tokens");
}

// out[n, i] = source[n, ids[n, i]], or `other` where there is one and the id is not below the rows of a sample.
Tensor copied(const char* op, const Tensor& source_, const Tensor& ids_, const Tensor* other) {
  const Tensor source = together(source_), ids = together(ids_);
  check(op, source, ids);
  const int64_t width = source.size(2);
  const Rows p{ids.size(0), ids.size(1), width * element_bytes(op, source), source.size(1)};
  Tensor out = torch::stable::new_empty(source, {p.batch, p.count, width});
  const int64_t rows = p.batch * p.count;
  const bool stream = streams(out, rows, p.bytes);
  const char* from = static_cast<const char*>(source.const_data_ptr());
  const char* another = other ? static_cast<const char*>(other->const_data_ptr()) : nullptr;
  char* to = static_cast<char*>(out.mutable_data_ptr());
  by_index(ids, [&](auto* id) {
    check_ids(op, id, rows, other ? std::max(p.count, p.there) : p.there);
    if (out.numel() == 0) return;
    for_rows(rows, p.bytes, [&](int64_t begin, int64_t end) {
      const auto row_at = [&](int64_t row) {
        return id[row] < p.there ? from + (row / p.count * p.there + id[row]) * p.bytes : another;
      };
      constexpr int64_t kCount = 4;
      const char *own[kCount], *next[kCount];
      for (int64_t i = 0; i < kCount; ++i) next[i] = row_at(std::min(begin + i, end - 1));
      for (int64_t row = begin; row < end; row += kCount) {
        std::copy(next, next + kCount, own);
        for (int64_t i = 0; i < kCount; ++i) next[i] = row_at(std::min(row + kCount + i, end - 1));
        char* target = to + row * p.bytes;
        if (row + kCount <= end) {
          copy_rows<kCount>(own, next, target, p.bytes, stream);
          continue;
        }
        for (int64_t i = 0; row + i < end; ++i) copy_rows<1>(own + i, own + i, target + i * p.bytes, p.bytes, stream);
      }
      finish(stream);
    });
  });
  return out;
}

// target = sum of the rows `first`, next[first], next[next[first]] and so on, until a negative number.
template <typename T>
VLP_INLINE void sum_rows(const char* grad, const int32_t* next, int32_t first, char* target, int64_t width, acc_t<T>* sum) {
  for (int64_t c = 0; c < width; ++c) sum[c] = 0;
  for (int32_t k = first; k >= 0; k = next[k]) {
    const T* from = reinterpret_cast<const T*>(grad) + k * width;
    for (int64_t c = 0; c < width; ++c) sum[c] += load(from[c]);
  }
  for (int64_t c = 0; c < width; ++c) store(reinterpret_cast<T*>(target) + c, sum[c]);
}

// Samples [begin, end) of out[n, i] = sum of grad[n, k] over all k with ids[n, k] = i, in the order of k.
template <typename T, typename I>
void collect(const Rows& p, const char* grad, const I* ids, char* out, bool stream, int64_t begin, int64_t end) {
  const int64_t width = p.bytes / static_cast<int64_t>(sizeof(T));
  // The first use of each row, and the next of the same row.
  std::vector<int32_t> first(p.count), next(p.there);
  std::vector<acc_t<T>> sum(width);
  for (int64_t sample = begin; sample < end; ++sample) {
    std::fill(first.begin(), first.end(), -1);
    for (int64_t k = p.there - 1; k >= 0; --k) {
      int32_t& use = first[ids[sample * p.there + k]];
      next[k] = use;
      use = static_cast<int32_t>(k);
    }
    const char *own = grad + sample * p.there * p.bytes, *from = own;
    for (int64_t i = 0; i < p.count; ++i) {
      char* target = out + (sample * p.count + i) * p.bytes;
      const int32_t k = first[i];
      if (k < 0) {
        clear_row(target, p.bytes, stream);
      } else if (next[k] < 0) {
        from = own + k * p.bytes;
        copy_rows<1>(&from, &from, target, p.bytes, stream);
      } else {
        sum_rows<T>(own, next.data(), k, target, width, sum.data());
      }
    }
  }
  finish(stream);
}

Tensor take_tokens(const Tensor& x, const Tensor& ids) { return copied("take_tokens", x, ids, nullptr); }

Tensor take_tokens_backward(const Tensor& grad_, const Tensor& ids_, int64_t length) {
  const char* op = "take_tokens_backward";
  const Tensor grad = together(grad_), ids = together(ids_);
  check(op, grad, ids);
  STD_TORCH_CHECK(grad.size(1) == ids.size(1), op, ": grad (N, K, D) and ids (N, K) are wanted");
  STD_TORCH_CHECK(grad.size(1) < INT32_MAX, op, ": 2^31 tokens or more");
  const int64_t width = grad.size(2);
  const Rows p{grad.size(0), length, width * element_bytes(op, grad), grad.size(1)};
  Tensor out = torch::stable::new_empty(grad, {p.batch, p.count, width});
  const bool stream = streams(out, p.batch * p.count, p.bytes);
  const char* from = static_cast<const char*>(grad.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  by_index(ids, [&](auto* id) {
    check_ids(op, id, ids.numel(), length);
    if (out.numel() == 0) return;
    advise_large_pages(out, p.batch * p.count * p.bytes);
    for_rows(p.batch, p.count * p.bytes, [&](int64_t begin, int64_t end) {
      switch (grad.scalar_type()) {
        case ScalarType::Double: return collect<double>(p, from, id, to, stream, begin, end);
        case ScalarType::Float: return collect<float>(p, from, id, to, stream, begin, end);
        case ScalarType::Half: return collect<Half>(p, from, id, to, stream, begin, end);
        default: return collect<BFloat16>(p, from, id, to, stream, begin, end);
      }
    });
  });
  return out;
}

Tensor restore_tokens(const Tensor& kept, const Tensor& ids, const Tensor& mask_token_) {
  const Tensor mask_token = together(mask_token_);
  STD_TORCH_CHECK(
      kept.dim() == 3 && mask_token.numel() == kept.size(2) && mask_token.scalar_type() == kept.scalar_type(),
      "restore_tokens: kept (N, K, D) and mask_token (D) of one dtype are wanted");
  return copied("restore_tokens", kept, ids, &mask_token);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlp_ops, CPU, m) {
  m.impl("take_tokens", TORCH_BOX(&take_tokens));
  m.impl("take_tokens_backward", TORCH_BOX(&take_tokens_backward));
  m.impl("restore_tokens", TORCH_BOX(&restore_tokens));
}

}  // namespace vlp
