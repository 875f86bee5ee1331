// The multiplying warpgroups. Of a tile with two slabs of 64 pairs, each takes one and all 256 rows of the weight, half
// by half; of a tile with one slab, each takes one half. So they meet nowhere in the first case, and one may finish its
// tile while the other multiplies.
//
// The matrix units sum 128 columns; float32 adds them up, times the token's and the weight's scale (the units' own sums
// keep about 14 bits). While one warpgroup does that, the other's products run.
#pragma once
#include "grouped_producer.cuh"

struct Consumer {
  int group, warp, lane;  // warpgroup; warp within it
  int turns;              // of the ring, so far
  int exchanges;          // with the other warpgroup, so far
};

// Of a turn: up, scales of w1 and w3; down, of the tile's first and second 128 rows.
template <class S> DEVICE float2 weight_scales(const Params& p, const Tile& tile, int turn) {
  turn = min(turn, S::TURNS - 1);
  const size_t row_tile = (size_t)tile.expert * S::ROW_TILES + tile.block * (ROWS / TILE_ROWS);
  const u8* slot = p.packed + (row_tile * S::SLOTS + turn / S::SLOT_TURNS) * S::SLOT_BYTES;
  const float* at = (const float*)(slot + S::SCALES_AT) + turn % S::SLOT_TURNS * 2;
  constexpr int NEXT = S::IS_UP ? 1 : HALF / TILE_ROWS * S::SLOTS * S::SLOT_BYTES / 4;
  return make_float2(at[0], at[NEXT]);
}

// sum[h] is 64 pairs (from `slab` on) by 128 rows, half `half` + h of the tile.
template <class S, int HALVES>
DEVICE void multiply(const Params& p, Consumer& c, Shared* s, u32 ring, const Tile& tile, int slab, int half,
                     float (&sum)[HALVES][64]) {
  float2 scales = weight_scales<S>(p, tile, c.lane);  // a lane's of one turn
#pragma unroll
  for (int h = 0; h < HALVES; h++)
#pragma unroll
    for (int i = 0; i < 64; i++) sum[h][i] = 0;
  const int row = slab + c.warp * 16 + c.lane / 4;
  for (int turn = 0; turn < S::TURNS; turn++, c.turns++) {
    const int stage = c.turns % STAGES;
    if (turn && turn % 32 == 0) scales = weight_scales<S>(p, tile, turn + c.lane);
    mbarrier_wait(shared_address(&s->full[stage]), (c.turns / STAGES) & 1);
    fence_async();
    const u32 at = ring + stage * STAGE_BYTES;
    const float top = s->scales[stage][row], low = s->scales[stage][row + 8];
    const float first = __shfl_sync(~0u, scales.x, turn % 32), second = __shfl_sync(~0u, scales.y, turn % 32);
    const u64 a = operand<128, 1024>(at + WEIGHT_BYTES + slab * TURN_K);
    const u64 b = operand<64, 512>(at + half * (HALF * TILE_K));
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      float part[64];
      wgmma_begin();
#pragma unroll
      for (int k = 0; k < 4; k++)  // 32 columns; addresses count 16 bytes
        wgmma(part, a + 2 * k, b + (h * (HALF * TILE_K) + k / 2 * HALF_TURN_BYTES + k % 2 * 32) / 16, k != 0);
      wgmma_commit();
      wgmma_wait(part);
      if (h == HALVES - 1) __syncwarp();
      if (h == HALVES - 1 && c.lane == 0) mbarrier_arrive(shared_address(&s->empty[stage]));
      // Columns 8 j of a sum are rows of w1 if j is even, of w3 if odd.
      const bool right = !S::IS_UP && half + h == 1;
      const float even = right ? second : first, odd = S::IS_UP ? second : even;
      const float factors[4] = {top * even, low * even, top * odd, low * odd};
#pragma unroll
      for (int i = 0; i < 64; i++) sum[h][i] = fmaf(part[i], factors[i / 4 % 2 * 2 + i % 4 / 2], sum[h][i]);
    }
  }
}
