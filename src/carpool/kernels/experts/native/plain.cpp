// Without vector instructions of a named kind: the same sums in plain loops.
#include "elementwise.h"

namespace carpool {
namespace {

float half(uint16_t bits) {
  const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  union {
    uint32_t bits;
    float value;
  } found;
  if (exponent == 0) {  // too small for an exponent of its own
    found.value = (float)fraction * 5.9604645e-8f;
    found.bits |= sign;
  } else {
    found.bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
  }
  return found.value;
}

void product(int depth, int count, const Matrix& matrix, int64_t block_out, const Row* rows) {
  const uint16_t* scales = matrix.scales + block_out * matrix.groups * kOutputs;
  float result[kMostRows][kOutputs] = {};
  for (int64_t group = 0, block = 0; group < matrix.groups; group++, scales += kOutputs) {
    int32_t sums[kMostRows][kOutputs] = {};
    for (int64_t i = 0; i < matrix.group_blocks && block < matrix.blocks_in; i++, block++) {
      const uint8_t* line = matrix.planes + (block_out * matrix.blocks_in + block) * kLine;
      for (int m = 0; m < 8; m++) {
        uint8_t codes[kLine] = {};
        for (int d = 0; d < depth; d++)
          for (int at = 0; at < kLine; at++)
            codes[at] = (uint8_t)(2 * codes[at] + ((line[d * matrix.stride + at] >> m) & 1));
        for (int r = 0; r < count; r++) {
          const int8_t* four = rows[r].codes + block * kInputs + 4 * m;
          for (int o = 0; o < kOutputs; o++)
            for (int b = 0; b < 4; b++) sums[r][o] += codes[4 * o + b] * four[b];
        }
      }
    }
    const float middle = ((1 << depth) - 1) * 0.5f;
    for (int r = 0; r < count; r++)
      for (int o = 0; o < kOutputs; o++)
        result[r][o] += ((float)sums[r][o] - middle * rows[r].sums[group]) * (half(scales[o]) * rows[r].scales[group]);
  }
  for (int r = 0; r < count; r++)
    for (int o = 0; o < kOutputs; o++) rows[r].result[block_out * kOutputs + o] = result[r][o] * matrix.unit;
}

template <int D, int R>
void multiply(const Matrix& matrix, int64_t block_out, const Row* rows) {
  product(D, R, matrix, block_out, rows);
}

const Kernels kKernels = CARPOOL_KERNELS;

}  // namespace
}  // namespace carpool

const carpool::Kernels* carpool::plain_kernels() { return &kKernels; }
