// The loading warpgroup: claims tiles and fills the ring. Weights come by the copy engine, the pairs' rows, which lie
// anywhere, 16 bytes a thread with the same swizzle. A turn is full when the engine's bytes and all threads' copies have
// landed; whoever multiplies fences them for wgmma (waiting and fencing here costs a fifth at 8,192 tokens).
//
// The engine swizzles 8 rows of 128 bytes (two rows of a tile each) where wgmma reads 16 rows of 64: rows 0 to 7 come
// out in place, rows 8 to 15 of a tile with odd and even exchanged. The columns of a sum that they are lie in one
// thread (product.cuh). Rows of 64 bytes would come in place, at half the engine's rate.
#pragma once
#include "grouped_work.cuh"

template <class S> DEVICE void load_weights(const Params& p, const Tile& tile, int turn, u32 to, u32 full) {
  const int tile_k = turn % S::SLOT_TURNS * (TURN_K / TILE_K);
  const int row_tile = tile.expert * S::ROW_TILES + tile.block * (ROWS / TILE_ROWS);
  mbarrier_expect(full, WEIGHT_BYTES);
#pragma unroll
  for (int i = 0; i < 2; i++)
    tensor_copy(to + i * HALF_TURN_BYTES, &p.weights, tile_k + i, turn / S::SLOT_TURNS, row_tile, full);
}

// Tells the tile with this number to everyone. One thread.
template <class S> DEVICE void tell_tile(const Params& p, Shared* s, int index, int number) {
  const int slot = index % TILE_SLOTS;
  if (index >= TILE_SLOTS) mbarrier_wait(shared_address(&s->read[slot]), (index / TILE_SLOTS - 1) & 1);
  s->tiles[slot] = find_tile<S>(p, s, number);
  mbarrier_arrive(shared_address(&s->told[slot]));
}

// The index-th tile of this block. Whole warps.
DEVICE Tile next_tile(Shared* s, int index) {
  const int slot = index % TILE_SLOTS;
  mbarrier_wait(shared_address(&s->told[slot]), (index / TILE_SLOTS) & 1);
  const Tile tile = s->tiles[slot];
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&s->read[slot]));
  return tile;
}

template <class S> DEVICE void produce(const Params& p, Shared* s, u32 ring) {
  const int thread = threadIdx.x - CONSUMERS;
  const int chunk = thread % 8, row = thread / 8;  // and every 16th row from there
  const u32 place = row * TURN_K + ((chunk ^ (row % 8)) << 4);
  int turns = 0, number = blockIdx.x;
  for (int index = 0;; index++) {
    if (thread == 0) {
      tell_tile<S>(p, s, index, number);
      number = gridDim.x + atomicAdd(p.queue, 1);
    }
    __syncwarp();
    const Tile tile = next_tile(s, index);
    if (tile.count == 0) break;
    const int* listed = p.lists + tile.first;
    const u8* from[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int pair = listed[row + 16 * i < tile.count ? row + 16 * i : 0];
      from[i] = p.input + (size_t)(S::IS_UP ? pair / TOP_K : pair) * S::K + chunk * 16;
    }
    const int pair = listed[thread < tile.count ? thread : 0];
    const float* scale = p.input_scales + (size_t)(S::IS_UP ? pair / TOP_K : pair) * S::TURNS;
    for (int turn = 0; turn < S::TURNS; turn++, turns++) {
      const int stage = turns % STAGES;
      if (turns >= STAGES) mbarrier_wait(shared_address(&s->empty[stage]), (turns / STAGES - 1) & 1);
      const u32 at = ring + stage * STAGE_BYTES;
      if (thread == 0) load_weights<S>(p, tile, turn, at, shared_address(&s->full[stage]));
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (i < 4 || tile.count > SLAB) copy16(at + WEIGHT_BYTES + place + i * (16 * TURN_K), from[i] + turn * TURN_K);
      copy4(shared_address(&s->scales[stage][thread]), scale + turn);
      copies_arrive(shared_address(&s->full[stage]));
    }
  }
  // Every block has claimed its last tile when the last one comes here: the next launch counts from zero.
  if (thread == 0 && atomicAdd(p.queue + 1, 1) == (int)gridDim.x - 1) p.queue[0] = p.queue[1] = 0;
}
