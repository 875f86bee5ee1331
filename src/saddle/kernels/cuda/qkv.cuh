// Q, K and V of the step's rows: tiles of 16 outputs, handed on as words, with the sum of squares of each tile (the
// whole-width norms of q and k are the reader's).
#pragma once
#include "norm.cuh"

DEVICE void qkv_stage(Consumer& c) {
  for_tiles(c, [&](int tile, Slot first) {
    float sum[4] = {0, 0, 0, 0};
    multiply_tile<QkvShape, QkvShape::SLOTS>(c, first, c.act, sum);
    if (!reduce_tile(c, sum)) return;
    const int g = c.lane >> 2, row = 2 * (c.lane & 3), column = tile * TILE_ROWS + g;
    u64* words = c.p.qkv_words + row * QKV_WIDTH + column;
    float squares[2] = {sum[0] * sum[0] + sum[2] * sum[2], sum[1] * sum[1] + sum[3] * sum[3]};
#pragma unroll
    for (int offset = 4; offset < 32; offset <<= 1) {
      squares[0] += __shfl_xor_sync(~0u, squares[0], offset);
      squares[1] += __shfl_xor_sync(~0u, squares[1], offset);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (row + i >= MAX_ROWS) continue;
      put_word(words + i * QKV_WIDTH, sum[i], c.epoch);
      put_word(words + i * QKV_WIDTH + 8, sum[2 + i], c.epoch);
      if (g == 0) put_word(c.p.square_words + tile * 8 + row + i, squares[i], c.epoch);
    }
  });
}
