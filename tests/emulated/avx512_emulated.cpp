// AVX-512's kernels on a processor without AVX-512: SIMDe computes what their instructions would.
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

static inline __m512 _mm512_cvtepi32_ps(__m512i x) {
  int32_t whole[16];
  float values[16];
  _mm512_storeu_si512(whole, x);
  for (int i = 0; i < 16; i++) values[i] = (float)whole[i];
  return _mm512_loadu_ps(values);
}

static inline __m512 _mm512_cvtph_ps(__m256i x) {
  uint16_t halves[16];
  float values[16];
  _mm256_storeu_si256((__m256i*)halves, x);
  for (int i = 0; i < 16; i++) {
    const __m128 one = _mm_cvtph_ps(_mm_set1_epi16((int16_t)halves[i]));
    values[i] = _mm_cvtss_f32(one);
  }
  return _mm512_loadu_ps(values);
}

#define CARPOOL_EMULATED
#include "avx512.cpp"
