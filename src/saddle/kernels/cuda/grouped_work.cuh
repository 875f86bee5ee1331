// What a block works on: tiles of one expert, up to 128 of its pairs and 256 rows of its weight.
//
// Tiles are numbered expert by expert, block of rows by block of rows, the expert's stretches of pairs one after the
// other: those that run together share weights and pairs in the second-level cache. A block's first tile is its own
// number; then it claims the next one that nobody has, one tile ahead of need.
#pragma once
#include "grouped_ptx.cuh"

struct Params {
  TensorMap weights;
  const u8* packed;           // the same weights, for their scales
  const u8* input;            // [tokens or pairs][K] E4M3
  const float* input_scales;  // [tokens or pairs][K / 128]
  const int* counts;          // [EXPERTS] pairs of each expert
  const int* lists;           // [EXPERTS][capacity] their pairs
  const float* shares;        // [pairs] routing weights (down)
  void* output;               // up: [pairs][N / 2] E4M3; else [pairs][N] bf16 or float32
  float* output_scales;       // up: [pairs][N / 256]
  int* queue;                 // tiles claimed, blocks that are done; zeros between launches
  const float* gain;          // [heads][128] of the norm over all queries (turned)
  const float* cos;           // [positions][32]
  const float* sin;
  const int* positions;       // [rows]
  float* squares;             // [rows][heads] sums over a head, before the gain
  int capacity;               // of a list; rows where there are no lists
  int turned;                 // blocks of rows of the weight that are queries
};

struct alignas(16) Tile {
  int expert;
  int block;  // of rows
  int first;  // place in `lists`; first row where there are none
  int count;  // pairs, at most 128; 0: no tile is left
};

struct Shared {
  u64 full[STAGES], empty[STAGES];
  u64 told[TILE_SLOTS], read[TILE_SLOTS];
  Tile tiles[TILE_SLOTS];
  float scales[STAGES][PAIRS];
  float largest[2][2][SLAB];  // [exchange % 2][warpgroup][pair]
  int ends[MAX_EXPERTS];      // stretches of pairs up to and with this expert
};
constexpr int SHARED_BYTES = 1024 + STAGES * STAGE_BYTES + sizeof(Shared);

template <class S> DEVICE int count_of(const Params& p, int expert) { return S::LISTED ? p.counts[expert] : p.capacity; }

// All threads; ends with their barrier.
template <class S> DEVICE void count_stretches(const Params& p, Shared* s) {
  const int thread = threadIdx.x;
  int sum = 0;
  if (thread < S::EXPERTS) s->ends[thread] = sum = (count_of<S>(p, thread) + PAIRS - 1) / PAIRS;
  __syncthreads();
  for (int offset = 1; offset < S::EXPERTS; offset *= 2) {
    if (thread >= offset && thread < S::EXPERTS) sum += s->ends[thread - offset];
    __syncthreads();
    if (thread < S::EXPERTS) s->ends[thread] = sum;
    __syncthreads();
  }
}

template <class S> DEVICE Tile find_tile(const Params& p, const Shared* s, int number) {
  if (number >= s->ends[S::EXPERTS - 1] * S::BLOCKS) return Tile{0, 0, 0, 0};
  int low = 0, high = S::EXPERTS - 1;  // the first expert whose tiles end behind the number
  while (low < high) {
    const int middle = (low + high) / 2;
    if (s->ends[middle] * S::BLOCKS > number) high = middle;
    else low = middle + 1;
  }
  const int before = low ? s->ends[low - 1] : 0;
  const int stretches = s->ends[low] - before, rest = number - before * S::BLOCKS;
  const int pair = rest % stretches * PAIRS;
  return Tile{low, rest / stretches, low * p.capacity + pair, min(PAIRS, count_of<S>(p, low) - pair)};
}

// The pair in a row of a tile, and its row of the input (a row without a pair repeats the first).
template <class S> DEVICE int pair_of(const Params& p, const Tile& tile, int row) {
  return S::LISTED ? p.lists[tile.first + row] : tile.first + row;
}
template <class S> DEVICE u32 input_row(const Params& p, const Tile& tile, int row) {
  return (u32)pair_of<S>(p, tile, row < tile.count ? row : 0) / S::SHARE;
}
