// Logits of all rows: bf16 weights, float32 sums. A row whose residual left its range gets NaN.
#pragma once
#include "norm.cuh"

DEVICE void lm_head_stage(Consumer& c) {
  const u32 bad_rows = load_acquire(c.p.sync + SYNC_BAD_ROWS);
  const Columns<COLUMN_GROUPS> columns = all_rows(c);
  for_tiles(c, [&](int tile, Slot first) {
    float of[COLUMN_GROUPS][4] = {};
    multiply_bf16<HeadShape::SLOT_K>(c, first, c.act, columns, of);
#pragma unroll
    for (int i = 1; i < HeadShape::SLOTS; i++) {
      const Slot slot = next_slot(c);
      multiply_bf16<HeadShape::SLOT_K>(c, slot, c.act + i * (HeadShape::SLOT_K * 2 * MAX_ROWS), columns, of);
    }
    if (reduce<COLUMN_GROUPS, true>(c, of) < 0) return;
    for_columns<COLUMN_GROUPS>(c, of, [&](int row, float upper, float lower) {
      if (!((c.rows >> row) & 1)) return;
      const bool bad = (bad_rows >> row) & 1;
      float* out = c.p.logits + (i64)row * VOCAB + tile * TILE_ROWS + (c.lane >> 2);
      out[0] = bad ? __int_as_float(0x7fffffff) : upper;
      out[8] = bad ? __int_as_float(0x7fffffff) : lower;
    });
  });
}
