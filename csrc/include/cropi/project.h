// The integers behind `project` (docs/project.md, version 1), for host and device code alike.
#pragma once
#include <cstdint>

#include "cropi/philox.h"

namespace cropi {

// Counter word c2, the same numbers as in cropi_kernels/philox.py.
constexpr uint32_t kProjectSign = 13, kProjectTile = 14, kProjectKeep = 15, kProjectRademacher = 16,
                   kProjectGaussian = 17;
constexpr uint32_t kKeepAll = 1 << 16;  // `keep` counts 65536ths
constexpr int kKeepLevels = 16;         // its binary digits

CROPI_HD Draw project_draw(Key key, uint64_t counter, uint32_t purpose, uint32_t third) {
  return philox(key, uint32_t(counter), uint32_t(counter >> 32), purpose, third);
}

// Where a tile of coordinates goes: coordinate i of it to bucket ((i + shift) mod width) ^ low. `shift` is a multiple
// of `group`, a power of two that divides the width, and `low` is below it: a group of coordinates stays together.
struct TilePlace {
  uint32_t shift, low;
};

CROPI_HD TilePlace tile_place(uint32_t word0, uint32_t word1, uint32_t width, uint32_t group) {
  return TilePlace{uint32_t(uint64_t(word0) * (width / group) >> 32) * group, word1 & (group - 1)};
}

CROPI_HD TilePlace draw_tile_place(Key key, uint64_t tile, uint32_t nonzero, uint32_t width, uint32_t group) {
  const Draw d = project_draw(key, tile, kProjectTile, nonzero);
  return tile_place(d.w[0], d.w[1], width, group);
}

// One step of the Bernoulli(keep / 65536) bits from fair bits, least significant digit of `keep` first.
CROPI_HD uint32_t keep_step(uint32_t kept, uint32_t fair, uint32_t keep, uint32_t level) {
  return keep >> level & 1 ? fair | kept : fair & kept;
}

// Bit b of the result: is coordinate 128 * block + b kept?
CROPI_HD Draw draw_keep_mask(Key key, uint64_t block, uint32_t keep) {
  Draw kept{};
  for (uint32_t level = 0; level < kKeepLevels; ++level) {
    if ((keep & ((2u << level) - 1)) == 0) continue;  // below the lowest digit that is 1: fair & 0
    const Draw fair = project_draw(key, block, kProjectKeep, level);
    for (int w = 0; w < 4; ++w) kept.w[w] = keep_step(kept.w[w], fair.w[w], keep, level);
  }
  return kept;
}

// float32 with the sign bit flipped where `bit` is 1: exact for every value.
CROPI_HD float flip_sign(float x, uint32_t bit) {
  union {
    float f;
    uint32_t u;
  } both{x};
  both.u ^= bit << 31;
  return both.f;
}

}  // namespace cropi
