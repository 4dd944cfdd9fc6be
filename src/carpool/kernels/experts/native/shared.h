// What the kernels of all instruction sets share: the layout of planes and rows, and the table of functions.
//
// A block of planes holds 16 outputs by 32 inputs; one plane of it is a line of 64 bytes. Byte `4 * o + b` of a line
// belongs to output `o`, its bit `m` to input `4 * m + b`: shifted by `m`, a line is 16 lanes of four neighbouring inputs,
// what one instruction multiplies by four activations and sums, without a sum across lanes.
#pragma once
#include <stdint.h>

namespace carpool {

constexpr int kOutputs = 16, kInputs = 32, kLine = 64, kDeepest = 8, kMostRows = 8;

struct Matrix {  // of one expert, read at one depth
  const uint8_t* planes;   // [depth][blocks out][blocks in][64], the most significant first
  int64_t stride;          // bytes from plane to plane
  const uint16_t* scales;  // float16 [blocks out][groups][16]
  int64_t blocks_in, groups, group_blocks;
  float unit;  // factor of all scales
};

struct Row {  // an activation in whole numbers, and where its products go
  const int8_t* codes;          // [blocks in * 32]
  const float *scales, *sums;   // [groups]: of one code; of the codes
  float* result;                // [outputs]
};

// Outputs 16 * block_out .. + 15 of some rows. A row's result hangs on nothing but the row.
using Multiply = void (*)(const Matrix&, int64_t block_out, const Row* rows);
// The same for outputs 16 * from .. 16 * to - 1 of any number of rows, bit for bit.
using MultiplyMany = void (*)(const Matrix&, int64_t from, int64_t to, const Row* rows, int64_t count);

struct Kernels {
  Multiply multiply[kDeepest + 1][kMostRows + 1];  // by depth and number of rows
  // One row to codes: scale of a group = its largest value / 127; `width` values, the rest of the last block is 0.
  void (*quantise)(const float* values, int64_t width, int64_t group, int8_t* codes, float* scales, float* sums);
  void (*swiglu)(float* gate, const float* up, int64_t width);                             // gate := silu(gate) * up
  void (*clamped)(float* gate, const float* up, int64_t width, float alpha, float limit);  // as in GPT-OSS
  int64_t least_many = 0;  // from so many rows on `multiply_many` is faster; 0: there is none
  MultiplyMany multiply_many[kDeepest + 1] = {};
};

// The table's lines, from a file's `multiply<depth, rows>`.
#define CARPOOL_OF_DEPTH(D)                                                                                    \
  {nullptr,        multiply<D, 1>, multiply<D, 2>, multiply<D, 3>, multiply<D, 4>, multiply<D, 5>, multiply<D, 6>, \
   multiply<D, 7>, multiply<D, 8>}
#define CARPOOL_KERNELS                                                                                              \
  {{{}, CARPOOL_OF_DEPTH(1), CARPOOL_OF_DEPTH(2), CARPOOL_OF_DEPTH(3), CARPOOL_OF_DEPTH(4), CARPOOL_OF_DEPTH(5),     \
    CARPOOL_OF_DEPTH(6), CARPOOL_OF_DEPTH(7), CARPOOL_OF_DEPTH(8)},                                                  \
   quantise, swiglu, clamped}

const Kernels* avx512_kernels();
const Kernels* amx_kernels();  // null where they cannot run
const Kernels* avx2_kernels();
const Kernels* plain_kernels();

}  // namespace carpool
