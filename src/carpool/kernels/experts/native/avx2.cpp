// AVX2: a line is two vectors; products of neighbours are summed in 16 bits as long as they fit.
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>
#include <stdint.h>

namespace carpool {
namespace {

struct V {
  using Bytes = __m256i;
  using Floats = __m256;
  static constexpr int kLanes = 8, kBytes = 32;

  static Bytes zero() { return _mm256_setzero_si256(); }
  static Bytes load(const uint8_t* at) { return _mm256_loadu_si256((const __m256i*)at); }
  template <int W>
  static Bytes mask() { return _mm256_set1_epi8(W == 1 ? 0x55 : W == 2 ? 0x33 : 0x0F); }
  template <int W>
  static Bytes up(Bytes x) { return _mm256_slli_epi16(x, W); }
  template <int W>
  static Bytes down(Bytes x) { return _mm256_srli_epi16(x, W); }
  template <int W>
  static Bytes choose(Bytes inside, Bytes outside) {
    return _mm256_or_si256(_mm256_and_si256(mask<W>(), inside), _mm256_andnot_si256(mask<W>(), outside));
  }
  template <int W>
  static void fields(Bytes x, Bytes* codes, int first, int step) {
    const Bytes low = _mm256_set1_epi8((1 << W) - 1);
    for (int i = 0; i < 8 / W; i++)
      codes[first + i * step] = _mm256_and_si256(i ? _mm256_srli_epi16(x, i * W) : x, low);
  }
  static Floats all(float x) { return _mm256_set1_ps(x); }
  static Floats halves(const uint16_t* at) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)at)); }
  static Floats times(Floats x, Floats y) { return _mm256_mul_ps(x, y); }
  static Floats plus_product(Floats z, Floats x, Floats y) { return _mm256_fmadd_ps(x, y, z); }
  static Floats minus_product(Floats z, Floats x, Floats y) { return _mm256_fnmadd_ps(x, y, z); }
  static void store(float* at, Floats x) { _mm256_storeu_ps(at, x); }

  template <int D>
  struct Sums {
    // 2 * (2^D - 1) * 127 a pair: so many pairs fit into 16 bits; eight bits are multiplied in two parts
    static constexpr int kPairs = D <= 4 ? 8 : D == 5 ? 4 : D == 6 ? 2 : 1;
    __m256i sum;

    void clear() { sum = _mm256_setzero_si256(); }

    static __m256i pairs(Bytes code, const int8_t* row) {
      int32_t four;
      __builtin_memcpy(&four, row, 4);
      return _mm256_maddubs_epi16(code, _mm256_set1_epi32(four));
    }
    void widen(__m256i pair, int16_t factor) {
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pair, _mm256_set1_epi16(factor)));
    }
    void add(const Bytes* codes, const int8_t* row) {
      if constexpr (D == 8) {
        const Bytes low = _mm256_set1_epi8(0x7F), one = _mm256_set1_epi8(1);
        for (int m = 0; m < 8; m++) {
          widen(pairs(_mm256_and_si256(codes[m], low), row + 4 * m), 1);
          widen(pairs(_mm256_and_si256(_mm256_srli_epi16(codes[m], 7), one), row + 4 * m), 128);
        }
      } else {
        for (int m = 0; m < 8; m += kPairs) {
          __m256i pair = pairs(codes[m], row + 4 * m);
          for (int i = 1; i < kPairs; i++) pair = _mm256_add_epi16(pair, pairs(codes[m + i], row + 4 * (m + i)));
          widen(pair, 1);
        }
      }
    }
    Floats total() const { return _mm256_cvtepi32_ps(sum); }
  };
};

}  // namespace
}  // namespace carpool

#include "body.h"

const carpool::Kernels* carpool::avx2_kernels() { return &kKernels; }
