// Q, K and V of the step's rows: tiles of 16 outputs, handed on as words, with the sum of squares of each tile (the
// whole-width norms of q and k are the reader's).
#pragma once
#include "norm.cuh"

DEVICE void qkv_stage(Consumer& c) {
  for_tiles(c, [&](int tile, Slot first) {
    Sums<COLUMN_GROUPS> sum = all_rows(c);
    multiply_tile<QkvShape, QkvShape::SLOTS>(c, first, c.act, sum);
    if (!reduce_tile(c, sum)) return;
    const int g = c.lane >> 2;
    for_columns(c, sum, [&](int row, float upper, float lower) {
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
