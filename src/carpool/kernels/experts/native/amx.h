// AMX: 16 rows by 16 outputs at a time, for an expert with many rows. A line of planes, unpacked, is a row of a tile just
// as the instruction wants it, and whole numbers are summed exactly: the same bits as without it, only sooner.
#pragma once
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace carpool {
namespace {

constexpr int kTile = 16;  // rows of a tile
constexpr int kUnpacked = 8 * V::kBytes;  // bytes of a block's codes

// What a thread keeps: no container of the standard library, whose code would be compiled for these instructions, too.
struct Kept {
  char* at = nullptr;
  int64_t size = 0;

  ~Kept() { free(at); }
  char* bytes(int64_t wanted) {
    if (size < wanted) {
      free(at);
      size = (wanted + 63) / 64 * 64;
      at = static_cast<char*>(aligned_alloc(64, size));
    }
    return at;
  }
};

// Tiles 0 and 1 hold sums; 2 and 3 are 64 inputs of rows and codes; 4 and 5 are 32 inputs, of a block without a neighbour.
void configure() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 32, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 8};
  } shape;
  _tile_loadconfig(&shape);
}

// Sums over blocks first .. end - 1 of 16 rows, in tile T: a compiler wants its number spelled out.
#define CARPOOL_SUM_GROUP(T)                                                                                          \
  inline void sum_group_##T(const int8_t* rows, int64_t width, const uint8_t* codes, int64_t first, int64_t end,      \
                            int32_t* sums) {                                                                          \
    _tile_zero(T);                                                                                                    \
    int64_t block = first;                                                                                            \
    for (; block + 1 < end; block += 2) {                                                                             \
      _tile_loadd(2, rows + block * kInputs, width);                                                                  \
      _tile_loadd(3, codes + block * kUnpacked, 64);                                                                  \
      _tile_dpbsud(T, 2, 3);                                                                                          \
    }                                                                                                                 \
    if (block < end) {                                                                                                \
      _tile_loadd(4, rows + block * kInputs, width);                                                                  \
      _tile_loadd(5, codes + block * kUnpacked, 64);                                                                  \
      _tile_dpbsud(T, 4, 5);                                                                                          \
    }                                                                                                                 \
    _tile_stored(T, sums, 64);                                                                                        \
  }
CARPOOL_SUM_GROUP(0)
CARPOOL_SUM_GROUP(1)

// As `multiply`, for outputs 16 * from .. 16 * to - 1 of any number of rows.
template <int D>
void multiply_many(const Matrix& matrix, int64_t from, int64_t to, const Row* rows, int64_t count) {
  static thread_local Kept kept;
  const int64_t blocks = matrix.blocks_in, groups = matrix.groups, width = blocks * kInputs;
  const int64_t tiles = (count + kTile - 1) / kTile, padded = tiles * kTile;
  char* at = kept.bytes(blocks * kUnpacked + padded * width + padded * groups * 8 + 2 * kTile * 64);
  uint8_t* codes = reinterpret_cast<uint8_t*>(at);
  int8_t* packed = reinterpret_cast<int8_t*>(at += blocks * kUnpacked);
  float* factors = reinterpret_cast<float*>(at += padded * width);  // [tiles][groups][2][16]: scales and sums of rows
  int32_t* sums = reinterpret_cast<int32_t*>(at += padded * groups * 8);  // [2][16][16]
  for (int64_t r = 0; r < padded; r++) {
    const bool held = r < count;
    if (held)
      __builtin_memcpy(packed + r * width, rows[r].codes, width);
    else
      __builtin_memset(packed + r * width, 0, width);
    float* own = factors + r / kTile * groups * 2 * kTile + r % kTile;
    for (int64_t g = 0; g < groups; g++, own += 2 * kTile) {
      own[0] = held ? rows[r].scales[g] : 0.0f;
      own[kTile] = held ? rows[r].sums[g] : 0.0f;
    }
  }
  const V::Floats middle = V::all(((1 << D) - 1) * 0.5f), unit = V::all(matrix.unit);
  configure();
  for (int64_t block_out = from; block_out < to; block_out++) {
    const uint8_t* line = matrix.planes + block_out * blocks * kLine;
    for (int64_t block = 0; block < blocks; block++, line += kLine) {
      for (int d = 0; d < D; d++) __builtin_prefetch(line + d * matrix.stride + kAhead);
      V::Bytes unpacked[8];
      unpack<D>(line, matrix.stride, unpacked);
      for (int m = 0; m < 8; m++) _mm512_store_si512(codes + block * kUnpacked + m * V::kBytes, unpacked[m]);
    }
    const uint16_t* scales = matrix.scales + block_out * groups * kOutputs;
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int8_t* own = packed + tile * kTile * width;
      const float* factor = factors + tile * groups * 2 * kTile;
      V::Floats result[kTile];
      for (int r = 0; r < kTile; r++) result[r] = V::all(0.0f);
      auto summed = [&](int64_t g) {  // two tiles of sums in turn, so that one is filled while the other is scaled
        const int64_t first = g * matrix.group_blocks, past = first + matrix.group_blocks;
        const int64_t end = past < blocks ? past : blocks;
        if (g & 1)
          sum_group_1(own, width, codes, first, end, sums + kTile * kOutputs);
        else
          sum_group_0(own, width, codes, first, end, sums);
      };
      summed(0);
      for (int64_t g = 0; g < groups; g++, factor += 2 * kTile) {
        if (g + 1 < groups) summed(g + 1);
        const int32_t* found = sums + (g & 1) * kTile * kOutputs;
        const V::Floats scale = V::halves(scales + g * kOutputs);
        for (int r = 0; r < kTile; r++) {
          const V::Floats total = _mm512_cvtepi32_ps(_mm512_load_si512(found + r * kOutputs));
          const V::Floats centred = V::minus_product(total, middle, V::all(factor[kTile + r]));
          result[r] = V::plus_product(result[r], centred, V::times(scale, V::all(factor[r])));
        }
      }
      for (int r = 0; r < kTile && tile * kTile + r < count; r++)
        V::store(rows[tile * kTile + r].result + block_out * kOutputs, V::times(result[r], unit));
    }
  }
  _tile_release();
}

constexpr Kernels with_amx(Kernels kernels) {
  kernels.least_many = 9;
  kernels.multiply_many[1] = multiply_many<1>, kernels.multiply_many[2] = multiply_many<2>;
  kernels.multiply_many[3] = multiply_many<3>, kernels.multiply_many[4] = multiply_many<4>;
  kernels.multiply_many[5] = multiply_many<5>, kernels.multiply_many[6] = multiply_many<6>;
  kernels.multiply_many[7] = multiply_many<7>, kernels.multiply_many[8] = multiply_many<8>;
  return kernels;
}

const Kernels kWithAmx = with_amx(kKernels);

// Whether the processor has the instructions and the system lets this process use them.
bool amx_allowed() {
  uint32_t a = 7, b, c = 0, d;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  constexpr uint32_t kTiles = 1u << 24, kInt8 = 1u << 25;
  constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return (d & kTiles) && (d & kInt8) && syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
}

}  // namespace
}  // namespace carpool

const carpool::Kernels* carpool::amx_kernels() {
  static const bool allowed = amx_allowed();
  return allowed ? &kWithAmx : nullptr;
}
