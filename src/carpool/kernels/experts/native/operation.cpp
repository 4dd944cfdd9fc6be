// The operation: rows and their experts in, the weighted sum of what the experts give out.
#include <torch/library.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "shared.h"

namespace carpool {
namespace {

constexpr int kLevels = 17;                // of a depth; 16 stands for all that is stored
constexpr int64_t kTaskBytes = 128 << 10;  // of planes: small enough to share evenly, large enough to stream

const Kernels* kernels_of(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  if (avx512 && (name.empty() || name == "amx") && amx_kernels()) return amx_kernels();
  if (avx512 && (name.empty() || name == "avx512")) return avx512_kernels();
  if (avx2 && (name.empty() || name == "avx2")) return avx2_kernels();
#endif
  if (name.empty() || name == "plain") return plain_kernels();
#if defined(CARPOOL_EMULATE)
  if (name == "avx512-emulated") return avx512_kernels();
#endif
  return nullptr;
}

// One projection of every expert: the tensors of `carpool.kernels.experts.layout.Lines`.
struct Projection {
  const uint8_t* planes;   // [E][D][stride]
  const uint16_t* scales;  // [E][L][blocks out][groups][16]
  const float *units, *biases;
  int64_t stride, depths, offered, blocks_in, blocks_out, groups, group_blocks, outputs;

  Matrix at(int64_t expert, int offer) const {
    return {planes + expert * depths * stride,
            stride,
            scales + (expert * offered + offer) * blocks_out * groups * kOutputs,
            blocks_in,
            groups,
            group_blocks,
            units[expert]};
  }
};

Projection projection(const at::Tensor& planes, const at::Tensor& scales, const at::Tensor& units,
                      const std::optional<at::Tensor>& biases, int64_t outputs, int64_t width, int64_t group) {
  TORCH_CHECK(planes.dim() == 3 && planes.scalar_type() == at::kByte && planes.is_contiguous() && scales.dim() == 5 &&
                  scales.scalar_type() == at::kHalf && scales.is_contiguous() && units.scalar_type() == at::kFloat,
              "carpool: not the planes of experts");
  Projection p;
  p.planes = planes.data_ptr<uint8_t>();
  p.scales = reinterpret_cast<const uint16_t*>(scales.data_ptr());
  p.units = units.data_ptr<float>();
  p.biases = biases ? biases->data_ptr<float>() : nullptr;
  p.depths = planes.size(1), p.stride = planes.size(2), p.offered = scales.size(1);
  p.blocks_out = scales.size(2), p.groups = scales.size(3), p.group_blocks = group / kInputs;
  p.blocks_in = (width + kInputs - 1) / kInputs, p.outputs = outputs;
  TORCH_CHECK(p.blocks_out * kOutputs >= outputs && p.blocks_out * p.blocks_in * kLine <= p.stride &&
                  p.groups == (width + group - 1) / group && units.size(0) == planes.size(0),
              "carpool: planes of another shape");
  return p;
}

struct Pair {
  int32_t row, slot, expert;
  int8_t offer, depth;
};

// Rows quantised to whole numbers, [count][padded width].
struct Quantised {
  int8_t* codes;
  float *scales, *sums;
  int64_t padded, groups;

  static int64_t bytes(int64_t count, int64_t padded, int64_t groups) { return count * (padded + 8 * groups) + 192; }
  void place(char*& at, int64_t count, int64_t width, int64_t group) {
    padded = (width + kInputs - 1) / kInputs * kInputs, groups = (width + group - 1) / group;
    codes = reinterpret_cast<int8_t*>(at), at += (count * padded + 63) / 64 * 64;
    scales = reinterpret_cast<float*>(at), at += (count * groups * 4 + 63) / 64 * 64;
    sums = reinterpret_cast<float*>(at), at += (count * groups * 4 + 63) / 64 * 64;
  }
  Row row(int64_t i, float* result) const {
    return {codes + i * padded, scales + i * groups, sums + i * groups, result};
  }
};

struct Task {
  int32_t first, last;  // pairs of one expert
  int32_t from, to;     // blocks of outputs
};

// Memory of the calling thread; it grows and is kept.
struct Scratch {
  std::vector<int32_t> places, starts, position;
  std::vector<Pair> pairs;
  std::vector<Task> into, out;
  std::vector<Row> rows;
  std::vector<char> held;

  char* bytes(int64_t count) {
    if ((int64_t)held.size() < count + 64) held.resize(count + 64);
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(held.data()) + 63) / 64 * 64);
  }
};

Scratch& scratch() {
  static thread_local Scratch held;
  return held;
}

void cut(const std::vector<int32_t>& starts, const std::vector<Pair>& pairs, const Projection& p, std::vector<Task>& tasks) {
  tasks.clear();
  for (size_t i = 0; i + 1 < starts.size(); i++) {
    const int64_t block = p.blocks_in * kLine * pairs[starts[i + 1] - 1].depth;
    const int64_t step = std::max<int64_t>(1, kTaskBytes / block);
    for (int64_t from = 0; from < p.blocks_out; from += step)
      tasks.push_back({starts[i], starts[i + 1], (int32_t)from, (int32_t)std::min(from + step, p.blocks_out)});
  }
}

// Pairs of a task from `first` on that are read at the same depth; returns where they end.
int32_t same_depth(const std::vector<Pair>& pairs, const Task& task, int32_t first) {
  int32_t last = first + 1;
  while (last < task.last && pairs[last].offer == pairs[first].offer) last++;
  return last;
}

// Every pair of a task, each at its depth; an expert's planes come from memory once, and from the cache after that.
template <typename RowOf>
void multiply(const Kernels& kernels, const Projection& p, const Task& task, const std::vector<Pair>& pairs, RowOf row_of) {
  auto many = [&](int32_t first, int32_t last) { return kernels.least_many && last - first >= kernels.least_many; };
  bool few = false;
  for (int32_t i = task.first, last; i < task.last; i = last) {
    last = same_depth(pairs, task, i);
    if (!many(i, last)) {
      few = true;
      continue;
    }
    std::vector<Row>& rows = scratch().rows;
    rows.clear();
    for (int32_t r = i; r < last; r++) rows.push_back(row_of(r));
    kernels.multiply_many[pairs[i].depth](p.at(pairs[i].expert, pairs[i].offer), task.from, task.to, rows.data(), last - i);
  }
  for (int32_t block = task.from; few && block < task.to; block++)
    for (int32_t i = task.first; i < task.last;) {
      const Pair& pair = pairs[i];
      const int32_t last = same_depth(pairs, task, i);
      if (many(i, last)) {
        i = last;
        continue;
      }
      for (int32_t calls = (last - i + kMostRows - 1) / kMostRows; calls; calls--) {
        const int32_t count = (last - i + calls - 1) / calls;  // as even as can be
        Row rows[kMostRows];
        for (int32_t r = 0; r < count; r++) rows[r] = row_of(i + r);
        kernels.multiply[pair.depth][count](p.at(pair.expert, pair.offer), block, rows);
        i += count;
      }
    }
}

at::Tensor read_experts(const at::Tensor& hidden, const at::Tensor& ids, const at::Tensor& weights,
                        const at::Tensor& depth, const at::Tensor& into_planes, const at::Tensor& into_scales,
                        const at::Tensor& into_units, const std::optional<at::Tensor>& into_biases,
                        const at::Tensor& out_planes, const at::Tensor& out_scales, const at::Tensor& out_units,
                        const std::optional<at::Tensor>& out_biases, at::IntArrayRef depths, int64_t inner,
                        int64_t group, double alpha, double limit, const std::string& instructions) {
  const Kernels* found = kernels_of(instructions);
  TORCH_CHECK(found, "carpool: this processor has no kernels named ", instructions);
  const Kernels& kernels = *found;
  const int64_t N = hidden.size(0), H = hidden.size(1), K = ids.size(1), E = into_planes.size(0);
  TORCH_CHECK(group % kInputs == 0 && group > 0, "carpool: groups of ", group, " inputs, not of a multiple of 32");
  const Projection into = projection(into_planes, into_scales, into_units, into_biases, 2 * inner, H, group);
  const Projection out = projection(out_planes, out_scales, out_units, out_biases, H, inner, group);
  const at::Tensor x = hidden.to(at::kFloat).contiguous(), id = ids.to(at::kInt).contiguous(),
                   weight = weights.to(at::kFloat).contiguous(), bits = depth.to(at::kInt).contiguous();
  const float* values = x.data_ptr<float>();
  const int32_t *ids_NK = id.data_ptr<int32_t>(), *depth_NK = bits.data_ptr<int32_t>();
  const float* weights_NK = weight.data_ptr<float>();
  at::Tensor result = at::empty({N, H}, x.options());
  float* result_NH = result.data_ptr<float>();

  int8_t offers[kLevels];
  for (int level = 0; level < kLevels; level++) offers[level] = -1;
  for (size_t i = 0; i < depths.size(); i++) offers[depths[i]] = (int8_t)i;
  offers[kLevels - 1] = (int8_t)depths.size() - 1;

  // Pairs by expert, an expert's by depth: counted, then placed.
  Scratch& memory = scratch();  // of this thread, also inside the parallel part
  std::vector<int32_t>&places = memory.places, &starts = memory.starts, &position = memory.position;
  std::vector<Pair>& pairs = memory.pairs;
  std::vector<Task>&tasks_into = memory.into, &tasks_out = memory.out;
  const int64_t L = depths.size();
  places.assign(E * L + 1, 0), position.assign(N * K, -1);
  auto place_of = [&](int64_t i) -> int64_t {
    if (weights_NK[i] == 0.0f || depth_NK[i] == 0) return -1;
    TORCH_CHECK(ids_NK[i] >= 0 && ids_NK[i] < E, "carpool: expert ", ids_NK[i], " of ", E);
    TORCH_CHECK(depth_NK[i] > 0 && depth_NK[i] < kLevels && offers[depth_NK[i]] >= 0, "carpool: experts are stored at ",
                depths, " bits, not at ", depth_NK[i]);
    return ids_NK[i] * L + offers[depth_NK[i]];
  };
  for (int64_t i = 0; i < N * K; i++) {
    const int64_t place = place_of(i);
    if (place >= 0) places[place + 1]++;
  }
  starts.clear();
  for (int64_t e = 0; e < E; e++) {
    int32_t held = 0;
    for (int64_t l = 0; l < L; l++) held += places[e * L + l + 1];
    if (held) starts.push_back(places[e * L]);
    for (int64_t l = 0; l < L; l++) places[e * L + l + 1] += places[e * L + l];
  }
  const int64_t P = places[E * L];
  starts.push_back((int32_t)P);
  pairs.resize(P);
  for (int64_t i = 0; i < N * K; i++) {
    const int64_t place = place_of(i);
    if (place < 0) continue;
    const int8_t offer = (int8_t)(place % L);
    position[i] = places[place];
    pairs[places[place]++] = {(int32_t)(i / K), (int32_t)(i % K), ids_NK[i], offer, (int8_t)depths[offer]};
  }
  cut(starts, pairs, into, tasks_into), cut(starts, pairs, out, tasks_out);

  const int64_t wide = into.blocks_out * kOutputs, high = out.blocks_out * kOutputs;
  Quantised rows, middle;
  char* at = memory.bytes(Quantised::bytes(N, into.blocks_in * kInputs, into.groups) +
                     Quantised::bytes(P, out.blocks_in * kInputs, out.groups) + P * (wide + high) * 4 + 256);
  rows.place(at, N, H, group), middle.place(at, P, inner, group);
  float* wide_PI = reinterpret_cast<float*>(at);
  float* high_PH = wide_PI + P * wide;
  std::atomic<int64_t> next[5] = {};
  const int threads = at::get_num_threads();

#pragma omp parallel num_threads(threads)
  {
    for (int64_t n; (n = next[0]++) < N;)
      kernels.quantise(values + n * H, H, group, rows.codes + n * rows.padded, rows.scales + n * rows.groups,
                       rows.sums + n * rows.groups);
#pragma omp barrier
    for (int64_t t; (t = next[1]++) < (int64_t)tasks_into.size();)
      multiply(kernels, into, tasks_into[t], pairs, [&](int64_t i) { return rows.row(pairs[i].row, wide_PI + i * wide); });
#pragma omp barrier
    for (int64_t i; (i = next[2]++) < P;) {
      float* gate = wide_PI + i * wide;
      if (into.biases)
        for (int64_t o = 0; o < 2 * inner; o++) gate[o] += into.biases[pairs[i].expert * 2 * inner + o];
      if (alpha != 0.0)
        kernels.clamped(gate, gate + inner, inner, (float)alpha, (float)limit);
      else
        kernels.swiglu(gate, gate + inner, inner);
      kernels.quantise(gate, inner, group, middle.codes + i * middle.padded, middle.scales + i * middle.groups,
                       middle.sums + i * middle.groups);
    }
#pragma omp barrier
    for (int64_t t; (t = next[3]++) < (int64_t)tasks_out.size();)
      multiply(kernels, out, tasks_out[t], pairs, [&](int64_t i) { return middle.row(i, high_PH + i * high); });
#pragma omp barrier
    for (int64_t n; (n = next[4]++) < N;) {
      float* sum = result_NH + n * H;
      std::memset(sum, 0, H * sizeof(float));
      for (int64_t k = 0; k < K; k++) {
        const int32_t i = position[n * K + k];
        if (i < 0) continue;
        const float* from = high_PH + (int64_t)i * high;
        const float* bias = out.biases ? out.biases + (int64_t)pairs[i].expert * H : nullptr;
        const float factor = weights_NK[n * K + k];
        if (bias)
          for (int64_t h = 0; h < H; h++) sum[h] += factor * (from[h] + bias[h]);
        else
          for (int64_t h = 0; h < H; h++) sum[h] += factor * from[h];
      }
    }
  }
  return result.to(hidden.scalar_type());
}

std::vector<std::string> instructions() {
  std::vector<std::string> names;
  for (const char* name : {"amx", "avx512", "avx2", "plain"})
    if (kernels_of(name)) names.push_back(name);
  return names;
}

}  // namespace
}  // namespace carpool

TORCH_LIBRARY_FRAGMENT(carpool, m) {
  m.def(
      "read_experts(Tensor hidden, Tensor ids, Tensor weights, Tensor depth, Tensor into_planes, Tensor into_scales, "
      "Tensor into_units, Tensor? into_biases, Tensor out_planes, Tensor out_scales, Tensor out_units, "
      "Tensor? out_biases, int[] depths, int inner, int group, float alpha, float limit, str instructions) -> Tensor");
  m.def("instructions() -> str[]", &carpool::instructions);
}

TORCH_LIBRARY_IMPL(carpool, CPU, m) { m.impl("read_experts", &carpool::read_experts); }
