// Loops that a compiler turns into vectors of whatever the file that includes them is compiled for.
#pragma once
#include "shared.h"

namespace carpool {
namespace {

inline float exponential(float x) {  // e^x to 2 ulp, without branches
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const float whole = (x * 1.44269504f + magic) - magic;
  const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691e-4f;
  p = p * rest + 1.3981999e-3f;
  p = p * rest + 8.3334519e-3f;
  p = p * rest + 4.1665796e-2f;
  p = p * rest + 1.6666665e-1f;
  p = p * rest + 5.0000001e-1f;
  p = p * rest * rest + rest + 1.0f;
  union {
    int32_t bits;
    float value;
  } power;
  power.bits = ((int32_t)whole + 127) << 23;
  return p * power.value;
}

void swiglu(float* gate, const float* up, int64_t width) {
  for (int64_t i = 0; i < width; i++) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

void clamped(float* gate, const float* up, int64_t width, float alpha, float limit) {
  for (int64_t i = 0; i < width; i++) {
    const float g = gate[i] > limit ? limit : gate[i];
    const float u = up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
    gate[i] = (u + 1.0f) * (g / (1.0f + exponential(-alpha * g)));
  }
}

void quantise(const float* values, int64_t width, int64_t group, int8_t* codes, float* scales, float* sums) {
  const int64_t padded = (width + kInputs - 1) / kInputs * kInputs;
  for (int64_t start = 0, g = 0; start < padded; start += group, g++) {
    const int64_t held = start + group < width ? group : width - start;
    const int64_t end = start + group < padded ? group : padded - start;
    const float* from = values + start;
    int8_t* to = codes + start;
    float largest = 0.0f;
    for (int64_t i = 0; i < held; i++) {
      const float size = __builtin_fabsf(from[i]);
      largest = largest > size ? largest : size;
    }
    const float steps = largest > 0.0f ? 127.0f / largest : 0.0f;
    int32_t sum = 0;
    for (int64_t i = 0; i < held; i++) {
      const float magic = 12582912.0f;
      const int32_t code = (int32_t)((from[i] * steps + magic) - magic);
      to[i] = (int8_t)code;
      sum += code;
    }
    for (int64_t i = held; i < end; i++) to[i] = 0;
    scales[g] = largest / 127.0f;
    sums[g] = (float)sum;
  }
}

}  // namespace
}  // namespace carpool
