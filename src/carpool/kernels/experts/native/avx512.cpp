// AVX-512 with VNNI: a line is one vector, and one instruction multiplies and sums 64 codes. AMX where it is, for many rows.
#ifndef CARPOOL_EMULATED
#if __has_include(<amxint8intrin.h>)  // compilers since 2021
#define CARPOOL_AMX
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,amx-tile,amx-int8")
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif
#include <immintrin.h>
#endif
#include <stdint.h>

namespace carpool {
namespace {

struct V {
  using Bytes = __m512i;
  using Floats = __m512;
  static constexpr int kLanes = 16, kBytes = 64;

  static Bytes zero() { return _mm512_setzero_si512(); }
  static Bytes load(const uint8_t* at) { return _mm512_loadu_si512(at); }
  template <int W>
  static Bytes mask() { return _mm512_set1_epi8(W == 1 ? 0x55 : W == 2 ? 0x33 : 0x0F); }
  template <int W>
  static Bytes up(Bytes x) { return _mm512_slli_epi16(x, W); }
  template <int W>
  static Bytes down(Bytes x) { return _mm512_srli_epi16(x, W); }
  template <int W>  // bits of the first where the mask has ones, of the second elsewhere
  static Bytes choose(Bytes inside, Bytes outside) {
    return _mm512_ternarylogic_epi32(mask<W>(), inside, outside, 0xCA);
  }
  template <int W>  // the fields of W bits of every byte, each to a byte of its own
  static void fields(Bytes x, Bytes* codes, int first, int step) {
    const Bytes low = _mm512_set1_epi8((1 << W) - 1);
    for (int i = 0; i < 8 / W; i++)
      codes[first + i * step] = _mm512_and_si512(i ? _mm512_srli_epi16(x, i * W) : x, low);
  }
  static Floats all(float x) { return _mm512_set1_ps(x); }
  static Floats halves(const uint16_t* at) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at)); }
  static Floats times(Floats x, Floats y) { return _mm512_mul_ps(x, y); }
  static Floats plus_product(Floats z, Floats x, Floats y) { return _mm512_fmadd_ps(x, y, z); }
  static Floats minus_product(Floats z, Floats x, Floats y) { return _mm512_fnmadd_ps(x, y, z); }
  static void store(float* at, Floats x) { _mm512_storeu_ps(at, x); }

  template <int D>
  struct Sums {
    __m512i even, odd;  // two chains: an instruction takes four cycles

    void clear() { even = odd = _mm512_setzero_si512(); }
    void add(const Bytes* codes, const int8_t* row) {
      for (int m = 0; m < 8; m += 2) {
        int32_t four[2];
        __builtin_memcpy(four, row + 4 * m, 8);
        even = _mm512_dpbusd_epi32(even, codes[m], _mm512_set1_epi32(four[0]));
        odd = _mm512_dpbusd_epi32(odd, codes[m + 1], _mm512_set1_epi32(four[1]));
      }
    }
    Floats total() const { return _mm512_cvtepi32_ps(_mm512_add_epi32(even, odd)); }
  };
};

}  // namespace
}  // namespace carpool

#include "body.h"

const carpool::Kernels* carpool::avx512_kernels() { return &kKernels; }

#ifdef CARPOOL_AMX
#include "amx.h"
#else
const carpool::Kernels* carpool::amx_kernels() { return nullptr; }
#endif
