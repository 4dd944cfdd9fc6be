// Planes as they are stored, regrouped into the lines that the kernels read (`carpool.kernels.experts.layout`).
#include <torch/library.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <cstring>

#include "shared.h"

namespace carpool {
namespace {

// Where the bits of a byte go in four bytes: bit t of the stored byte j, input 8 j + t, is bit 2 j + t / 4 of byte t % 4.
std::array<uint32_t, 256> spread() {
  std::array<uint32_t, 256> table;
  for (uint32_t value = 0; value < 256; value++) {
    table[value] = 0;
    for (int t = 0; t < 8; t++) table[value] |= ((value >> t) & 1) << (8 * (t & 3) + (t >> 2));
  }
  return table;
}

void to_lines(const at::Tensor& planes, const std::optional<at::Tensor>& rows, at::Tensor& made) {
  TORCH_CHECK(planes.dim() == 3 && planes.scalar_type() == at::kByte && planes.stride(2) == 1 && made.dim() == 2 &&
                  made.scalar_type() == at::kByte && made.is_contiguous() && made.size(0) == planes.size(0) &&
                  (!rows || (rows->scalar_type() == at::kLong && rows->is_contiguous() && rows->numel() == planes.size(1))),
              "carpool: not planes and the lines for them");
  static const std::array<uint32_t, 256> table = spread();
  const int64_t D = planes.size(0), R = planes.size(1), B = planes.size(2), blocks_in = (8 * B + kInputs - 1) / kInputs;
  const int64_t blocks_out = (R + kOutputs - 1) / kOutputs, stride = made.size(1);
  TORCH_CHECK(blocks_out * blocks_in * kLine <= stride, "carpool: lines of another shape");
  const int64_t* order = rows ? rows->data_ptr<int64_t>() : nullptr;
  const uint8_t* from = planes.data_ptr<uint8_t>();
  uint8_t* to = made.data_ptr<uint8_t>();
  at::parallel_for(0, D * blocks_out, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const int64_t d = i / blocks_out, block = i % blocks_out;
      for (int64_t o = 0; o < kOutputs && block * kOutputs + o < R; o++) {
        const int64_t row = order ? order[block * kOutputs + o] : block * kOutputs + o;
        const uint8_t* bytes = from + d * planes.stride(0) + row * planes.stride(1);
        uint8_t* line = to + d * stride + block * blocks_in * kLine + 4 * o;
        for (int64_t at = 0; at < B; at += 4, line += kLine) {
          uint32_t word = 0;
          for (int64_t j = 0; j < 4 && at + j < B; j++) word |= table[bytes[at + j]] << (2 * j);
          std::memcpy(line, &word, 4);
        }
      }
    }
  });
}

}  // namespace
}  // namespace carpool

TORCH_LIBRARY_FRAGMENT(carpool, m) { m.def("to_lines(Tensor planes, Tensor? rows, Tensor(a!) made) -> ()"); }

TORCH_LIBRARY_IMPL(carpool, CPU, m) { m.impl("to_lines", &carpool::to_lines); }
