// The loading warpgroup: claims tiles and fills the ring. Weights come by the copy engine, the pairs' rows, which lie
// anywhere, 16 bytes a thread with the same swizzle. A turn is full when the engine's bytes and all threads' copies have
// landed.
//
// The engine swizzles 8 rows of 128 bytes (two rows of a tile each) where wgmma reads 16 rows of 64: rows 0 to 7 come
// out in place, rows 8 to 15 of a tile with odd and even exchanged. The columns of a sum that they are lie in one
// thread (grouped_product.cuh). Rows of 64 bytes would come in place, in twice as many requests.
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

// Tells everyone the block's index-th tile. One thread.
template <class S> DEVICE void tell_tile(const Params& p, Shared* s, int index, int number) {
  const int slot = index % TILE_SLOTS;
  if (index >= TILE_SLOTS) mbarrier_wait(shared_address(&s->read[slot]), (index / TILE_SLOTS - 1) & 1);
  s->tiles[slot] = find_tile<S>(p, s, number);
  mbarrier_arrive(shared_address(&s->told[slot]));
}

// The block's index-th tile. Every thread, once for each.
DEVICE Tile next_tile(Shared* s, int index) {
  const int slot = index % TILE_SLOTS;
  mbarrier_wait(shared_address(&s->told[slot]), (index / TILE_SLOTS) & 1);
  const Tile tile = s->tiles[slot];
  mbarrier_arrive(shared_address(&s->read[slot]));
  return tile;
}

template <class S> DEVICE void produce(const Params& p, Shared* s, u32 ring) {
  const int thread = threadIdx.x - CONSUMERS;
  const int chunk = thread % 8, row = thread / 8;  // and every 16th row from there
  const u32 place = WEIGHT_BYTES + row * TURN_K + ((chunk ^ (row % 8)) << 4);
  int turns = 0, number = blockIdx.x;
  if (thread == 0) tell_tile<S>(p, s, 0, number);
  for (int index = 0;; index++) {
    if (thread == 0) number = gridDim.x + atomicAdd(p.queue, 1);  // told a turn later
    __syncwarp();
    const Tile tile = next_tile(s, index);
    if (tile.count == 0) break;
    u32 from[8], scale;  // places in the input and its scales; 32 bits are enough for a million pairs
    for (int turn = 0; turn < S::TURNS; turn++, turns++) {
      const int stage = turns % STAGES;
      const u32 full = shared_address(&s->full[stage]), at = ring + stage * STAGE_BYTES;
      if (turns >= STAGES) mbarrier_wait(shared_address(&s->empty[stage]), (turns / STAGES - 1) & 1);
      if (thread == 0) load_weights<S>(p, tile, turn, at, full);
      if (turn == 0) {  // the first weights are under way
#pragma unroll
        for (int i = 0; i < 8; i++) from[i] = input_row<S>(p, tile, row + 16 * i) * S::K + chunk * 16;
        scale = input_row<S>(p, tile, thread) * S::TURNS;
      }
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (i < 4 || tile.count > SLAB) copy16(at + place + i * (16 * TURN_K), p.input + turn * TURN_K + from[i]);
      copy4(shared_address(&s->scales[stage][thread]), p.input_scales + turn + scale);
      copies_arrive(full);
      if (turn == 0 && thread == 0) tell_tile<S>(p, s, index + 1, number);
    }
  }
  // Every block has claimed its last tile when the last one comes here: the next launch counts from zero.
  if (thread == 0 && atomicAdd(p.queue + 1, 1) == (int)gridDim.x - 1) p.queue[0] = p.queue[1] = 0;
}
