// What the contrastive losses do with one tile of products on CUDA, in one pass over it; the products themselves are matrix products of cuBLAS.
// Definitions: vlp_ops/contrastive.py, whose PyTorch implementation of the same three operators this replaces.
//
// A warp has kRows rows of the tile and 32 packs of columns: what belongs to a column stays in registers, what belongs to a row is added up by
// shuffles. Logarithms of sums leave the kernel in parts, one number for each row and warp across and each column and warp down.
#include "common.cuh"

#include <limits>
#include <optional>
#include <type_traits>

namespace vlp {
namespace {

// The kernels ask for four blocks on a multiprocessor: without that number the compiler aims higher and some spill.
constexpr int kRows = 32;

// Which columns of a row are its positives: the one in labels, those with the id of the row, or none and weights instead.
enum class Mode { kLabels, kIds, kSoft };

template <typename A>
struct Tile {
  const A* products;
  const A* scale;
  const int64_t *labels, *row_ids, *column_ids;
  const A* soft;
  int64_t rows, width;
};

// log(sum(exp(x))) of numbers that come one after the other. Minus infinity where there is none; never inf - inf.
template <typename A>
struct LogSum {
  A largest, sum;

  __device__ __forceinline__ void clear() {
    largest = -std::numeric_limits<A>::infinity();
    sum = 0;
  }
  __device__ __forceinline__ void add(A x) {
    if (x > largest) {
      sum = sum * exp(largest - x) + 1;
      largest = x;
    } else {
      sum += x == largest ? A(1) : exp(x - largest);
    }
  }
  __device__ __forceinline__ A result() const { return largest + log(sum); }
};

// The same over a warp; every lane gets the result.
template <typename A>
__device__ __forceinline__ A log_sum_of_warp(const LogSum<A>& own) {
  A largest = own.largest;
  for (int distance = 16; distance > 0; distance /= 2) largest = fmax(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  return largest + log(group_sum(own.largest == largest ? own.sum : own.sum * exp(own.largest - largest), 32));
}

struct Share {
  int64_t row, column, across, down, parts;
  bool inside;
};

// `parts` warps lie beside each other. Lanes beyond the last column go along for the shuffles.
template <int kPack>
__device__ __forceinline__ Share share_of(int64_t rows, int64_t width) {
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int64_t parts = (width + 32 * kPack - 1) / (32 * kPack);
  const int64_t down = warp / parts, across = warp - down * parts;
  const int64_t column = (across * 32 + threadIdx.x % 32) * kPack;
  return {down * kRows, column, across, down, parts, column < width};
}

template <int kPack>
int64_t warps_for(int64_t rows, int64_t width) {
  return (width + 32 * kPack - 1) / (32 * kPack) * ((rows + kRows - 1) / kRows);
}

// by_row (1 or 4, rows, warps across) and by_column (1 or 4, warps down, width): log-sum-exp of the negatives; then that of the positives, the
// number of positives and the sum of their logits (with weights: minus infinity, the sum of the weights and of the weighted logits).
template <typename A, int kPack, Mode kMode>
__global__ void __launch_bounds__(kThreads, 4) tile_kernel(Tile<A> tile, A* by_row, A* by_column) {
  const Share share = share_of<kPack>(tile.rows, tile.width);
  if (share.row >= tile.rows) return;
  const int lane = threadIdx.x % 32;
  const A scale = *tile.scale;
  const int64_t last = share.row + kRows < tile.rows ? share.row + kRows : tile.rows;
  const int64_t row_step = tile.rows * share.parts, column_step = (tile.rows + kRows - 1) / kRows * tile.width;
  LogSum<A> negative[kPack], positive[kPack];
  A count[kPack] = {}, total[kPack] = {};
  int64_t ids[kPack] = {};
#pragma unroll
  for (int c = 0; c < kPack; ++c) {
    negative[c].clear();
    positive[c].clear();
    if (kMode == Mode::kIds && share.inside) ids[c] = tile.column_ids[share.column + c];
  }
#pragma unroll 2
  for (int64_t row = share.row; row < last; ++row) {
    LogSum<A> negative_row, positive_row;
    negative_row.clear();
    positive_row.clear();
    A count_row = 0, total_row = 0;
    const int64_t mark = kMode == Mode::kLabels ? tile.labels[row] : kMode == Mode::kIds ? tile.row_ids[row] : 0;
    if (share.inside) {
      A x[kPack], weight[kPack] = {};
      load_pack<kPack>(tile.products + row * tile.width + share.column, x);
      if (kMode == Mode::kSoft) load_pack<kPack>(tile.soft + row * tile.width + share.column, weight);
#pragma unroll
      for (int c = 0; c < kPack; ++c) {
        x[c] *= scale;
        if (kMode == Mode::kSoft) {
          count_row += weight[c];
          total_row += weight[c] * x[c];
        }
        if (kMode == Mode::kLabels ? share.column + c == mark : kMode == Mode::kIds && ids[c] == mark) {
          if (kMode == Mode::kLabels) continue;
          positive_row.add(x[c]);
          count_row += 1;
          total_row += x[c];
          positive[c].add(x[c]);
          count[c] += 1;
          total[c] += x[c];
        } else {
          negative_row.add(x[c]);
          if (by_column != nullptr) negative[c].add(x[c]);
        }
      }
    }
    const A found = log_sum_of_warp(negative_row);
    A* target = by_row + row * share.parts + share.across;
    if (lane == 0) target[0] = found;
    if (kMode == Mode::kLabels) continue;
    const A found_positive = log_sum_of_warp(positive_row);
    count_row = group_sum(count_row, 32);
    total_row = group_sum(total_row, 32);
    if (lane != 0) continue;
    target[row_step] = found_positive;
    target[2 * row_step] = count_row;
    target[3 * row_step] = total_row;
  }
  if (by_column == nullptr || !share.inside) return;
  A* target = by_column + share.down * tile.width + share.column;
#pragma unroll
  for (int c = 0; c < kPack; ++c) {
    target[c] = negative[c].result();
    if (kMode == Mode::kLabels) continue;
    target[column_step + c] = positive[c].result();
    target[2 * column_step + c] = count[c];
    target[3 * column_step + c] = total[c];
  }
}

// What is known of a row or column: gradient of its loss, log-sum-exp of the negatives and of the positives, that of all, number of positives.
template <typename A>
struct Stats {
  const A *grad, *stats, *all;
  int64_t step;
};

template <typename A>
struct Side {
  A grad, all, count, single;
};

template <typename A>
__device__ __forceinline__ Side<A> side_at(const Stats<A>& stats, int64_t i) {
  const A negative = stats.stats[i], positive = stats.stats[stats.step + i];
  // The gradient of a single positive, -sigmoid(N - P): no difference of nearly equal numbers.
  return {stats.grad[i], stats.all[i], stats.stats[2 * stats.step + i], -1 / (1 + exp(positive - negative))};
}

template <typename A>
__device__ __forceinline__ A gradient_of(const Side<A>& side, A x, bool positive) {
  if (!positive) return side.grad * exp(x - side.all);
  return side.grad * (side.count == 1 ? side.single : exp(x - side.all) - 1 / fmax(side.count, A(1)));
}

// Gradient by scale * product. target may be products itself.
template <typename A, typename O, int kPack, Mode kMode>
__global__ void __launch_bounds__(kThreads, 4) gradient_kernel(Tile<A> tile, Stats<A> by_row, Stats<A> by_column, O* target) {
  const Share share = share_of<kPack>(tile.rows, tile.width);
  if (share.row >= tile.rows || !share.inside) return;
  const A scale = *tile.scale;
  const int64_t last = share.row + kRows < tile.rows ? share.row + kRows : tile.rows;
  Side<A> columns[kPack];
  int64_t ids[kPack] = {};
#pragma unroll
  for (int c = 0; c < kPack; ++c) {
    if (by_column.grad != nullptr) columns[c] = side_at(by_column, share.column + c);
    if (kMode == Mode::kIds) ids[c] = tile.column_ids[share.column + c];
  }
  for (int64_t row = share.row; row < last; ++row) {
    const int64_t at = row * tile.width + share.column;
    const int64_t mark = kMode == Mode::kLabels ? tile.labels[row] : kMode == Mode::kIds ? tile.row_ids[row] : 0;
    const Side<A> side = side_at(by_row, row);
    A x[kPack], weight[kPack] = {};
    load_pack<kPack>(tile.products + at, x);
    if (kMode == Mode::kSoft) load_pack<kPack>(tile.soft + at, weight);
#pragma unroll
    for (int c = 0; c < kPack; ++c) {
      const A logit = scale * x[c];
      if (kMode == Mode::kSoft) {
        x[c] = side.grad * (exp(logit - side.all) * side.count - weight[c]);
      } else {
        const bool positive = kMode == Mode::kLabels ? share.column + c == mark : ids[c] == mark;
        x[c] = gradient_of(side, logit, positive);
        if (by_column.grad != nullptr) x[c] += gradient_of(columns[c], logit, positive);
      }
    }
    store_pack<kPack>(target + at, x);
  }
}

// float16 holds nothing below 6e-8, and a derivative of the sigmoid loss is that small for most pairs: there the target holds 2^15 times it.
template <typename O>
constexpr float kTargetScale = std::is_same_v<O, Half> ? 32768.0f : 1.0f;

// Sums of softplus(-z x) and of its derivative by x, one of each for every warp; the derivatives themselves in target unless it is null.
// z = 1 where column = row + diagonal, -1 elsewhere.
template <typename A, typename O, int kPack>
__global__ void __launch_bounds__(kThreads) sigmoid_kernel(
    const A* products, const A* scale_, const A* bias_, int64_t rows, int64_t width, int64_t diagonal, bool paired, O* target, A* sums) {
  const Share share = share_of<kPack>(rows, width);
  if (share.row >= rows) return;
  const A scale = *scale_, bias = *bias_;
  const int64_t last = share.row + kRows < rows ? share.row + kRows : rows;
  A loss = 0, slope = 0;
  for (int64_t row = share.row; share.inside && row < last; ++row) {
    const int64_t at = row * width + share.column;
    A x[kPack];
    load_pack<kPack>(products + at, x);
#pragma unroll
    for (int c = 0; c < kPack; ++c) {
      const A sign = paired && share.column + c == row + diagonal ? A(-1) : A(1);
      const A logit = sign * (scale * x[c] + bias), small = exp(logit < 0 ? logit : -logit);
      loss += fmax(logit, A(0)) + log1p(small);
      x[c] = sign * (logit < 0 ? small : A(1)) / (1 + small);
      slope += x[c];
      x[c] *= static_cast<A>(kTargetScale<O>);
    }
    if (target != nullptr) store_pack<kPack>(target + at, x);
  }
  loss = group_sum(loss, 32);
  slope = group_sum(slope, 32);
  if (threadIdx.x % 32 == 0) {
    const int64_t warp = share.down * share.parts + share.across, warps = (rows + kRows - 1) / kRows * share.parts;
    sums[warp] = loss;
    sums[warps + warp] = slope;
  }
}

// ---- host ----------------------------------------------------------------------------------------------------------

using Maybe = std::optional<Tensor>;

// What the kernels point to; the tensors here keep it alive.
struct Inputs {
  Tensor products, scale, marks, column_ids, soft;
  Mode mode;
  int64_t rows, width;

  template <typename A>
  Tile<A> tile() const {
    const int64_t* at = static_cast<const int64_t*>(marks.const_data_ptr());
    return {
        static_cast<const A*>(products.const_data_ptr()),
        static_cast<const A*>(scale.const_data_ptr()),
        at,
        at,
        static_cast<const int64_t*>(column_ids.const_data_ptr()),
        static_cast<const A*>(soft.const_data_ptr()),
        rows,
        width};
  }
};

Inputs inputs_of(const Tensor& products, const Tensor& scale, const Maybe& labels, const Maybe& ids_a, const Maybe& ids_b, const Maybe& soft) {
  STD_TORCH_CHECK(
      products.dim() == 2 && products.is_contiguous() && scale.numel() == 1 && scale.scalar_type() == products.scalar_type(),
      "contrastive tile: contiguous products (rows, width) and a scale of their dtype are wanted");
  const int64_t rows = products.size(0), width = products.size(1);
  STD_TORCH_CHECK(
      ids_a.has_value() == ids_b.has_value() && labels.has_value() + ids_a.has_value() + soft.has_value() == 1,
      "contrastive tile: one of labels, both ids and soft is wanted");
  const Mode mode = labels.has_value() ? Mode::kLabels : ids_a.has_value() ? Mode::kIds : Mode::kSoft;
  const Maybe& marks = mode == Mode::kLabels ? labels : ids_a;
  STD_TORCH_CHECK(
      mode == Mode::kSoft ? soft->numel() == products.numel() && soft->scalar_type() == products.scalar_type()
                          : marks->numel() == rows && (mode == Mode::kLabels || ids_b->numel() == width),
      "contrastive tile: labels, ids or soft do not fit the products");
  const Tensor none = torch::stable::new_empty(products, {0}, ScalarType::Long);
  return {
      products,
      scale,
      mode == Mode::kSoft ? none : converted(*marks, ScalarType::Long),
      mode == Mode::kIds ? converted(*ids_b, ScalarType::Long) : none,
      mode == Mode::kSoft ? torch::stable::contiguous(*soft) : none,
      mode,
      rows,
      width};
}

template <typename Action>
void by_precision(ScalarType type, Action action) {
  if (type == ScalarType::Float) return action(float{});
  STD_TORCH_CHECK(type == ScalarType::Double, "contrastive tile: products must be float32 or float64");
  action(double{});
}

template <typename A, typename Action>
void by_output(ScalarType type, Action action) {
  if constexpr (sizeof(A) == 4) {
    if (type == ScalarType::Half) return action(Half{});
    if (type == ScalarType::BFloat16) return action(BFloat16{});
  }
  STD_TORCH_CHECK(
      type == (sizeof(A) == 4 ? ScalarType::Float : ScalarType::Double),
      "contrastive tile: the gradient must have the dtype of the products, or a half type for float32");
  action(A{});
}

// Calls action(pack, mode) with numbers known at compile time.
template <typename A, typename Action>
void by_shape(bool packed, Mode mode, Action action) {
  const auto with_mode = [&](auto pack) {
    if (mode == Mode::kLabels) return action(pack, std::integral_constant<Mode, Mode::kLabels>{});
    if (mode == Mode::kIds) return action(pack, std::integral_constant<Mode, Mode::kIds>{});
    action(pack, std::integral_constant<Mode, Mode::kSoft>{});
  };
  if (packed) return with_mode(std::integral_constant<int, 16 / sizeof(A)>{});
  with_mode(std::integral_constant<int, 1>{});
}

// Whether rows of 16 bytes can be read from and written to these.
template <typename A>
bool packs(const Inputs& inputs) {
  return inputs.width % (16 / sizeof(A)) == 0 && aligned(inputs.products) && aligned(inputs.soft);
}

std::tuple<Tensor, Tensor> contrastive_tile(
    const Tensor& products,
    const Tensor& scale,
    Maybe labels,
    Maybe ids_a,
    Maybe ids_b,
    Maybe soft,
    bool columns) {
  const Inputs inputs = inputs_of(products, scale, labels, ids_a, ids_b, soft);
  const OnDevice guard(products);
  const int64_t kinds = inputs.mode == Mode::kLabels ? 1 : 4, rows = inputs.rows, width = inputs.width;
  STD_TORCH_CHECK(rows > 0 && width > 0, "contrastive tile: empty");
  STD_TORCH_CHECK(!columns || inputs.mode != Mode::kSoft, "contrastive tile: soft targets are for rows only");
  Tensor by_row, by_column;
  by_precision(products.scalar_type(), [&](auto number) {
    using A = decltype(number);
    by_shape<A>(packs<A>(inputs), inputs.mode, [&](auto pack, auto mode) {
      constexpr int kPack = decltype(pack)::value;
      constexpr Mode kMode = decltype(mode)::value;
      const int64_t down = (rows + kRows - 1) / kRows, warps = warps_for<kPack>(rows, width);
      by_row = torch::stable::new_empty(products, {kinds, rows, warps / down});
      by_column = torch::stable::new_empty(products, {kinds, down, columns ? width : 0});
      launch(
          &tile_kernel<A, kPack, kMode>,
          blocks_for(warps * 32),
          kThreads,
          stream_of(products),
          inputs.tile<A>(),
          static_cast<A*>(by_row.mutable_data_ptr()),
          columns ? static_cast<A*>(by_column.mutable_data_ptr()) : static_cast<A*>(nullptr));
    });
  });
  return {by_row, by_column};
}

template <typename A>
Stats<A> stats_of(const Tensor& grad, const Tensor& stats, const Tensor& all) {
  STD_TORCH_CHECK(
      grad.is_contiguous() && stats.is_contiguous() && all.is_contiguous() && stats.numel() == 3 * grad.numel() &&
          all.numel() == grad.numel(),
      "contrastive tile: contiguous statistics (3, n), their log-sum-exp (n) and gradients (n) are wanted");
  return {
      static_cast<const A*>(grad.const_data_ptr()),
      static_cast<const A*>(stats.const_data_ptr()),
      static_cast<const A*>(all.const_data_ptr()),
      grad.numel()};
}

void contrastive_tile_gradient(
    const Tensor& products,
    const Tensor& scale,
    Maybe labels,
    Maybe ids_a,
    Maybe ids_b,
    Maybe soft,
    const Tensor& grad_row_,
    const Tensor& row_,
    const Tensor& all_row_,
    Maybe grad_column,
    Maybe column,
    Maybe all_column,
    const Tensor& target) {
  const Inputs inputs = inputs_of(products, scale, labels, ids_a, ids_b, soft);
  const Tensor grad_row = torch::stable::contiguous(grad_row_), row = torch::stable::contiguous(row_),
               all_row = torch::stable::contiguous(all_row_);
  const bool columns = grad_column.has_value();
  STD_TORCH_CHECK(
      grad_row.numel() == inputs.rows && column.has_value() == columns && all_column.has_value() == columns &&
          (!columns || grad_column->numel() == inputs.width) && target.is_contiguous() && target.numel() == products.numel(),
      "contrastive tile: gradients do not fit the products");
  if (products.numel() == 0) return;
  const OnDevice guard(products);
  by_precision(products.scalar_type(), [&](auto number) {
    using A = decltype(number);
    by_output<A>(target.scalar_type(), [&](auto output) {
      using O = decltype(output);
      by_shape<A>(packs<A>(inputs) && aligned(target), inputs.mode, [&](auto pack, auto mode) {
        constexpr int kPack = decltype(pack)::value;
        constexpr Mode kMode = decltype(mode)::value;
        launch(
            &gradient_kernel<A, O, kPack, kMode>,
            blocks_for(warps_for<kPack>(inputs.rows, inputs.width) * 32),
            kThreads,
            stream_of(products),
            inputs.tile<A>(),
            stats_of<A>(grad_row, row, all_row),
            columns ? stats_of<A>(*grad_column, *column, *all_column) : Stats<A>{},
            static_cast<O*>(target.mutable_data_ptr()));
      });
    });
  });
}

Tensor sigmoid_tile(
    const Tensor& products, const Tensor& scale, const Tensor& bias, int64_t diagonal, bool paired, Maybe target) {
  STD_TORCH_CHECK(
      products.dim() == 2 && products.is_contiguous() && scale.numel() == 1 && bias.numel() == 1 &&
          scale.scalar_type() == products.scalar_type() && bias.scalar_type() == products.scalar_type(),
      "sigmoid tile: contiguous products (rows, width), scale and bias of one dtype are wanted");
  STD_TORCH_CHECK(
      !target.has_value() || (target->is_contiguous() && target->numel() == products.numel()),
      "sigmoid tile: the gradient does not fit the products");
  const OnDevice guard(products);
  const int64_t rows = products.size(0), width = products.size(1);
  Tensor sums;
  by_precision(products.scalar_type(), [&](auto number) {
    using A = decltype(number);
    constexpr int kFull = 16 / sizeof(A);
    by_output<A>(target.has_value() ? target->scalar_type() : products.scalar_type(), [&](auto output) {
      using O = decltype(output);
      const bool packed = width % kFull == 0 && aligned(products) && (!target.has_value() || aligned(*target));
      const int64_t warps = packed ? warps_for<kFull>(rows, width) : warps_for<1>(rows, width);
      sums = torch::stable::new_empty(products, {2, warps});
      launch(
          packed ? &sigmoid_kernel<A, O, kFull> : &sigmoid_kernel<A, O, 1>,
          blocks_for(warps * 32),
          kThreads,
          stream_of(products),
          static_cast<const A*>(products.const_data_ptr()),
          static_cast<const A*>(scale.const_data_ptr()),
          static_cast<const A*>(bias.const_data_ptr()),
          rows,
          width,
          diagonal,
          paired,
          target.has_value() ? static_cast<O*>(target->mutable_data_ptr()) : static_cast<O*>(nullptr),
          static_cast<A*>(sums.mutable_data_ptr()));
    });
  });
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlp_ops, VLP_DEVICE_KEY, m) {
  m.impl("contrastive_tile", TORCH_BOX(&contrastive_tile));
  m.impl("contrastive_tile_gradient", TORCH_BOX(&contrastive_tile_gradient));
  m.impl("sigmoid_tile", TORCH_BOX(&sigmoid_tile));
}

}  // namespace vlp
