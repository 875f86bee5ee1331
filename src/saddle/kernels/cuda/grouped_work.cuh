// What a block works on: tiles of one expert, some of its pairs, and 256 rows of its weight.
//
// Tiles are numbered expert by expert, block of rows by block of rows, the expert's stretches of pairs one after the
// other: those that run together share a weight in the second-level cache. A block's first tile is its own number; then
// it claims the next one that nobody has, one tile ahead of need.
#pragma once
#include "grouped_ptx.cuh"

struct Params {
  TensorMap weights;
  const u8* packed;           // the same weights, for their scales
  const u8* input;            // [tokens or pairs][K] E4M3
  const float* input_scales;  // [tokens or pairs][K / 128]
  const int* counts;          // [NUM_EXPERTS] pairs of each expert
  const int* lists;           // [NUM_EXPERTS][capacity] their pairs
  const float* shares;        // [pairs] routing weights (down)
  void* output;               // up: [pairs][INTERMEDIATE] E4M3; down: [pairs][HIDDEN] bf16
  float* output_scales;       // up: [pairs][INTERMEDIATE / 128]
  int* queue;                 // tiles claimed, blocks that are done; zeros between launches
  int capacity;
};

struct alignas(16) Tile {
  int expert;
  int block;  // of rows
  int first;  // place in `lists`
  int count;  // pairs, at most 128; 0: no tile is left
};

struct Shared {
  u64 full[STAGES], empty[STAGES];
  u64 told[TILE_SLOTS], read[TILE_SLOTS];
  Tile tiles[TILE_SLOTS];
  float scales[STAGES][PAIRS];
  float largest[2][2][SLAB];  // [exchange % 2][warpgroup][pair]
  int ends[NUM_EXPERTS];      // stretches of pairs up to and with this expert
};
constexpr int SHARED_BYTES = 1024 + STAGES * STAGE_BYTES + sizeof(Shared);

// All threads; ends with their barrier.
DEVICE void count_stretches(const Params& p, Shared* s) {
  const int thread = threadIdx.x;
  int sum = 0;
  if (thread < NUM_EXPERTS) s->ends[thread] = sum = (p.counts[thread] + PAIRS - 1) / PAIRS;
  __syncthreads();
  for (int offset = 1; offset < NUM_EXPERTS; offset *= 2) {
    if (thread >= offset && thread < NUM_EXPERTS) sum += s->ends[thread - offset];
    __syncthreads();
    if (thread < NUM_EXPERTS) s->ends[thread] = sum;
    __syncthreads();
  }
}

template <class S> DEVICE Tile find_tile(const Params& p, const Shared* s, int number) {
  if (number >= s->ends[NUM_EXPERTS - 1] * S::BLOCKS) return Tile{0, 0, 0, 0};
  int low = 0, high = NUM_EXPERTS - 1;  // the first expert whose tiles end behind the number
  while (low < high) {
    const int middle = (low + high) / 2;
    if (s->ends[middle] * S::BLOCKS > number) high = middle;
    else low = middle + 1;
  }
  const int before = low ? s->ends[low - 1] : 0;
  const int stretches = s->ends[low] - before, rest = number - before * S::BLOCKS;
  const int block = rest / stretches, stretch = rest % stretches;
  return Tile{low, block, low * p.capacity + stretch * PAIRS, min(PAIRS, p.counts[low] - stretch * PAIRS)};
}
