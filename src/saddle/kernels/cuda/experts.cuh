// The experts: up = silu(W1 h) * (W3 h) for every (row, expert), then down = W2 up, times the routing weight, into the
// residual. A slot serves all rows that chose its expert; the mma's other columns are computed and dropped. Of more than
// 8 rows those that chose the expert are gathered into 8 columns, if they fit: a second mma for columns that are dropped
// again slowed the down stage by a tenth.
#pragma once
#include "router.cuh"

// Between the two halves activations are f16 at 1/16 of their size: up to 1,048,064, with steps of 9.5e-7 below 1e-3.
// What is larger becomes infinite and is caught by the residual's range check.
constexpr float UP_SCALE = 0.0625f;
constexpr int UP_TILES = 2 * INTERMEDIATE / TILE_ROWS;
constexpr int DOWN_TILES = HIDDEN / TILE_ROWS;

// A tile of an expert that `rows` chose; body(row, upper, lower) in the warp that holds the sums.
template <class Shape, int SLOTS, class Body> DEVICE void expert_tile(Consumer& c, Slot first, u32 act, u32 rows, Body body) {
  if (COLUMN_GROUPS > 1 && __popc(rows) <= 8) {
    Sums<1> sum = some_rows(c, rows);
    multiply_tile<Shape, SLOTS>(c, first, act, sum);
    if (!reduce_tile(c, sum)) return;
    for_columns(c, sum, [&](int column, float upper, float lower) {
      const int row = nth_row(rows, column);
      if (row >= 0) body(row, upper, lower);
    });
  } else {
    Sums<COLUMN_GROUPS> sum = all_rows(c);
    multiply_tile<Shape, SLOTS>(c, first, act, sum);
    if (!reduce_tile(c, sum)) return;
    for_columns(c, sum, [&](int row, float upper, float lower) {
      if ((rows >> row) & 1) body(row, upper, lower);
    });
  }
}

DEVICE void up_stage(Consumer& c) {
  for_tiles(c, [&](int tile, Slot first) {
    const int place = tile / UP_TILES, column = (tile - place * UP_TILES) * 8 + (c.lane >> 2);
    const u32 rows = c.shared->expert_list[place] >> 16;
    // The tile's upper rows are w1, its lower rows the same of w3.
    expert_tile<UpShape, UpShape::SLOTS>(c, first, c.act, rows, [&](int row, float gate, float up) {
      const float out = gate * sigmoid(gate) * up;
      c.p.activations[((i64)place * MAX_ROWS + row) * INTERMEDIATE + column] = (u16)pack_f16(out * UP_SCALE, 0.f);
    });
  });
}

constexpr int CHUNKS = INTERMEDIATE / 8;  // of 16 bytes, of a row's activation
constexpr int LOADERS = 192;  // threads that load one row; two rows at a time
constexpr int ROW_LOADS = (MAX_ROWS + 1) / 2;

// Starts to copy an expert's activations to its half of the buffer: odd places to the upper one.
DEVICE void fetch_up(const Consumer& c, int place) {
  const u32 rows = c.shared->expert_list[place] >> 16, to = c.act + (place & 1) * UP_BYTES;
  const int half = c.thread >= LOADERS, at = c.thread - half * LOADERS;
#pragma unroll
  for (int i = 0; i < ROW_LOADS; i++) {
    const int row = 2 * i + half;
    if (((rows >> row) & 1) && at < CHUNKS)
      async_copy(to + f16_place(row, at * 8), c.p.activations + ((i64)place * MAX_ROWS + row) * INTERMEDIATE + at * 8);
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
  int loaded = -1, fetched = -1;  // places whose activations are in shared memory, on the way
  if (MAX_ROWS == 1) load_all_up(c);
  for_tiles(c, [&](int tile, Slot slot) {
    const int place = tile / DOWN_TILES;
    if (MAX_ROWS > 1 && place != loaded) {
      if (fetched != place) {
        async_wait();  // or the wrong place's copy could land last
        fetch_up(c, place);
      }
      async_wait();
      consumers_sync();
      loaded = place;
      fetched = place + 1;
      if (fetched < c.shared->num_experts) fetch_up(c, fetched);
    }
    const int column = (tile - place * DOWN_TILES) * TILE_ROWS + (c.lane >> 2);
    const u32 rows = c.shared->expert_list[place] >> 16, act = c.act + (MAX_ROWS == 1 ? place : place & 1) * UP_BYTES;
    expert_tile<DownShape, 1>(c, slot, act, rows, [&](int row, float upper, float lower) {
      const float weight = c.shared->chosen_weight[row * TOP_K + c.shared->pair_rank[place][row]] * (1.f / UP_SCALE);
      add_residual(c, row, column, upper * weight);
      add_residual(c, row, column + 8, lower * weight);
    });
  });
  async_wait();  // the last place fetched may have no tile here, and the next stage writes there
}
