// Q, K and V of the step's rows: tiles of 16 outputs, handed on as words, with the sum of squares of each tile (the
// whole-width norms of q and k are the reader's).
#pragma once
#include "norm.cuh"

DEVICE void qkv_stage(Consumer& c) {
  typedef Inputs<QkvShape, QkvShape::SLOTS, COLUMN_GROUPS> Rows;
  for_runs(
      c, QKV_TILES, [&](int) { return Rows(c, c.act, all_rows(c)); },
      [&](const Rows& inputs, int, int tile, Slot first) {
        float of[COLUMN_GROUPS][4] = {};
        multiply_tile(c, first, inputs, of);
        if (reduce<COLUMN_GROUPS, true>(c, of) < 0) return;
        const int g = c.lane >> 2;
        for_columns<COLUMN_GROUPS>(c, of, [&](int row, float upper, float lower) {
          float square = upper * upper + lower * lower;
#pragma unroll
          for (int offset = 4; offset < 32; offset <<= 1) square += __shfl_xor_sync(~0u, square, offset);
          if (row >= MAX_ROWS) return;
          u64* words = c.p.qkv_words + row * QKV_WIDTH + tile * TILE_ROWS + g;
          put_word(words, upper, c.epoch);
          put_word(words + 8, lower, c.epoch);
          if (g == 0) put_word(c.p.square_words + tile * SQUARE_PITCH + row, square, c.epoch);
        });
      });
}
