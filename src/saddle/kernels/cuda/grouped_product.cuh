// The multiplying warpgroups. Of a tile with two slabs of 64 pairs, each takes one and all 256 rows of the weight, half
// by half; of a tile with one slab, each takes one half. So they meet nowhere in the first case, and one may finish its
// tile while the other multiplies.
//
// The matrix units sum 128 columns; float32 adds them up, times the token's and the weight's scale (the units' own sums
// keep about 14 bits). While one piece of 64 rows is added, the next one's products run, of this warpgroup or the other.
// The pairs' numbers go through registers: read once a turn, not once a piece, and by ordinary loads, so that what
// threads copied there needs no fence for the matrix units.
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

// sum += part, times a token's scale (pair 8 rows on: the second) and the weight's (up: of w1, of w3).
template <int FIRST> DEVICE void add_part(float* sum, const float (&part)[32], const float (&factors)[4]) {
#pragma unroll
  for (int i = 0; i < 32; i++) sum[FIRST + i] = fmaf(part[i], factors[i / 4 % 2 * 2 + i % 4 / 2], sum[FIRST + i]);
}

template <class S> DEVICE void scale_factors(float (&factors)[4], float top, float low, float first, float second, bool right) {
  // Columns 8 j of a sum are rows of w1 if j is even, of w3 if odd.
  const float even = !S::IS_UP && right ? second : first, odd = S::IS_UP ? second : even;
  factors[0] = top * even;
  factors[1] = low * even;
  factors[2] = top * odd;
  factors[3] = low * odd;
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
  float part[2][32], last[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 32; i++) part[1][i] = 0;
  const int row = slab + c.warp * 16 + c.lane / 4;
  // ldmatrix: lanes 0 to 15 have the rows of the first 16 bytes, the others of the next 16.
  const int a_row = slab + c.warp * 16 + c.lane % 16;
  const u32 a_at = WEIGHT_BYTES + a_row * TURN_K, a_chunk = c.lane / 16, a_swizzle = a_row % 8;
  for (int turn = 0; turn < S::TURNS; turn++, c.turns++) {
    const int stage = c.turns % STAGES;
    if (turn && turn % 32 == 0) scales = weight_scales<S>(p, tile, turn + c.lane);
    mbarrier_wait(shared_address(&s->full[stage]), (c.turns / STAGES) & 1);
    const u32 at = ring + stage * STAGE_BYTES;
    u32 a[4][4];
#pragma unroll
    for (int k = 0; k < 4; k++) ldmatrix(at + a_at + (((2 * k + a_chunk) ^ a_swizzle) << 4), a[k]);
    const float top = s->scales[stage][row], low = s->scales[stage][row + 8];
    const float first = __shfl_sync(~0u, scales.x, turn % 32), second = __shfl_sync(~0u, scales.y, turn % 32);
    const u64 b = weights_operand(at + half * (HALF * TILE_K));
    float factors[4];
#pragma unroll
    for (int piece = 0; piece < 2 * HALVES; piece++) {
      wgmma_begin();
#pragma unroll
      for (int k = 0; k < 4; k++)  // 32 columns; addresses count 16 bytes
        wgmma(part[piece % 2], a[k], b + (piece * (PIECE * TILE_K) + k / 2 * HALF_TURN_BYTES + k % 2 * 32) / 16, k != 0);
      wgmma_commit();
      if (piece == 0) {  // what the last turn left
        add_part<32>(sum[HALVES - 1], part[1], last);
        scale_factors<S>(factors, top, low, first, second, half == 1);
      } else {
        wgmma_wait<1>(part[1 - piece % 2]);
        if (piece == 3) scale_factors<S>(factors, top, low, first, second, true);
        if (piece % 2) add_part<0>(sum[piece / 2], part[0], factors);
        else add_part<32>(sum[piece / 2 - 1], part[1], factors);
      }
    }
    wgmma_wait<0>(part[1]);
    mbarrier_arrive(shared_address(&s->empty[stage]));
#pragma unroll
    for (int i = 0; i < 4; i++) last[i] = factors[i];
  }
  add_part<32>(sum[HALVES - 1], part[1], last);
}
