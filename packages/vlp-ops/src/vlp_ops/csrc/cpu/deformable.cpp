// Multi-scale deformable attention on the CPU. Definitions: vlp_ops/reference.py; formulas: arXiv 2010.04159.
//
// N batch, S positions of all levels, M heads, D width per head, Q queries, L levels, P points.
//
// Work goes head by head, because one head's part of a map fits the caches and all heads together do not. The rows of a head lie M*D apart in
// (N, S, M, D), which uses only a fraction of the cache sets, so they are first copied into a buffer of the thread (and converted: there are
// kernels for float32 and float64 only), unless there are too few points to pay for that.
// A block of queries is worked through in two steps: first the corners and bilinear weights of all points (vector code over the points, no
// branch on what is inside), then the rows of each point. Corners outside the map are moved to the nearest position, which is another corner
// of the same point, and have weight 0.
// Backward: every element of grad_value has one owner, so there are no atomics and the result never depends on the number of threads.
#include "common.h"

#include <algorithm>
#include <cmath>

namespace vlp {
namespace {

struct Level {
  int64_t start, height, width;
};

struct Problem {
  int64_t batch, positions, heads, width, queries, levels, points;
  bool softmax;
  std::vector<Level> level;
  const void* value;                // as the caller gave it
  const void *location, *weight;    // in the accumulation type
  bool copied;                      // rows of a head are copied together
  int64_t samples() const { return levels * points; }
  int64_t row(int64_t sample, int64_t head) const { return (sample * positions * heads + head) * width; }
};

template <typename A>
struct Corners {
  A v00, v01, v10, v11;
};

// Points of a block of queries of one head, arrays over (query, level, point).
template <typename A>
struct Points {
  int64_t capacity;  // queries in a block
  std::vector<A> x, y, share, lx, ly, columns, rows;
  std::vector<A> w00, w01, w10, w11;            // bilinear weight times attention weight, 0 outside
  std::vector<int32_t> at00, at01, at10, at11;  // positions of the corners
  std::vector<int32_t> flags;                   // what is inside
  std::vector<int32_t> width, height, start;

  static constexpr int32_t kLeft = 1, kRight = 2, kTop = 4, kBottom = 8, kTouches = 16, kAll = 31;

  explicit Points(const Problem& p) {
    capacity = std::max<int64_t>(1, std::min<int64_t>(p.queries, 128 / p.samples()));
    const int64_t lanes = Lanes<A>::count, count = (capacity * p.samples() + lanes - 1) / lanes * lanes;
    for (auto* list : {&x, &y, &share, &lx, &ly, &columns, &rows, &w00, &w01, &w10, &w11}) list->resize(count);
    for (auto* list : {&at00, &at01, &at10, &at11, &flags, &width, &height, &start}) list->resize(count);
    for (int64_t i = 0; i < count; ++i) {
      const Level& level = p.level[i / p.points % p.levels];
      columns[i] = static_cast<A>(level.width);
      rows[i] = static_cast<A>(level.height);
      width[i] = static_cast<int32_t>(level.width);
      height[i] = static_cast<int32_t>(level.height);
      start[i] = static_cast<int32_t>(level.start);
    }
  }
};

template <typename A>
VLP_INLINE typename Lanes<A>::integer load_integers(const int32_t* source) {
  typename Lanes<A>::narrow narrow;
  std::memcpy(&narrow, source, sizeof(narrow));
  return __builtin_convertvector(narrow, typename Lanes<A>::integer);
}

template <typename A>
VLP_INLINE void store_integers(int32_t* target, typename Lanes<A>::integer value) {
  const auto narrow = __builtin_convertvector(value, typename Lanes<A>::narrow);
  std::memcpy(target, &narrow, sizeof(narrow));
}

// Largest integer that is not larger, of numbers known to be small.
template <typename A>
VLP_INLINE typename Lanes<A>::integer floor_of(vec_t<A> value) {
  using Integer = typename Lanes<A>::integer;
  const Integer cut = __builtin_convertvector(__builtin_convertvector(value, typename Lanes<A>::narrow), Integer);
  return cut + (value < __builtin_convertvector(cut, vec_t<A>));
}

template <typename A>
VLP_INLINE void locate(Points<A>& points, int64_t count) {
  using Vector = vec_t<A>;
  using Integer = typename Lanes<A>::integer;
  const Vector zero = {}, one = zero + 1;
  const Integer none = {};
  for (int64_t i = 0; i < count; i += Lanes<A>::count) {
    const Vector columns = load_vector(&points.columns[i]), rows = load_vector(&points.rows[i]);
    const Integer width = load_integers<A>(&points.width[i]), height = load_integers<A>(&points.height[i]);
    Vector x = load_vector(&points.x[i]) * columns - A(0.5), y = load_vector(&points.y[i]) * rows - A(0.5);
    // False for NaN; what does not touch the map becomes 0, so that only bounded numbers are converted to integers. A comparison gives -1 for
    // true. On an empty level x and y are -0.5.
    const Integer touches =
        (x > -one) & (y > -one) & (x < columns) & (y < rows) & (columns > zero) & (rows > zero);
    x = touches ? x : zero;
    y = touches ? y : zero;
    const Integer x0 = floor_of<A>(x), y0 = floor_of<A>(y);
    const Vector lx = x - __builtin_convertvector(x0, Vector), ly = y - __builtin_convertvector(y0, Vector);
    const Integer left = x0 >= 0, right = x0 + 1 < width, top = y0 >= 0, bottom = y0 + 1 < height;
    const Vector share = touches ? load_vector(&points.share[i]) : zero;
    const Vector hx = left ? one - lx : zero, wx = right ? lx : zero;
    const Vector hy = top ? (one - ly) * share : zero, wy = bottom ? ly * share : zero;
    store_vector<A>(&points.lx[i], lx);
    store_vector<A>(&points.ly[i], ly);
    store_vector<A>(&points.w00[i], hy * hx);
    store_vector<A>(&points.w01[i], hy * wx);
    store_vector<A>(&points.w10[i], wy * hx);
    store_vector<A>(&points.w11[i], wy * wx);
    const Integer start = load_integers<A>(&points.start[i]);
    const Integer xl = left ? x0 : none, xr = x0 - right;
    const Integer yt = start + (top ? y0 : none) * width, yb = start + (y0 - bottom) * width;
    store_integers<A>(&points.at00[i], yt + xl);
    store_integers<A>(&points.at01[i], yt + xr);
    store_integers<A>(&points.at10[i], yb + xl);
    store_integers<A>(&points.at11[i], yb + xr);
    store_integers<A>(
        &points.flags[i],
        (left & Points<A>::kLeft) | (right & Points<A>::kRight) | (top & Points<A>::kTop) |
            (bottom & Points<A>::kBottom) | (touches & Points<A>::kTouches));
  }
}

// First step for queries [first, first + count) of a head: locations, corners, and the weights, after the softmax if it is taken here.
template <typename A>
VLP_INLINE void prepare(const Problem& p, int64_t sample, int64_t head, int64_t first, int64_t count, Points<A>& points) {
  const int64_t samples = p.samples();
  A *x = points.x.data(), *y = points.y.data(), *share = points.share.data();
  for (int64_t q = 0; q < count; ++q, x += samples, y += samples, share += samples) {
    const int64_t row = ((sample * p.queries + first + q) * p.heads + head) * samples;
    const A *place = static_cast<const A*>(p.location) + 2 * row, *weight = static_cast<const A*>(p.weight) + row;
    for (int64_t i = 0; i < samples; ++i) {
      x[i] = place[2 * i];
      y[i] = place[2 * i + 1];
      share[i] = weight[i];
    }
    if (!p.softmax) continue;
    A largest = share[0], total = 0;
    for (int64_t i = 1; i < samples; ++i) largest = std::max(largest, share[i]);
    for (int64_t i = 0; i < samples; ++i) total += share[i] = std::exp(share[i] - largest);
    for (int64_t i = 0; i < samples; ++i) share[i] /= total;
  }
  locate(points, count * samples);
}

// Weighted sum of the samples of one query for kVectors * lanes channels.
template <int kVectors, typename A>
VLP_INLINE void forward_channels(const Points<A>& points, int64_t first, int64_t last, const A* value, int64_t step, A* out) {
  constexpr int kLanes = Lanes<A>::count;
  vec_t<A> sum[kVectors] = {};
  for (int64_t i = first; i < last; ++i) {
    if (!(points.flags[i] & Points<A>::kTouches)) continue;
    const A w00 = points.w00[i], w01 = points.w01[i], w10 = points.w10[i], w11 = points.w11[i];
    const A *v00 = value + points.at00[i] * step, *v01 = value + points.at01[i] * step;
    const A *v10 = value + points.at10[i] * step, *v11 = value + points.at11[i] * step;
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c)
      sum[c] += w00 * load_vector(v00 + c * kLanes) + w01 * load_vector(v01 + c * kLanes) +
          w10 * load_vector(v10 + c * kLanes) + w11 * load_vector(v11 + c * kLanes);
  }
#pragma GCC unroll 4
  for (int c = 0; c < kVectors; ++c) store_vector<A>(out + c * kLanes, sum[c]);
}

// Queries [begin, end) of one head of one sample. value and grad_value: the rows of this head, `step` numbers apart.
struct Part {
  int64_t sample, head, begin, end;
  const void* value;
  void* grad_value;
  int64_t step;
  int64_t first_channel, last_channel;  // of the scatter into grad_value
  bool points, scatter;                 // what the backward pass makes
};

template <typename A>
VLP_INLINE void forward_part(const Problem& p, void* result, const Part& part) {
  constexpr int kLanes = Lanes<A>::count;
  const int64_t width = p.width, samples = p.samples(), step = part.step;
  const A* value = static_cast<const A*>(part.value);
  Points<A> points(p);
  for (int64_t begin = part.begin; begin < part.end; begin += points.capacity) {
    const int64_t count = std::min(points.capacity, part.end - begin);
    prepare(p, part.sample, part.head, begin, count, points);
    for (int64_t q = 0; q < count; ++q) {
      A* out = static_cast<A*>(result) + ((part.sample * p.queries + begin + q) * p.heads + part.head) * width;
      const int64_t first = q * samples, last = first + samples;
      int64_t c = 0;
      for (; c + 4 * kLanes <= width; c += 4 * kLanes) forward_channels<4>(points, first, last, value + c, step, out + c);
      for (; c + kLanes <= width; c += kLanes) forward_channels<1>(points, first, last, value + c, step, out + c);
      for (; c < width; ++c) {
        A sum = 0;
        for (int64_t i = first; i < last; ++i) {
          if (!(points.flags[i] & Points<A>::kTouches)) continue;
          sum += points.w00[i] * value[points.at00[i] * step + c] + points.w01[i] * value[points.at01[i] * step + c] +
              points.w10[i] * value[points.at10[i] * step + c] + points.w11[i] * value[points.at11[i] * step + c];
        }
        out[c] = sum;
      }
    }
  }
}

struct Gradients {
  const void* grad;
  void* location;  // null: not wanted
  void* weight;    // null: not wanted
};

// <grad, corner> for the four corners of a point, 0 where the corner is outside.
template <int kWidth, typename A>
VLP_INLINE Corners<A> corner_products(
    const Points<A>& points, int64_t i, const A* value, int64_t step, const A* VLP_RESTRICT grad, int64_t any_width) {
  constexpr int kLanes = Lanes<A>::count;
  const int64_t width = kWidth ? kWidth : any_width;
  const A *v00 = value + points.at00[i] * step, *v01 = value + points.at01[i] * step;
  const A *v10 = value + points.at10[i] * step, *v11 = value + points.at11[i] * step;
  vec_t<A> s00 = {}, s01 = {}, s10 = {}, s11 = {};
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    const vec_t<A> g = load_vector(grad + c);
    s00 += g * load_vector(v00 + c);
    s01 += g * load_vector(v01 + c);
    s10 += g * load_vector(v10 + c);
    s11 += g * load_vector(v11 + c);
  }
  Corners<A> t{sum_of<A>(s00), sum_of<A>(s01), sum_of<A>(s10), sum_of<A>(s11)};
  for (; c < width; ++c) {
    t.v00 += grad[c] * v00[c];
    t.v01 += grad[c] * v01[c];
    t.v10 += grad[c] * v10[c];
    t.v11 += grad[c] * v11[c];
  }
  using P = Points<A>;
  const int32_t flags = points.flags[i];
  if (flags != P::kAll) {
    if (!(flags & P::kTop) || !(flags & P::kLeft)) t.v00 = 0;
    if (!(flags & P::kTop) || !(flags & P::kRight)) t.v01 = 0;
    if (!(flags & P::kBottom) || !(flags & P::kLeft)) t.v10 = 0;
    if (!(flags & P::kBottom) || !(flags & P::kRight)) t.v11 = 0;
  }
  return t;
}

template <int kWidth, typename A>
VLP_INLINE void add_row(A* target, const A* grad, A factor, int64_t any_width) {
  constexpr int kLanes = Lanes<A>::count;
  const int64_t width = kWidth ? kWidth : any_width;
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes)
    store_vector<A>(target + c, load_vector(target + c) + factor * load_vector(grad + c));
  for (; c < width; ++c) target[c] += factor * grad[c];
}

template <int kWidth, typename A>
VLP_INLINE void backward_queries(const Problem& p, const Gradients& g, const Part& part) {
  const int64_t width = p.width, samples = p.samples(), step = part.step;
  const int64_t channels = part.last_channel - part.first_channel;
  const A* value = static_cast<const A*>(part.value);
  A* grad_value = static_cast<A*>(part.grad_value);
  Points<A> points(p);
  std::vector<A> slope(samples);
  for (int64_t begin = part.begin; begin < part.end; begin += points.capacity) {
    const int64_t count = std::min(points.capacity, part.end - begin);
    prepare(p, part.sample, part.head, begin, count, points);
    for (int64_t q = 0; q < count; ++q) {
      const int64_t row = (part.sample * p.queries + begin + q) * p.heads + part.head;
      const A* grad = static_cast<const A*>(g.grad) + row * width;
      const int64_t first = q * samples;
      for (int64_t k = 0, i = first; k < samples; ++k, ++i) {
        const bool touches = points.flags[i] & Points<A>::kTouches;
        if (part.points) {
          // Written for points outside too: the result buffers are not cleared.
          Corners<A> t{};
          if (touches) t = corner_products<kWidth>(points, i, value, step, grad, width);
          const A lx = points.lx[i], ly = points.ly[i], hx = 1 - lx, hy = 1 - ly;
          slope[k] = hy * (hx * t.v00 + lx * t.v01) + ly * (hx * t.v10 + lx * t.v11);
          if (g.location) {
            A* target = static_cast<A*>(g.location) + (row * samples + k) * 2;
            target[0] = points.share[i] * points.columns[i] * (hy * (t.v01 - t.v00) + ly * (t.v11 - t.v10));
            target[1] = points.share[i] * points.rows[i] * (hx * (t.v10 - t.v00) + lx * (t.v11 - t.v01));
          }
        }
        if (part.scatter && touches) {
          // Corners coincide at the edge of a map, so one row is finished before the next.
          const A* from = grad + part.first_channel;
          add_row<kWidth>(grad_value + points.at00[i] * step, from, points.w00[i], channels);
          add_row<kWidth>(grad_value + points.at01[i] * step, from, points.w01[i], channels);
          add_row<kWidth>(grad_value + points.at10[i] * step, from, points.w10[i], channels);
          add_row<kWidth>(grad_value + points.at11[i] * step, from, points.w11[i], channels);
        }
      }
      if (part.points && g.weight) {
        A* target = static_cast<A*>(g.weight) + row * samples;
        const A* share = points.share.data() + first;
        A mean = 0;
        if (p.softmax)
          for (int64_t k = 0; k < samples; ++k) mean += share[k] * slope[k];
        for (int64_t k = 0; k < samples; ++k) target[k] = p.softmax ? share[k] * (slope[k] - mean) : slope[k];
      }
    }
  }
}

// D = 32 (256 channels, 8 heads) is what published models have: its loops are unrolled.
template <typename A>
VLP_INLINE void backward_part(const Problem& p, const Gradients& g, const Part& part) {
  if (p.width == 32 && (!part.scatter || part.last_channel - part.first_channel == 32))
    return backward_queries<32, A>(p, g, part);
  return backward_queries<0, A>(p, g, part);
}

VLP_CLONES void forward_f32(const Problem& p, void* out, const Part& part) { forward_part<float>(p, out, part); }
VLP_CLONES void forward_f64(const Problem& p, void* out, const Part& part) { forward_part<double>(p, out, part); }
VLP_CLONES void backward_f32(const Problem& p, const Gradients& g, const Part& part) { backward_part<float>(p, g, part); }
VLP_CLONES void backward_f64(const Problem& p, const Gradients& g, const Part& part) { backward_part<double>(p, g, part); }

// A buffer of this thread that only grows; kRole keeps two apart.
template <typename A, int kRole>
A* buffer(int64_t size) {
  thread_local std::vector<A> memory;
  if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
  return memory.data();
}

// Rows of one head between (S, M, D) and (S, D).
template <typename A, typename T>
void gather(const Problem& p, const T* VLP_RESTRICT from, A* VLP_RESTRICT to) {
  const int64_t step = p.heads * p.width;
  for (int64_t position = 0; position < p.positions; ++position, from += step, to += p.width)
    for (int64_t c = 0; c < p.width; ++c) to[c] = load(from[c]);
}
template <typename A, typename T>
void scatter(const Problem& p, const A* VLP_RESTRICT from, int64_t from_step, T* VLP_RESTRICT to, int64_t width) {
  const int64_t step = p.heads * p.width;
  for (int64_t position = 0; position < p.positions; ++position, from += from_step, to += step)
    for (int64_t c = 0; c < width; ++c) store(to + c, from[c]);
}

Problem problem_of(
    const Tensor& value, const std::vector<Level>& levels, const Tensor& location, const Tensor& weight, bool softmax) {
  STD_TORCH_CHECK(
      value.dim() == 4 && location.dim() == 6 && weight.dim() == 5,
      "ms_deform_attn: value (N, S, M, D), sampling_locations (N, Q, M, L, P, 2) and attention_weights (N, Q, M, L, P)"
      " are wanted");
  Problem p;
  p.batch = value.size(0);
  p.positions = value.size(1);
  p.heads = value.size(2);
  p.width = value.size(3);
  p.queries = location.size(1);
  p.levels = location.size(3);
  p.points = location.size(4);
  p.softmax = softmax;
  p.level = levels;
  p.copied = false;
  STD_TORCH_CHECK(
      location.size(0) == p.batch && location.size(2) == p.heads && location.size(5) == 2 &&
          weight.size(0) == p.batch && weight.size(1) == p.queries && weight.size(2) == p.heads &&
          weight.size(3) == p.levels && weight.size(4) == p.points,
      "ms_deform_attn: sampling_locations or attention_weights do not fit value");
  STD_TORCH_CHECK(
      location.scalar_type() == (value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
      "ms_deform_attn: sampling_locations must be float32 (float64 with float64 values)");
  STD_TORCH_CHECK(p.positions < INT32_MAX, "ms_deform_attn: value has 2^31 positions or more");
  STD_TORCH_CHECK(
      static_cast<int64_t>(levels.size()) == p.levels, "ms_deform_attn: spatial_shapes must hold L levels");
  for (const Level& level : levels)
    STD_TORCH_CHECK(
        level.height >= 0 && level.width >= 0 && level.start >= 0 &&
            level.start + level.height * level.width <= p.positions,
        "ms_deform_attn: spatial_shapes reach beyond the positions of value");
  return p;
}

std::vector<Level> levels_of(const std::vector<int64_t>& shapes) {
  std::vector<Level> levels;
  int64_t start = 0;
  for (size_t i = 0; i + 1 < shapes.size(); i += 2) {
    levels.push_back({start, shapes[i], shapes[i + 1]});
    start += shapes[i] * shapes[i + 1];
  }
  return levels;
}

std::vector<Level> levels_of(const Tensor& shapes, const Tensor& starts) {
  STD_TORCH_CHECK(
      shapes.scalar_type() == ScalarType::Long && starts.scalar_type() == ScalarType::Long && shapes.dim() == 2 &&
          shapes.size(1) == 2 && starts.numel() == shapes.size(0),
      "ms_deform_attn: spatial_shapes (L, 2) and level_start_index (L,) must be int64");
  const Tensor flat = torch::stable::contiguous(shapes), first = torch::stable::contiguous(starts);
  const int64_t *sizes = data<int64_t>(flat), *start = data<int64_t>(first);
  std::vector<Level> levels;
  for (int64_t l = 0; l < shapes.size(0); ++l) levels.push_back({start[l], sizes[2 * l], sizes[2 * l + 1]});
  return levels;
}

// The tensors of a call, contiguous and (but value) in the accumulation type. They must outlive the kernels.
struct Inputs {
  Tensor value, location, weight;
  Problem problem;
  ScalarType sums;

  Inputs(const Tensor& value_, const std::vector<Level>& levels, const Tensor& location_, const Tensor& weight_, bool softmax)
      : value(torch::stable::contiguous(value_)), location(torch::stable::contiguous(location_)), weight(weight_) {
    problem = problem_of(value, levels, location, weight, softmax);
    const ScalarType type = value.scalar_type();
    STD_TORCH_CHECK(
        type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
        "ms_deform_attn: unsupported dtype for value; use float32, float64, float16 or bfloat16");
    sums = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    STD_TORCH_CHECK(
        weight.scalar_type() == type || weight.scalar_type() == sums,
        "ms_deform_attn: attention_weights must have the dtype of value or float32");
    weight = converted(weight);
    Problem& p = problem;
    p.copied = type != sums || (p.heads > 1 && p.queries * p.samples() >= 2 * p.positions);
    p.value = value.const_data_ptr();
    p.location = location.const_data_ptr();
    p.weight = weight.const_data_ptr();
  }

  Tensor converted(const Tensor& tensor) const {
    return torch::stable::contiguous(tensor.scalar_type() == sums ? tensor : torch::stable::to(tensor, sums));
  }

  // Calls action(element of value, element of sums): their types are what counts.
  template <typename Action>
  void by_type(Action action) const {
    switch (value.scalar_type()) {
      case ScalarType::Double:
        return action(double{}, double{});
      case ScalarType::Float:
        return action(float{}, float{});
      case ScalarType::Half:
        return action(Half{}, float{});
      default:
        return action(BFloat16{}, float{});
    }
  }

  // The rows of a head: those of value itself, or copied together.
  template <typename T, typename A>
  void set_value(Part& part) const {
    const T* rows = static_cast<const T*>(problem.value) + problem.row(part.sample, part.head);
    part.value = rows;
    part.step = problem.heads * problem.width;
    if (!problem.copied) return;
    A* together = buffer<A, 0>(problem.positions * problem.width);
    gather(problem, rows, together);
    part.value = together;
    part.step = problem.width;
  }
};

Tensor back(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// Calls work(part) for every head of every sample, its queries cut into as few parts as keep all threads busy.
template <typename Work>
void for_queries(const Problem& p, Work work) {
  const int64_t owners = p.batch * p.heads, threads = torch::stable::get_num_threads();
  const int64_t blocks = std::min((threads + owners - 1) / owners, (p.queries + 63) / 64);
  torch::stable::parallel_for(0, owners * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Part part{};
      part.sample = i / blocks / p.heads;
      part.head = i / blocks % p.heads;
      part.begin = p.queries * (i % blocks) / blocks;
      part.end = p.queries * (i % blocks + 1) / blocks;
      work(part);
    }
  });
}

Tensor forward(
    const Tensor& value, const std::vector<Level>& levels, const Tensor& location, const Tensor& weight, bool softmax) {
  const Inputs in(value, levels, location, weight, softmax);
  const Problem& p = in.problem;
  Tensor out = torch::stable::new_empty(in.weight, {p.batch, p.queries, p.heads * p.width});
  if (p.samples() == 0) {
    torch::stable::zero_(out);
  } else if (out.numel() > 0) {
    void* target = out.mutable_data_ptr();
    const auto kernel = in.sums == ScalarType::Double ? forward_f64 : forward_f32;
    in.by_type([&](auto element, auto sum) {
      for_queries(p, [&](Part part) {
        in.set_value<decltype(element), decltype(sum)>(part);
        kernel(p, target, part);
      });
    });
  }
  return back(out, value.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_,
    const Tensor& value,
    const std::vector<Level>& levels,
    const Tensor& location,
    const Tensor& weight,
    bool softmax,
    const std::vector<bool>& mask) {
  const Inputs in(value, levels, location, weight, softmax);
  const Problem& p = in.problem;
  STD_TORCH_CHECK(
      grad_.numel() == p.batch * p.queries * p.heads * p.width, "ms_deform_attn_backward: grad must be (N, Q, M*D)");
  STD_TORCH_CHECK(mask.size() == 3, "ms_deform_attn_backward: mask must hold 3 values");
  const Tensor grad = in.converted(grad_);
  const std::vector<int64_t> none{0};
  const bool points = mask[1] || mask[2], wants_value = mask[0], work = grad.numel() > 0 && p.samples() > 0;
  Tensor grad_value = !wants_value       ? torch::stable::new_empty(in.value, none)
      : work && p.copied ? torch::stable::new_empty(in.value, in.value.sizes())
                         : torch::stable::new_zeros(in.value, in.value.sizes());
  Tensor grad_location = torch::stable::new_empty(in.location, mask[1] ? in.location.sizes() : none);
  Tensor grad_weight = torch::stable::new_empty(in.weight, mask[2] ? in.weight.sizes() : none);
  if (!work) {
    torch::stable::zero_(grad_location);
    torch::stable::zero_(grad_weight);
    return {grad_value, grad_location, back(grad_weight, weight.scalar_type())};
  }
  const Gradients g{
      grad.const_data_ptr(),
      mask[1] ? grad_location.mutable_data_ptr() : nullptr,
      mask[2] ? grad_weight.mutable_data_ptr() : nullptr};
  const auto kernel = in.sums == ScalarType::Double ? backward_f64 : backward_f32;
  void* target = wants_value ? grad_value.mutable_data_ptr() : nullptr;
  // A head of a sample owns its part of grad_value. With fewer of them than threads the points go first, by query, and then the scatter, by head
  // and block of channels.
  const int64_t owners = p.batch * p.heads, threads = torch::stable::get_num_threads();
  const bool split = wants_value && points && owners < threads;
  in.by_type([&](auto element, auto sum) {
    using T = decltype(element);
    using A = decltype(sum);
    if (points && (split || !wants_value))
      for_queries(p, [&](Part part) {
        in.set_value<T, A>(part);
        part.points = true;
        kernel(p, g, part);
      });
    if (!wants_value) return;
    const int64_t blocks = owners < threads ? std::min((threads + owners - 1) / owners, std::max<int64_t>(1, p.width / 8)) : 1;
    torch::stable::parallel_for(0, owners * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Part part{};
        part.sample = i / blocks / p.heads;
        part.head = i / blocks % p.heads;
        part.end = p.queries;
        part.first_channel = p.width * (i % blocks) / blocks;
        part.last_channel = p.width * (i % blocks + 1) / blocks;
        part.points = points && !split;
        part.scatter = true;
        T* rows = static_cast<T*>(target) + p.row(part.sample, part.head) + part.first_channel;
        if (part.points) {
          in.set_value<T, A>(part);
        } else {
          part.step = p.copied ? p.width : p.heads * p.width;
        }
        if (!p.copied) {
          part.grad_value = rows;
          kernel(p, g, part);
          continue;
        }
        const int64_t size = p.positions * p.width;
        A* together = buffer<A, 1>(size);
        std::fill(together, together + size, A(0));
        part.grad_value = together + part.first_channel;
        kernel(p, g, part);
        scatter(p, together + part.first_channel, p.width, rows, part.last_channel - part.first_channel);
      }
    });
  });
  return {grad_value, grad_location, back(grad_weight, weight.scalar_type())};
}

Tensor forward_list(
    const Tensor& value,
    std::vector<int64_t> shapes,
    const Tensor& location,
    const Tensor& weight,
    bool softmax,
    bool /*deterministic: always*/) {
  return forward(value, levels_of(shapes), location, weight, softmax);
}

Tensor forward_tensor(
    const Tensor& value,
    const Tensor& shapes,
    const Tensor& starts,
    const Tensor& location,
    const Tensor& weight,
    bool softmax,
    bool /*deterministic: always*/) {
  return forward(value, levels_of(shapes, starts), location, weight, softmax);
}

std::tuple<Tensor, Tensor, Tensor> backward_list(
    const Tensor& grad,
    const Tensor& value,
    std::vector<int64_t> shapes,
    const Tensor& location,
    const Tensor& weight,
    bool softmax,
    bool /*deterministic: always*/,
    std::vector<bool> mask) {
  return backward(grad, value, levels_of(shapes), location, weight, softmax, mask);
}

std::tuple<Tensor, Tensor, Tensor> backward_tensor(
    const Tensor& grad,
    const Tensor& value,
    const Tensor& shapes,
    const Tensor& starts,
    const Tensor& location,
    const Tensor& weight,
    bool softmax,
    bool /*deterministic: always*/,
    std::vector<bool> mask) {
  return backward(grad, value, levels_of(shapes, starts), location, weight, softmax, mask);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlp_ops, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&forward_list));
  m.impl("ms_deform_attn.tensor", TORCH_BOX(&forward_tensor));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&backward_list));
  m.impl("ms_deform_attn_backward.tensor", TORCH_BOX(&backward_tensor));
}

}  // namespace vlp
