// The experts: up = silu(W1 h) * (W3 h) for every (row, expert), then down = W2 up, times the routing weight, into the
// residual. A slot serves all rows that chose its expert; the mma's other columns are computed and dropped.
#pragma once
#include "router.cuh"

// Between the two halves activations are f16 at 1/16 of their size: up to 1,048,064, with steps of 9.5e-7 below 1e-3.
// What is larger becomes infinite and is caught by the residual's range check.
constexpr float UP_SCALE = 0.0625f;
constexpr int UP_TILES = 2 * INTERMEDIATE / TILE_ROWS;
constexpr int DOWN_TILES = HIDDEN / TILE_ROWS;

DEVICE void up_stage(Consumer& c) {
  for_tiles(c, [&](int tile, Slot first) {
    float sum[4] = {0, 0, 0, 0};
    multiply_tile<UpShape, UpShape::SLOTS>(c, first, c.act, sum);
    if (!reduce_tile(c, sum)) return;
    const int place = tile / UP_TILES, column = (tile - place * UP_TILES) * 8 + (c.lane >> 2), row = 2 * (c.lane & 3);
    const u32 rows = c.shared->expert_list[place] >> 16;
#pragma unroll
    for (int i = 0; i < 2; i++) {  // the tile's upper rows are w1, its lower rows the same of w3
      if (!((rows >> (row + i)) & 1)) continue;
      const float up = sum[i] * sigmoid(sum[i]) * sum[2 + i];
      c.p.activations[((i64)place * MAX_ROWS + row + i) * INTERMEDIATE + column] = (u16)pack_f16(up * UP_SCALE, 0.f);
    }
  });
}

constexpr int CHUNKS = INTERMEDIATE / 8;  // of 16 bytes, of a row's activation
constexpr int LOADERS = 192;  // threads that load one row; two rows at a time
constexpr int ROW_LOADS = (MAX_ROWS + 1) / 2;

DEVICE void load_up(const Consumer& c, int place, uint4* chunk) {
  const u32 rows = c.shared->expert_list[place] >> 16;
  const int half = c.thread >= LOADERS, at = c.thread - half * LOADERS;
#pragma unroll
  for (int i = 0; i < ROW_LOADS; i++) {
    const int row = 2 * i + half;
    if (((rows >> row) & 1) && at < CHUNKS)
      chunk[i] = load_cg128(c.p.activations + ((i64)place * MAX_ROWS + row) * INTERMEDIATE + at * 8);
  }
}
DEVICE void store_up(const Consumer& c, int place, const uint4* chunk) {
  const u32 rows = c.shared->expert_list[place] >> 16;
  const int half = c.thread >= LOADERS, at = c.thread - half * LOADERS;
#pragma unroll
  for (int i = 0; i < ROW_LOADS; i++) {
    const int row = 2 * i + half;
    if (((rows >> row) & 1) && at < CHUNKS) sts128(c.act + f16_place(row, at * 8), chunk[i]);
  }
}
// A single row has at most TOP_K experts: all their activations fit.
DEVICE void load_all_up(Consumer& c) {
  constexpr int EACH = (TOP_K * CHUNKS + NUM_THREADS - 1) / NUM_THREADS;
  uint4 chunk[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int at = i * NUM_THREADS + c.thread;
    if (at < TOP_K * CHUNKS) chunk[i] = load_cg128(c.p.activations + at * 8);
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int at = i * NUM_THREADS + c.thread;
    if (at < TOP_K * CHUNKS) sts128(c.act + f16_place(0, at * 8), chunk[i]);
  }
  consumers_sync();
}

DEVICE void down_stage(Consumer& c) {
  int loaded = -1, fetched = -1;  // places whose activations are in shared memory, in registers
  uint4 chunk[ROW_LOADS];
  if (MAX_ROWS == 1) load_all_up(c);
  for_tiles(c, [&](int tile, Slot slot) {
    const int place = tile / DOWN_TILES;
    if (MAX_ROWS > 1 && place != loaded) {
      if (fetched != place) load_up(c, place, chunk);
      store_up(c, place, chunk);
      consumers_sync();
      loaded = place;
      fetched = place + 1;
      if (fetched < c.shared->num_experts) load_up(c, fetched, chunk);
    }
    float sum[4] = {0, 0, 0, 0};
    multiply_tile<DownShape, 1>(c, slot, c.act + (MAX_ROWS == 1 ? place * (INTERMEDIATE * 2) : 0), sum);
    if (!reduce_tile(c, sum)) return;
    const int row = 2 * (c.lane & 3), column = (tile - place * DOWN_TILES) * TILE_ROWS + (c.lane >> 2);
    const u32 rows = c.shared->expert_list[place] >> 16;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (!((rows >> (row + i)) & 1)) continue;
      const float weight = c.shared->pair_weight[place][row + i] * (1.f / UP_SCALE);
      add_residual(c, row + i, column, sum[i] * weight);
      add_residual(c, row + i, column + 8, sum[2 + i] * weight);
    }
  });
}
