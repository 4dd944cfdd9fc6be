// A checksum at the speed of memory, for what is read from disks: it finds accidents, not attacks.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstdint>
#include <cstring>

namespace carpool {
namespace {

constexpr int kLanes = 8;
constexpr uint64_t kOdd = 0x9E3779B97F4A7C15ull;

inline uint64_t turned(uint64_t x) { return x << 27 | x >> 37; }

// Every step is a bijection of its lane for a given word, and of the word for a given lane: no single changed word is
// missed. Lanes only hide the time that a product takes.
int64_t checksum(at::TensorList parts) {
  uint64_t lane[kLanes];
  for (int j = 0; j < kLanes; j++) lane[j] = kOdd * (j + 1);
  for (const at::Tensor& part : parts) {
    TORCH_CHECK(part.scalar_type() == at::kByte && part.is_contiguous() && part.numel() % (8 * kLanes) == 0,
                "carpool: checksums are of bytes in blocks of 64");
    const uint8_t* at = part.data_ptr<uint8_t>();
    for (const uint8_t* end = at + part.numel(); at < end; at += 8 * kLanes) {
      uint64_t word[kLanes];
      std::memcpy(word, at, sizeof word);
      for (int j = 0; j < kLanes; j++) lane[j] = turned(lane[j] ^ word[j]) * kOdd;
    }
  }
  uint64_t sum = 0;
  for (int j = 0; j < kLanes; j++) sum = turned(sum ^ lane[j]) * kOdd;
  return (int64_t)sum;
}

}  // namespace
}  // namespace carpool

TORCH_LIBRARY_FRAGMENT(carpool, m) { m.def("checksum(Tensor[] parts) -> int", &carpool::checksum); }
