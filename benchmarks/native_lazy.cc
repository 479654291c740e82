// Lazy Adam on a CPU as one pass over memory, for a float32 table.
//
// Equal ids are found by hashing and grouped. Each thread then takes some of the distinct rows: it
// sums a row's gradients and updates its moments and its parameters in place, while the next rows
// are fetched from memory.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr int64_t kFloatsInCacheLine = 16;
constexpr int64_t kRowsAhead = 8;          // fetched while a row is updated
constexpr int64_t kFewOccurrences = 2048;  // fewer take less time than starting a thread

// The positions of equal ids, group by group: those of group k are order[start[k]] and on, up to
// order[start[k + 1]]. Ids outside of the table are in no group.
struct Groups {
  std::vector<int32_t> row, start, order;

  void find(const int32_t* ids, int64_t n, int64_t num_rows) {
    int bits = 1;
    while ((int64_t{1} << bits) < 2 * n) ++bits;
    buckets_.assign(size_t{1} << bits, -1);
    group_.resize(n);
    row.clear();
    start.assign(1, 0);
    for (int64_t i = 0; i < n; ++i) {
      group_[i] = -1;
      if (ids[i] < 0 || ids[i] >= num_rows) continue;
      const int32_t group = group_of(ids[i], bits);
      group_[i] = group;
      ++start[group + 1];
    }
    for (size_t k = 1; k < start.size(); ++k) start[k] += start[k - 1];
    next_.assign(start.begin(), start.end());
    order.resize(start.back());
    for (int64_t i = 0; i < n; ++i) {
      if (group_[i] >= 0) order[next_[group_[i]]++] = static_cast<int32_t>(i);
    }
  }

 private:
  // The group of an id; a new one if the id is new.
  int32_t group_of(int32_t id, int bits) {
    const uint64_t mask = buckets_.size() - 1;
    uint64_t bucket = (static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u) >> (64 - bits);
    while (buckets_[bucket] >= 0) {
      if (row[buckets_[bucket]] == id) return buckets_[bucket];
      bucket = (bucket + 1) & mask;
    }
    buckets_[bucket] = static_cast<int32_t>(row.size());
    row.push_back(id);
    start.push_back(0);
    return buckets_[bucket];
  }

  std::vector<int32_t> buckets_, group_, next_;
};

struct Step {
  const float* values;  // (n, columns)
  int64_t columns;
  float *params, *mu, *nu;  // (rows, columns)
  float learning_rate, eps, mu_rate, nu_rate;

  void prefetch(int64_t row) const {
    for (float* table : {params, mu, nu}) {
      for (int64_t j = 0; j < columns; j += kFloatsInCacheLine) {
        __builtin_prefetch(table + row * columns + j, 1);
      }
    }
  }

  void update_row(int64_t row, const float* __restrict gradient) const {
    float* __restrict p = params + row * columns;
    float* __restrict m = mu + row * columns;
    float* __restrict v = nu + row * columns;
    for (int64_t j = 0; j < columns; ++j) {
      const float g = gradient[j];
      m[j] += mu_rate * (g - m[j]);
      v[j] += nu_rate * (g * g - v[j]);
      p[j] -= learning_rate * m[j] / (std::sqrt(v[j]) + eps);
    }
  }

  void update_groups(const Groups& groups, int64_t begin, int64_t end) const {
    std::vector<float> sum(columns);
    for (int64_t k = begin; k < std::min(begin + kRowsAhead, end); ++k) prefetch(groups.row[k]);
    for (int64_t k = begin; k < end; ++k) {
      if (k + kRowsAhead < end) prefetch(groups.row[k + kRowsAhead]);
      const float* gradient = values + groups.order[groups.start[k]] * columns;
      if (groups.start[k + 1] - groups.start[k] > 1) {
        std::copy(gradient, gradient + columns, sum.begin());
        for (int32_t i = groups.start[k] + 1; i < groups.start[k + 1]; ++i) {
          const float* more = values + groups.order[i] * columns;
          for (int64_t j = 0; j < columns; ++j) sum[j] += more[j];
        }
        gradient = sum.data();
      }
      update_row(groups.row[k], gradient);
    }
  }
};

// The first group at or behind an occurrence.
int64_t group_at(const Groups& groups, int64_t occurrence) {
  const auto begin = groups.start.begin();
  return std::lower_bound(begin, groups.start.end() - 1, occurrence) - begin;
}

// ids (n,), values (n, D), numbers (2,): the learning rate and epsilon, bias corrections included;
// parameters, mu and nu (V, D), aliased to the results. mu_rate and nu_rate are 1 - b1 and 1 - b2.
ffi::Error lazy_adam(ffi::Buffer<ffi::S32> ids, ffi::Buffer<ffi::F32> values,
                     ffi::Buffer<ffi::F32> numbers, ffi::Buffer<ffi::F32> params,
                     ffi::Buffer<ffi::F32>, ffi::Buffer<ffi::F32>, float mu_rate,
                     float nu_rate, ffi::ResultBuffer<ffi::F32> new_params,
                     ffi::ResultBuffer<ffi::F32> new_mu, ffi::ResultBuffer<ffi::F32> new_nu) {
  static thread_local Groups groups;  // keeps its memory from call to call
  groups.find(ids.typed_data(), ids.element_count(), params.dimensions()[0]);
  const float* number = numbers.typed_data();
  const Step step{values.typed_data(),  params.dimensions()[1], new_params->typed_data(),
                  new_mu->typed_data(), new_nu->typed_data(),   number[0],
                  number[1],            mu_rate,                nu_rate};
  const int64_t n = groups.order.size();
  const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  const int64_t parts = std::clamp<int64_t>(n / kFewOccurrences, 1, cores);
  const Groups& found = groups;
  std::vector<std::thread> threads;
  for (int64_t part = parts - 1; part >= 0; --part) {
    const int64_t begin = group_at(found, n * part / parts);
    const int64_t end = group_at(found, n * (part + 1) / parts);
    const auto update = [&step, &found, begin, end] { step.update_groups(found, begin, end); };
    part ? static_cast<void>(threads.emplace_back(update)) : update();
  }
  for (std::thread& thread : threads) thread.join();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(NativeLazyAdam, lazy_adam,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("mu_rate")
                                  .Attr<float>("nu_rate")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
