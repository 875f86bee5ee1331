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
constexpr int DOWN_UNITS = HIDDEN / TILE_ROWS / DOWN_TILES_AT_ONCE;
static_assert(DownShape::SLOTS == 1);

// An expert's rows, and where its products lie in the mma's columns.
struct ExpertRows {
  u32 rows;  // bit r: row r chose it
  u32 gathered;  // of steps of more than 8 rows: rows by column
  DEVICE bool fits() const { return COLUMN_GROUPS == 1 || __popc(rows) <= 8; }
  // The row of a column, -1: none.
  DEVICE int row(int column) const {
    if (COLUMN_GROUPS == 1) return (rows >> column) & 1 ? column : -1;
    return column < __popc(rows) ? row_of_column(gathered, column) : -1;
  }
};
DEVICE ExpertRows rows_of(const Consumer& c, int place) {
  return {c.shared->expert_list[place] >> 16, COLUMN_GROUPS > 1 ? c.shared->expert_columns[place] : 0};
}
DEVICE Columns<1> columns_of(const Consumer& c, ExpertRows expert) {
  if (COLUMN_GROUPS > 1) return some_rows(c, expert.gathered);
  return {{all_rows(c).at[0]}};
}
// A tile of an expert that more than 8 rows chose; body(row, upper, lower) in the warp that holds the sums.
template <class Shape, int SLOTS, class Body> DEVICE void crowded_tile(Consumer& c, Slot first, u32 act, u32 rows, Body body) {
  const Inputs<Shape, SLOTS, COLUMN_GROUPS> inputs(c, act, all_rows(c));
  float of[COLUMN_GROUPS][4] = {};
  multiply_tile(c, first, inputs, of);
  if (reduce<COLUMN_GROUPS, true>(c, of) < 0) return;
  for_columns<COLUMN_GROUPS>(c, of, [&](int row, float upper, float lower) {
    if ((rows >> row) & 1) body(row, upper, lower);
  });
}

DEVICE void up_stage(Consumer& c) {
  typedef Inputs<UpShape, UpShape::SLOTS, 1> Rows;
  for_runs(
      c, UP_TILES, [&](int place) { return Rows(c, c.act, columns_of(c, rows_of(c, place))); },
      [&](const Rows& inputs, int place, int tile, Slot first) {
        const ExpertRows expert = rows_of(c, place);
        // The tile's upper rows are w1, its lower rows the same of w3.
        const auto put = [&](int row, float gate, float up) {
          const float out = gate * sigmoid(gate) * up;
          c.p.activations[((i64)place * MAX_ROWS + row) * INTERMEDIATE + tile * 8 + (c.lane >> 2)] = (u16)pack_f16(out * UP_SCALE, 0.f);
        };
        if (!expert.fits()) {
          crowded_tile<UpShape, UpShape::SLOTS>(c, first, c.act, expert.rows, put);
          return;
        }
        float of[1][4] = {};
        multiply_tile(c, first, inputs, of);
        if (reduce<1, true>(c, of) < 0) return;
        for_columns<1>(c, of, [&](int at, float gate, float up) {
          if (const int row = expert.row(at); row >= 0) put(row, gate, up);
        });
      });
}

constexpr int CHUNKS = INTERMEDIATE / 8;  // of 16 bytes, of a row's activation
constexpr int LOADERS = 192;  // threads that load one row; two rows at a time

// Starts to copy an expert's activations to its half of the buffer: odd places to the upper one. A number of the buffer is
// always the same thread's to fill, whatever the expert's rows: who waits for its own copies knows that none lands later.
DEVICE void fetch_up(const Consumer& c, int place) {
  const int half = c.thread >= LOADERS, at = c.thread - half * LOADERS;
  const u32 to = c.act + (place & 1) * UP_BYTES;
  u32 rows = (c.shared->expert_list[place] >> 16) & (half ? 0xaaaau : 0x5555u);
  for (; rows; rows &= rows - 1) {
    const int row = __ffs(rows) - 1;
    if (at < CHUNKS) async_copy(to + f16_place(row, at * 8), c.p.activations + ((i64)place * MAX_ROWS + row) * INTERMEDIATE + at * 8);
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
  typedef Inputs<DownShape, 1, 1> Rows;
  int fetched = -1;  // place whose activations are on the way
  if (MAX_ROWS == 1) load_all_up(c);
  for_runs(
      c, DOWN_UNITS,
      [&](int place) {
        if (MAX_ROWS > 1) {
          if (fetched != place) {
            async_wait();  // or the wrong place's copy could land last
            fetch_up(c, place);
          }
          async_wait();
          consumers_sync();
          fetched = place + 1;
          if (fetched < c.shared->num_experts) fetch_up(c, fetched);
        }
        return Rows(c, c.act + (MAX_ROWS == 1 ? place : place & 1) * UP_BYTES, columns_of(c, rows_of(c, place)));
      },
      [&](const Rows& inputs, int place, int unit, Slot first) {
        const ExpertRows expert = rows_of(c, place);
        const u32 id = c.shared->expert_list[place] & 0xffff;
        const int column = unit * (DOWN_TILES_AT_ONCE * TILE_ROWS) + (c.lane >> 2);
        const auto add = [&](int row, int at, float upper, float lower) {
          const float weight = routing_weight(c, row, id) * (1.f / UP_SCALE);
          add_residual(c, row, at, upper * weight);
          add_residual(c, row, at + 8, lower * weight);
        };
        if (!expert.fits()) {
          for (int i = 0; i < DOWN_TILES_AT_ONCE; i++) {
            const Slot slot = i ? next_slot(c) : first;
            crowded_tile<DownShape, 1>(c, slot, c.act + (place & 1) * UP_BYTES, expert.rows, [&](int row, float upper, float lower) {
              add(row, column + i * TILE_ROWS, upper, lower);
            });
          }
          return;
        }
        float of[DOWN_TILES_AT_ONCE][4] = {};
#pragma unroll
        for (int i = 0; i < DOWN_TILES_AT_ONCE; i++) multiply_fp8<0>(c, i ? next_slot(c) : first, inputs, of + i);
        const int which = reduce<DOWN_TILES_AT_ONCE, false>(c, of);
        if (which < 0) return;
        for_columns<1>(c, of, [&](int at, float upper, float lower) {
          if (const int row = expert.row(at); row >= 0) add(row, column + which * TILE_ROWS, upper, lower);
        });
      });
  async_wait();  // the last place fetched may have no tile here, and the next stage writes there
}
