// Logits of all rows: bf16 weights, float32 sums. A row whose residual left its range gets NaN.
#pragma once
#include "norm.cuh"

DEVICE void lm_head_stage(Consumer& c) {
  const u32 bad_rows = load_acquire(c.p.sync + SYNC_BAD_ROWS);
  for_tiles(c, [&](int tile, Slot first) {
    float sum[4] = {0, 0, 0, 0};
    multiply_bf16<HeadShape::SLOT_K>(c, first, c.act, sum);
#pragma unroll
    for (int i = 1; i < HeadShape::SLOTS; i++) {
      const Slot slot = next_slot(c);
      multiply_bf16<HeadShape::SLOT_K>(c, slot, c.act + i * (HeadShape::SLOT_K * 2 * MAX_ROWS), sum);
    }
    if (!reduce_tile(c, sum)) return;
    const int row = 2 * (c.lane & 3), column = tile * TILE_ROWS + (c.lane >> 2);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (!((c.rows >> (row + i)) & 1)) continue;
      const bool bad = (bad_rows >> (row + i)) & 1;
      float* out = c.p.logits + (i64)(row + i) * VOCAB + column;
      out[0] = bad ? __int_as_float(0x7fffffff) : sum[i];
      out[8] = bad ? __int_as_float(0x7fffffff) : sum[2 + i];
    }
  });
}
