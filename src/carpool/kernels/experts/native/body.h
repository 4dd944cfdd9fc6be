// The product of planes and rows, over a file's vectors `V`; see shared.h for the layout.
#pragma once
#include "elementwise.h"

namespace carpool {
namespace {

constexpr int kAhead = 1536;  // bytes that are asked for before they are needed, in every plane
constexpr int kParts = kOutputs / V::kLanes;  // vectors that make up a line

// Two fields of `W` bits, one of each argument, beside each other: those at even places, and those at odd ones.
template <int W>
inline V::Bytes even(V::Bytes high, V::Bytes low) {
  return V::template choose<W>(low, V::template up<W>(high));
}
template <int W>
inline V::Bytes odd(V::Bytes high, V::Bytes low) {
  return V::template choose<W>(V::template down<W>(low), high);
}

// Plane `D - at` of the last `at` ones; one that is not read is zero.
template <int D>
inline V::Bytes plane(const uint8_t* line, int64_t stride, int at) {
  return at > D ? V::zero() : V::load(line + (D - at) * stride);
}

// 32 inputs of a line's outputs: codes[m] has those of inputs 4 m .. 4 m + 3, four in a lane.
template <int D>
inline void unpack(const uint8_t* line, int64_t stride, V::Bytes* codes) {
  if constexpr (D == 1) {
    const V::Bytes a = V::load(line);
    V::template fields<1>(a, codes, 0, 1);
  } else if constexpr (D == 2) {
    const V::Bytes a = plane<D>(line, stride, 2), b = plane<D>(line, stride, 1);
    V::template fields<2>(even<1>(a, b), codes, 0, 2);
    V::template fields<2>(odd<1>(a, b), codes, 1, 2);
  } else if constexpr (D <= 4) {
    const V::Bytes a = plane<D>(line, stride, 4), b = plane<D>(line, stride, 3), c = plane<D>(line, stride, 2),
                   d = plane<D>(line, stride, 1);
    const V::Bytes ab = even<1>(a, b), cd = even<1>(c, d), ba = odd<1>(a, b), dc = odd<1>(c, d);
    V::template fields<4>(even<2>(ab, cd), codes, 0, 4);
    V::template fields<4>(even<2>(ba, dc), codes, 1, 4);
    V::template fields<4>(odd<2>(ab, cd), codes, 2, 4);
    V::template fields<4>(odd<2>(ba, dc), codes, 3, 4);
  } else {
    V::Bytes nibbles[2][4];
    for (int half = 0; half < 2; half++) {
      const int at = half ? 4 : 8;
      const V::Bytes a = plane<D>(line, stride, at), b = plane<D>(line, stride, at - 1),
                     c = plane<D>(line, stride, at - 2), d = plane<D>(line, stride, at - 3);
      const V::Bytes ab = even<1>(a, b), cd = even<1>(c, d), ba = odd<1>(a, b), dc = odd<1>(c, d);
      nibbles[half][0] = even<2>(ab, cd), nibbles[half][1] = even<2>(ba, dc);
      nibbles[half][2] = odd<2>(ab, cd), nibbles[half][3] = odd<2>(ba, dc);
    }
    for (int m = 0; m < 4; m++) {
      codes[m] = even<4>(nibbles[0][m], nibbles[1][m]);
      codes[m + 4] = odd<4>(nibbles[0][m], nibbles[1][m]);
    }
  }
}

template <int D, int R>
void multiply(const Matrix& matrix, int64_t block_out, const Row* rows) {
  const int64_t blocks = matrix.blocks_in;
  const uint8_t* line = matrix.planes + block_out * blocks * kLine;
  const uint16_t* scales = matrix.scales + block_out * matrix.groups * kOutputs;
  const V::Floats middle = V::all(((1 << D) - 1) * 0.5f);
  V::Floats result[R][kParts];
  for (int r = 0; r < R; r++)
    for (int part = 0; part < kParts; part++) result[r][part] = V::all(0.0f);
  for (int64_t group = 0, block = 0; group < matrix.groups; group++, scales += kOutputs) {
    const int64_t end = block + matrix.group_blocks < blocks ? block + matrix.group_blocks : blocks;
    V::Sums<D> sums[R][kParts];
    for (int r = 0; r < R; r++)
      for (int part = 0; part < kParts; part++) sums[r][part].clear();
    for (; block < end; block++, line += kLine) {
      for (int d = 0; d < D; d++) __builtin_prefetch(line + d * matrix.stride + kAhead);
      for (int part = 0; part < kParts; part++) {
        asm volatile("" ::: "memory");  // or a row's activations are kept for the next part, on the stack
        V::Bytes codes[8];
        unpack<D>(line + part * V::kBytes, matrix.stride, codes);
        for (int r = 0; r < R; r++) sums[r][part].add(codes, rows[r].codes + block * kInputs);
      }
    }
    for (int part = 0; part < kParts; part++) {
      const V::Floats scale = V::halves(scales + part * V::kLanes);
      for (int r = 0; r < R; r++) {
        const V::Floats centred = V::minus_product(sums[r][part].total(), middle, V::all(rows[r].sums[group]));
        result[r][part] = V::plus_product(result[r][part], centred, V::times(scale, V::all(rows[r].scales[group])));
      }
    }
  }
  const V::Floats unit = V::all(matrix.unit);
  for (int r = 0; r < R; r++)
    for (int part = 0; part < kParts; part++)
      V::store(rows[r].result + block_out * kOutputs + part * V::kLanes, V::times(result[r][part], unit));
}

const Kernels kKernels = CARPOOL_KERNELS;

}  // namespace
}  // namespace carpool
