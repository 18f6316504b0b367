// Multi-scale deformable attention on CUDA. Definitions: vlp_ops/reference.py; formulas: arXiv 2010.04159.
//
// N batch, S positions of all levels, M heads, D width per head, Q queries, L levels, P points.
//
// A group of lanes works on one (n, m, q), each lane on 16 bytes of the row; neighbouring groups have neighbouring queries of the same head,
// which read the same rows. Backward: four dot products per point, summed over the group, and one addition to grad_value per corner, four
// floats at once from sm_90 on. The deterministic variant of the scatter gives every (n, m, channel) to one thread.
#include "common.cuh"

namespace vlp {
namespace {

constexpr int kMaxLevels = 64;

struct Level {
  int64_t start;
  int height, width;
};

// Level sizes by value, so that no kernel reads them from memory; or on the device, when only the device knows them.
struct Levels {
  int64_t start[kMaxLevels];
  int height[kMaxLevels], width[kMaxLevels];
  const int64_t *device_shapes, *device_starts;
  int count;
  int64_t positions;
};

__device__ __forceinline__ Level level_at(const Levels& levels, int l) {
  if (levels.device_shapes == nullptr) return {levels.start[l], levels.height[l], levels.width[l]};
  Level level{
      levels.device_starts[l],
      static_cast<int>(levels.device_shapes[2 * l]),
      static_cast<int>(levels.device_shapes[2 * l + 1])};
  // Nobody checked these: a level that is not inside value takes part with nothing.
  const int64_t area = static_cast<int64_t>(level.height) * level.width;
  if (level.start < 0 || level.height < 0 || level.width < 0 || level.start + area > levels.positions)
    level.height = level.width = 0;
  return level;
}

struct Problem {
  int64_t batch, positions, heads, width, queries, levels, points;
  bool softmax;
};

// One point: positions of its corners and bilinear fractions. Corners outside are moved to the nearest position, which is another corner of the
// same point, and marked.
template <typename A>
struct Point {
  A lx, ly;
  int at00, at01, at10, at11;
  bool touches, left, right, top, bottom;
};

template <typename A>
__device__ __forceinline__ Point<A> locate(const A* location, const Level& level) {
  Point<A> point;
  const A x = location[0] * static_cast<A>(level.width) - A(0.5), y = location[1] * static_cast<A>(level.height) - A(0.5);
  // False for NaN, and only bounded numbers are converted below. On an empty level x and y are -0.5.
  point.touches = x > A(-1) && y > A(-1) && x < static_cast<A>(level.width) && y < static_cast<A>(level.height) &&
      level.width > 0 && level.height > 0;
  if (!point.touches) {
    point.lx = point.ly = 0;
    point.at00 = point.at01 = point.at10 = point.at11 = 0;
    point.left = point.right = point.top = point.bottom = false;
    return point;
  }
  const A xf = floor(x), yf = floor(y);
  const int x0 = static_cast<int>(xf), y0 = static_cast<int>(yf);
  point.lx = x - xf;
  point.ly = y - yf;
  point.left = x0 >= 0;
  point.top = y0 >= 0;
  point.right = x0 + 1 < level.width;
  point.bottom = y0 + 1 < level.height;
  const int xl = point.left ? x0 : 0, xr = point.right ? x0 + 1 : x0;
  const int yt = (point.top ? y0 : 0) * level.width, yb = (point.bottom ? y0 + 1 : y0) * level.width;
  point.at00 = yt + xl;
  point.at01 = yt + xr;
  point.at10 = yb + xl;
  point.at11 = yb + xr;
  return point;
}

template <typename A>
struct Corners {
  A v00, v01, v10, v11;
};

template <typename A>
__device__ __forceinline__ Corners<A> corner_weights(const Point<A>& point, A share) {
  const A hx = point.left ? 1 - point.lx : A(0), lx = point.right ? point.lx : A(0);
  const A hy = point.top ? (1 - point.ly) * share : A(0), ly = point.bottom ? point.ly * share : A(0);
  return {hy * hx, hy * lx, ly * hx, ly * lx};
}

template <typename W>
__device__ __forceinline__ acc_t<W> largest_of(const W* weight, int64_t count) {
  acc_t<W> largest = load(weight[0]);
  for (int64_t i = 1; i < count; ++i) largest = fmax(largest, load(weight[i]));
  return largest;
}

// How the threads are dealt: `blocks` blocks for each (n, m), 2^shift lanes for each query. No division is wider than 32 bits: 64-bit ones are
// calls that cost registers.
struct Layout {
  unsigned blocks;
  int shift;
  __device__ __forceinline__ int lanes() const { return 1 << shift; }
  __device__ __forceinline__ int lane() const { return threadIdx.x & (lanes() - 1); }
};

// Row (n, q, m) of a group: the query runs fastest.
struct Place {
  int64_t sample, head, query, row;
};

__device__ __forceinline__ Place place_of(const Problem& p, const Layout& layout) {
  const unsigned owner = blockIdx.x / layout.blocks, block = blockIdx.x - owner * layout.blocks;
  const unsigned heads = static_cast<unsigned>(p.heads), sample = owner / heads;
  const int64_t query = (static_cast<int64_t>(block) * blockDim.x + threadIdx.x) >> layout.shift;
  return {sample, owner - sample * heads, query, (sample * p.queries + query) * p.heads + owner - sample * heads};
}

// Four blocks on a multiprocessor: without the second number the compiler aims higher and spills.
template <typename T, typename W, int kPack>
__global__ void __launch_bounds__(kThreads, 4) forward_kernel(
    Problem p, Levels levels, const T* value, const acc_t<T>* location, const W* weight, T* out, Layout layout) {
  using A = acc_t<T>;
  const Place place = place_of(p, layout);
  if (place.query >= p.queries) return;
  const int lane = layout.lane(), lanes = layout.lanes();
  const int64_t samples = p.levels * p.points, step = p.heads * p.width;
  const A* where = location + place.row * samples * 2;
  const W* weights = weight + place.row * samples;
  const A largest = p.softmax ? static_cast<A>(largest_of(weights, samples)) : A(0);
  for (int64_t channel = static_cast<int64_t>(lane) * kPack; channel < p.width; channel += static_cast<int64_t>(lanes) * kPack) {
    A sum[kPack] = {}, total = p.softmax ? A(0) : A(1);
    int64_t i = 0;
    for (int l = 0; l < levels.count; ++l) {
      const Level level = level_at(levels, l);
      const T* map = value + ((place.sample * p.positions + level.start) * p.heads + place.head) * p.width + channel;
      for (int64_t k = 0; k < p.points; ++k, ++i) {
        A share = load(weights[i]);
        if (p.softmax) {
          share = exp(share - largest);
          total += share;
        }
        const Point<A> point = locate(where + 2 * i, level);
        if (!point.touches) continue;
        const Corners<A> w = corner_weights(point, share);
        // Corners outside are 0, not 0 times what lies where they were moved to: that may be infinite.
        A v00[kPack] = {}, v01[kPack] = {}, v10[kPack] = {}, v11[kPack] = {};
        if (point.top && point.left) load_pack<kPack>(map + point.at00 * step, v00);
        if (point.top && point.right) load_pack<kPack>(map + point.at01 * step, v01);
        if (point.bottom && point.left) load_pack<kPack>(map + point.at10 * step, v10);
        if (point.bottom && point.right) load_pack<kPack>(map + point.at11 * step, v11);
#pragma unroll
        for (int c = 0; c < kPack; ++c) sum[c] += w.v00 * v00[c] + w.v01 * v01[c] + w.v10 * v10[c] + w.v11 * v11[c];
      }
    }
#pragma unroll
    for (int c = 0; c < kPack; ++c) sum[c] /= total;
    store_pack<kPack>(out + place.row * p.width + channel, sum);
  }
}

// Four floats in one addition, from sm_90 on; the emulation has them, too.
#if defined(VLP_EMULATE) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
constexpr bool kHasVectorAtomics = true;
#else
constexpr bool kHasVectorAtomics = false;
#endif

template <int kPack, typename A>
__device__ __forceinline__ void add_pack(A* target, const A* grad, A factor) {
  if constexpr (kHasVectorAtomics && sizeof(A) == 4 && kPack % 4 == 0) {
#pragma unroll
    for (int c = 0; c < kPack; c += 4)
      atomicAdd(
          reinterpret_cast<float4*>(target + c),
          make_float4(factor * grad[c], factor * grad[c + 1], factor * grad[c + 2], factor * grad[c + 3]));
  } else {
#pragma unroll
    for (int c = 0; c < kPack; ++c) atomicAdd(target + c, factor * grad[c]);
  }
}

// grad_weight is in the accumulation type here. Null results are not wanted.
template <typename T, typename W, int kPack>
__global__ void __launch_bounds__(kThreads, 4) backward_kernel(
    Problem p,
    Levels levels,
    const T* grad,
    const T* value,
    const acc_t<T>* location,
    const W* weight,
    acc_t<T>* grad_value,
    acc_t<T>* grad_location,
    acc_t<T>* grad_weight,
    Layout layout) {
  using A = acc_t<T>;
  Place place = place_of(p, layout);
  // Lanes beyond the end go along, because sums over a group need every lane of the warp.
  const bool active = place.query < p.queries;
  if (!active) place.row = 0;
  const int lane = layout.lane(), lanes = layout.lanes();
  const int64_t samples = p.levels * p.points, step = p.heads * p.width;
  const A* where = location + place.row * samples * 2;
  const W* weights = weight + place.row * samples;
  const T* upstream = grad + place.row * p.width;
  A largest = 0, total = 1;
  if (p.softmax) {
    largest = static_cast<A>(largest_of(weights, samples));
    total = 0;
    for (int64_t i = 0; i < samples; ++i) total += exp(static_cast<A>(load(weights[i])) - largest);
  }
  A mean = 0;
  int64_t i = 0;
  for (int l = 0; l < levels.count; ++l) {
    const Level level = level_at(levels, l);
    const int64_t base = ((place.sample * p.positions + level.start) * p.heads + place.head) * p.width;
    for (int64_t k = 0; k < p.points; ++k, ++i) {
      A share = load(weights[i]);
      if (p.softmax) share = exp(share - largest) / total;
      const Point<A> point = locate(where + 2 * i, level);
      const Corners<A> w = corner_weights(point, share);
      Corners<A> t{};
      if (active && point.touches) {
        for (int64_t channel = static_cast<int64_t>(lane) * kPack; channel < p.width;
             channel += static_cast<int64_t>(lanes) * kPack) {
          const int64_t at00 = base + point.at00 * step + channel, at01 = base + point.at01 * step + channel;
          const int64_t at10 = base + point.at10 * step + channel, at11 = base + point.at11 * step + channel;
          A g[kPack], v[kPack];
          load_pack<kPack>(upstream + channel, g);
          if (grad_location != nullptr || grad_weight != nullptr) {
            load_pack<kPack>(value + at00, v);
#pragma unroll
            for (int c = 0; c < kPack; ++c) t.v00 += g[c] * v[c];
            load_pack<kPack>(value + at01, v);
#pragma unroll
            for (int c = 0; c < kPack; ++c) t.v01 += g[c] * v[c];
            load_pack<kPack>(value + at10, v);
#pragma unroll
            for (int c = 0; c < kPack; ++c) t.v10 += g[c] * v[c];
            load_pack<kPack>(value + at11, v);
#pragma unroll
            for (int c = 0; c < kPack; ++c) t.v11 += g[c] * v[c];
          }
          if (grad_value != nullptr) {
            if (point.top && point.left) add_pack<kPack>(grad_value + at00, g, w.v00);
            if (point.top && point.right) add_pack<kPack>(grad_value + at01, g, w.v01);
            if (point.bottom && point.left) add_pack<kPack>(grad_value + at10, g, w.v10);
            if (point.bottom && point.right) add_pack<kPack>(grad_value + at11, g, w.v11);
          }
        }
      }
      if (grad_location == nullptr && grad_weight == nullptr) continue;
      t.v00 = group_sum(point.top && point.left ? t.v00 : A(0), lanes);
      t.v01 = group_sum(point.top && point.right ? t.v01 : A(0), lanes);
      t.v10 = group_sum(point.bottom && point.left ? t.v10 : A(0), lanes);
      t.v11 = group_sum(point.bottom && point.right ? t.v11 : A(0), lanes);
      const A lx = point.lx, ly = point.ly, hx = 1 - lx, hy = 1 - ly;
      const A slope = hy * (hx * t.v00 + lx * t.v01) + ly * (hx * t.v10 + lx * t.v11);
      mean += share * slope;
      // The lane that writes a point also reads it back below. Points outside are written too: the results are not cleared.
      if (active && (static_cast<int>(i) & (lanes - 1)) == lane) {
        if (grad_location != nullptr) {
          A* target = grad_location + (place.row * samples + i) * 2;
          target[0] = share * static_cast<A>(level.width) * (hy * (t.v01 - t.v00) + ly * (t.v11 - t.v10));
          target[1] = share * static_cast<A>(level.height) * (hx * (t.v10 - t.v00) + lx * (t.v11 - t.v01));
        }
        if (grad_weight != nullptr) grad_weight[place.row * samples + i] = slope;
      }
    }
  }
  if (!p.softmax || !active || grad_weight == nullptr) return;
  for (i = lane; i < samples; i += lanes) {
    const A share = exp(static_cast<A>(load(weights[i])) - largest) / total;
    A* target = grad_weight + place.row * samples + i;
    *target = share * (*target - mean);
  }
}

// One thread per (n, m, channel) adds in the order of the queries.
template <typename T, typename W>
__global__ void __launch_bounds__(kThreads) ordered_scatter_kernel(
    Problem p, Levels levels, const T* grad, const acc_t<T>* location, const W* weight, acc_t<T>* grad_value) {
  using A = acc_t<T>;
  const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned width = static_cast<unsigned>(p.width), heads = static_cast<unsigned>(p.heads);
  const unsigned owner = thread / width, channel = thread - owner * width;
  const int64_t sample = owner / heads, head = owner % heads;
  if (sample >= p.batch) return;
  const int64_t samples = p.levels * p.points, step = p.heads * p.width;
  for (int64_t query = 0; query < p.queries; ++query) {
    const int64_t row = (sample * p.queries + query) * p.heads + head;
    const W* weights = weight + row * samples;
    const A g = load(grad[row * p.width + channel]);
    A largest = 0, total = 1;
    if (p.softmax) {
      largest = static_cast<A>(largest_of(weights, samples));
      total = 0;
      for (int64_t i = 0; i < samples; ++i) total += exp(static_cast<A>(load(weights[i])) - largest);
    }
    int64_t i = 0;
    for (int l = 0; l < levels.count; ++l) {
      const Level level = level_at(levels, l);
      A* map = grad_value + ((sample * p.positions + level.start) * p.heads + head) * p.width + channel;
      for (int64_t k = 0; k < p.points; ++k, ++i) {
        A share = load(weights[i]);
        if (p.softmax) share = exp(share - largest) / total;
        const Point<A> point = locate(location + (row * samples + i) * 2, level);
        if (!point.touches) continue;
        const Corners<A> w = corner_weights(point, share);
        // Corners outside were moved to a position that is there: 0 times an infinite gradient must not be added to it.
        if (point.top && point.left) map[point.at00 * step] += w.v00 * g;
        if (point.top && point.right) map[point.at01 * step] += w.v01 * g;
        if (point.bottom && point.left) map[point.at10 * step] += w.v10 * g;
        if (point.bottom && point.right) map[point.at11 * step] += w.v11 * g;
      }
    }
  }
}

// ---- host ----------------------------------------------------------------------------------------------------------

Problem problem_of(const Tensor& value, const Levels& levels, const Tensor& location, const Tensor& weight, bool softmax) {
  STD_TORCH_CHECK(
      value.dim() == 4 && location.dim() == 6 && weight.dim() == 5,
      "ms_deform_attn: value (N, S, M, D), sampling_locations (N, Q, M, L, P, 2) and attention_weights (N, Q, M, L, P)"
      " are wanted");
  const Problem p{
      value.size(0), value.size(1), value.size(2), value.size(3), location.size(1), location.size(3), location.size(4), softmax};
  STD_TORCH_CHECK(
      location.size(0) == p.batch && location.size(2) == p.heads && location.size(5) == 2 && weight.size(0) == p.batch &&
          weight.size(1) == p.queries && weight.size(2) == p.heads && weight.size(3) == p.levels &&
          weight.size(4) == p.points && levels.count == p.levels,
      "ms_deform_attn: sampling_locations, attention_weights or spatial_shapes do not fit value");
  STD_TORCH_CHECK(
      location.scalar_type() == (value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
      "ms_deform_attn: sampling_locations must be float32 (float64 with float64 values)");
  STD_TORCH_CHECK(p.positions < INT32_MAX, "ms_deform_attn: value has 2^31 positions or more");
  STD_TORCH_CHECK(
      p.batch * p.heads * p.width < INT32_MAX && p.levels * p.points < INT32_MAX,
      "ms_deform_attn: 2^31 channels or points or more");
  return p;
}

Levels levels_of(const std::vector<int64_t>& shapes, int64_t positions) {
  Levels levels{};
  levels.positions = positions;
  STD_TORCH_CHECK(shapes.size() / 2 <= kMaxLevels, "ms_deform_attn: more than 64 levels on CUDA");
  int64_t start = 0;
  for (size_t i = 0; i + 1 < shapes.size(); i += 2) {
    STD_TORCH_CHECK(
        shapes[i] >= 0 && shapes[i + 1] >= 0 && start + shapes[i] * shapes[i + 1] <= positions,
        "ms_deform_attn: spatial_shapes reach beyond the positions of value");
    levels.start[levels.count] = start;
    levels.height[levels.count] = static_cast<int>(shapes[i]);
    levels.width[levels.count] = static_cast<int>(shapes[i + 1]);
    start += shapes[i] * shapes[i + 1];
    ++levels.count;
  }
  return levels;
}

// The tensors must outlive the kernels.
Levels levels_of(const Tensor& shapes, const Tensor& starts, int64_t positions) {
  STD_TORCH_CHECK(
      shapes.scalar_type() == ScalarType::Long && starts.scalar_type() == ScalarType::Long && shapes.dim() == 2 &&
          shapes.size(1) == 2 && starts.numel() == shapes.size(0),
      "ms_deform_attn: spatial_shapes (L, 2) and level_start_index (L,) must be int64");
  Levels levels{};
  levels.positions = positions;
  levels.count = static_cast<int>(shapes.size(0));
  levels.device_shapes = static_cast<const int64_t*>(shapes.const_data_ptr());
  levels.device_starts = static_cast<const int64_t*>(starts.const_data_ptr());
  return levels;
}

Layout layout_of(const Problem& p, int pack) {
  Layout layout{0, 0};
  while ((1 << layout.shift) < lanes_for(p.width, pack)) ++layout.shift;
  const int64_t blocks = blocks_for(p.queries << layout.shift);
  STD_TORCH_CHECK(blocks * p.batch * p.heads <= INT32_MAX, "ms_deform_attn: too many queries for one launch");
  layout.blocks = static_cast<unsigned>(blocks);
  return layout;
}

// Calls action(element of value, element of weight): their types are what counts.
template <typename Action>
void by_type(ScalarType value, ScalarType weight, Action action) {
  if (value == ScalarType::Float && weight == ScalarType::Float) return action(float{}, float{});
  if (value == ScalarType::Double && weight == ScalarType::Double) return action(double{}, double{});
  if (value == ScalarType::Half && weight == ScalarType::Half) return action(Half{}, Half{});
  if (value == ScalarType::Half && weight == ScalarType::Float) return action(Half{}, float{});
  if (value == ScalarType::BFloat16 && weight == ScalarType::BFloat16) return action(BFloat16{}, BFloat16{});
  STD_TORCH_CHECK(
      value == ScalarType::BFloat16 && weight == ScalarType::Float,
      "ms_deform_attn: unsupported dtypes; attention_weights must have the dtype of value or float32");
  action(BFloat16{}, float{});
}

Tensor forward(const Tensor& value_, const Levels& levels, const Tensor& location_, const Tensor& weight_, bool softmax) {
  const Tensor value = torch::stable::contiguous(value_), location = torch::stable::contiguous(location_),
               weight = torch::stable::contiguous(weight_);
  const Problem p = problem_of(value, levels, location, weight, softmax);
  const OnDevice guard(value);
  Tensor out = torch::stable::new_empty(value, {p.batch, p.queries, p.heads * p.width});
  if (out.numel() == 0) return out;
  if (p.levels * p.points == 0) return torch::stable::zero_(out);
  const cudaStream_t stream = stream_of(value);
  by_type(value.scalar_type(), weight.scalar_type(), [&](auto element, auto share) {
    using T = decltype(element);
    using W = decltype(share);
    constexpr int kFull = 16 / sizeof(T);
    const bool packed = p.width % kFull == 0 && aligned(value) && aligned(out);
    const Layout layout = layout_of(p, packed ? kFull : 1);
    launch(
        packed ? &forward_kernel<T, W, kFull> : &forward_kernel<T, W, 1>,
        layout.blocks * p.batch * p.heads,
        kThreads,
        stream,
        p,
        levels,
        static_cast<const T*>(value.const_data_ptr()),
        static_cast<const acc_t<T>*>(location.const_data_ptr()),
        static_cast<const W*>(weight.const_data_ptr()),
        static_cast<T*>(out.mutable_data_ptr()),
        layout);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_,
    const Tensor& value_,
    const Levels& levels,
    const Tensor& location_,
    const Tensor& weight_,
    bool softmax,
    bool deterministic,
    const std::vector<bool>& mask) {
  const Tensor grad = torch::stable::contiguous(grad_), value = torch::stable::contiguous(value_),
               location = torch::stable::contiguous(location_), weight = torch::stable::contiguous(weight_);
  const Problem p = problem_of(value, levels, location, weight, softmax);
  STD_TORCH_CHECK(
      grad.scalar_type() == value.scalar_type() && grad.numel() == p.batch * p.queries * p.heads * p.width,
      "ms_deform_attn_backward: grad must be (N, Q, M*D) in the dtype of value");
  STD_TORCH_CHECK(mask.size() == 3, "ms_deform_attn_backward: mask must hold 3 values");
  const OnDevice guard(value);
  const ScalarType sums = value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const std::vector<int64_t> none{0};
  Tensor grad_value = torch::stable::new_zeros(value, mask[0] ? value.sizes() : none, sums);
  Tensor grad_location = torch::stable::new_empty(location, mask[1] ? location.sizes() : none);
  Tensor grad_weight = torch::stable::new_empty(weight, mask[2] ? weight.sizes() : none, sums);
  if (grad.numel() == 0 || p.levels * p.points == 0) {
    torch::stable::zero_(grad_location);
    torch::stable::zero_(grad_weight);
  } else {
    const cudaStream_t stream = stream_of(value);
    by_type(value.scalar_type(), weight.scalar_type(), [&](auto element, auto share) {
      using T = decltype(element);
      using W = decltype(share);
      using A = acc_t<T>;
      constexpr int kFull = 16 / sizeof(T);
      const bool packed = p.width % kFull == 0 && aligned(value) && aligned(grad) && (!mask[0] || aligned(grad_value));
      const Layout layout = layout_of(p, packed ? kFull : 1);
      const T* upstream = static_cast<const T*>(grad.const_data_ptr());
      const A* where = static_cast<const A*>(location.const_data_ptr());
      const W* weights = static_cast<const W*>(weight.const_data_ptr());
      A* target = mask[0] ? static_cast<A*>(grad_value.mutable_data_ptr()) : nullptr;
      if (mask[1] || mask[2] || !deterministic)
        launch(
            packed ? &backward_kernel<T, W, kFull> : &backward_kernel<T, W, 1>,
            layout.blocks * p.batch * p.heads,
            kThreads,
            stream,
            p,
            levels,
            upstream,
            static_cast<const T*>(value.const_data_ptr()),
            where,
            weights,
            deterministic ? static_cast<A*>(nullptr) : target,
            mask[1] ? static_cast<A*>(grad_location.mutable_data_ptr()) : static_cast<A*>(nullptr),
            mask[2] ? static_cast<A*>(grad_weight.mutable_data_ptr()) : static_cast<A*>(nullptr),
            layout);
      if (deterministic && mask[0])
        launch(
            &ordered_scatter_kernel<T, W>,
            blocks_for(p.batch * p.heads * p.width),
            kThreads,
            stream,
            p,
            levels,
            upstream,
            where,
            weights,
            target);
    });
  }
  return {converted(grad_value, value.scalar_type()), grad_location, converted(grad_weight, weight.scalar_type())};
}

Tensor forward_list(
    const Tensor& value,
    std::vector<int64_t> shapes,
    const Tensor& location,
    const Tensor& weight,
    bool softmax,
    bool /*deterministic: the forward pass always is*/) {
  return forward(value, levels_of(shapes, value.size(1)), location, weight, softmax);
}

Tensor forward_tensor(
    const Tensor& value,
    const Tensor& shapes_,
    const Tensor& starts_,
    const Tensor& location,
    const Tensor& weight,
    bool softmax,
    bool /*deterministic: the forward pass always is*/) {
  const Tensor shapes = torch::stable::contiguous(shapes_), starts = torch::stable::contiguous(starts_);
  return forward(value, levels_of(shapes, starts, value.size(1)), location, weight, softmax);
}

std::tuple<Tensor, Tensor, Tensor> backward_list(
    const Tensor& grad,
    const Tensor& value,
    std::vector<int64_t> shapes,
    const Tensor& location,
    const Tensor& weight,
    bool softmax,
    bool deterministic,
    std::vector<bool> mask) {
  return backward(grad, value, levels_of(shapes, value.size(1)), location, weight, softmax, deterministic, mask);
}

std::tuple<Tensor, Tensor, Tensor> backward_tensor(
    const Tensor& grad,
    const Tensor& value,
    const Tensor& shapes_,
    const Tensor& starts_,
    const Tensor& location,
    const Tensor& weight,
    bool softmax,
    bool deterministic,
    std::vector<bool> mask) {
  const Tensor shapes = torch::stable::contiguous(shapes_), starts = torch::stable::contiguous(starts_);
  return backward(grad, value, levels_of(shapes, starts, value.size(1)), location, weight, softmax, deterministic, mask);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlp_ops, VLP_DEVICE_KEY, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&forward_list));
  m.impl("ms_deform_attn.tensor", TORCH_BOX(&forward_tensor));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&backward_list));
  m.impl("ms_deform_attn_backward.tensor", TORCH_BOX(&backward_tensor));
}

}  // namespace vlp
