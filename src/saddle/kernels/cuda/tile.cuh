// Products of packed weight tiles and the activations of up to 16 rows on tensor cores.
//
// A tile's 16 rows are the rows of mma.m16n8k16, the batch its 8 columns; more rows are the columns of a second mma with
// the same weights. Lane 4 g + t reads 16 bytes at row g (and row g + 8), byte 16 t of a tile: no bank conflicts, and the
// numbers are an operand if the activations' k is permuted alike. So activations lie in shared memory in the order in
// which lanes want them:
//   FP8 stages  f16:  [k / 64][k / 8 % 2][row][k / 16 % 4][8]     a lane's k of one tile are 16 t .. 16 t + 15
//   lm_head     bf16: [k / 32][row][32]                           8 t .. 8 t + 7
// FP8 weights become f16 exactly; activations stay f16, which is closer to the reference than FP8 would be.
// Warp w computes block w of 128 columns, which has one scale; the warps' sums meet in shared memory. So a warp multiplies
// every tile of a matrix by the same activations, and keeps them in registers.
#pragma once
#include "ring.cuh"

DEVICE u32 f16_place(int row, int k) {
  return (k >> 6) * (128 * MAX_ROWS) + ((k >> 3) & 1) * (64 * MAX_ROWS) + row * 64 + ((k >> 4) & 3) * 16 + (k & 7) * 2;
}
DEVICE u32 bf16_place(int row, int k) { return (k >> 5) * (64 * MAX_ROWS) + row * 64 + (k & 31) * 2; }

// Columns of the mma: in group j the lane's column 8 j + g is the row that begins at `at[j]`, less 16 t.
template <int GROUPS> struct Columns {
  u32 at[GROUPS];
};
DEVICE Columns<COLUMN_GROUPS> all_rows(const Consumer& c) {
  Columns<COLUMN_GROUPS> columns;  // columns without a row repeat the last one
#pragma unroll
  for (int j = 0; j < COLUMN_GROUPS; j++) columns.at[j] = min(8 * j + (c.lane >> 2), MAX_ROWS - 1) * 64 + (c.lane & 3) * 16;
  return columns;
}
// Rows gathered into 8 columns: column n is the row in bits 4 n .. 4 n + 3.
DEVICE int row_of_column(u32 gathered, int n) { return (gathered >> (4 * n)) & 15; }
DEVICE Columns<1> some_rows(const Consumer& c, u32 gathered) {
  return {{(u32)row_of_column(gathered, c.lane >> 2) * 64 + (c.lane & 3) * 16}};
}

// The activations that a warp multiplies tiles of SLOTS slots of a matrix with.
template <class Shape, int SLOTS, int GROUPS> struct Inputs {
  static constexpr bool KEPT = GROUPS * SLOTS <= 2 && Shape::BLOCKS == NUM_WARPS;  // more would not fit the registers
  u32 begin;  // address of the warp's part of the first slot
  Columns<GROUPS> columns;
  uint4 x[KEPT ? SLOTS : 1][GROUPS][4];

  // `act`: address of the first column.
  DEVICE Inputs(const Consumer& c, u32 act, const Columns<GROUPS>& which) {
    begin = act + c.warp * (256 * MAX_ROWS);
    columns = which;
    if (!KEPT) return;
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++)
#pragma unroll
      for (int j = 0; j < GROUPS; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) x[KEPT ? slot : 0][j][i] = lds128(address(slot, j, i));
  }
  DEVICE u32 address(int slot, int j, int i) const {
    return begin + slot * (Shape::SLOT_K * 2 * MAX_ROWS) + columns.at[j] + i * (64 * MAX_ROWS);
  }
  DEVICE void load(int slot, uint4 (*to)[4]) const {
#pragma unroll
    for (int j = 0; j < GROUPS; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) to[j][i] = lds128(address(slot, j, i));
  }
};

// Adds a slot's product with the inputs' `number`th slot to the sums and gives the slot back. Sums are in the mma's layout:
// of[j][0 .. 1] tile row g, columns 8 j + 2 t and 8 j + 2 t + 1; of[j][2 .. 3] the same of tile row g + 8.
template <int NUMBER, class Shape, int SLOTS, int GROUPS>
DEVICE void multiply_fp8(const Consumer& c, Slot slot, const Inputs<Shape, SLOTS, GROUPS>& inputs, float (*of)[4]) {
  if (Shape::BLOCKS < NUM_WARPS && c.warp >= Shape::BLOCKS) {
    release(c, slot);
    return;
  }
  const u32 weights = slot.at + c.warp * (2 * TILE_BYTES) + c.lane * 16;
  uint4 w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) w[i] = lds128(weights + i * (TILE_BYTES / 2));
  const uint2 scale = lds64(slot.at + Shape::SCALES_AT + c.warp * 8);
  uint4 x[GROUPS][4];
  if (inputs.KEPT) {
#pragma unroll
    for (int j = 0; j < GROUPS; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) x[j][i] = inputs.x[inputs.KEPT ? NUMBER : 0][j][i];
  } else {
    inputs.load(NUMBER, x);
  }
  release(c, slot);
  float even[GROUPS][4] = {}, odd[GROUPS][4] = {};  // two chains: an mma waits for the one before on its sum
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 top[4] = {w[2 * i].x, w[2 * i].y, w[2 * i].z, w[2 * i].w};
    const u32 low[4] = {w[2 * i + 1].x, w[2 * i + 1].y, w[2 * i + 1].z, w[2 * i + 1].w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
      u32 a0, a1, a2, a3;
      e4m3_to_f16(top[k], a0, a2);
      e4m3_to_f16(low[k], a1, a3);
#pragma unroll
      for (int j = 0; j < GROUPS; j++) {
        const uint4 v = x[j][2 * i + (k >> 1)];
        mma_f16((k & 1 ? odd : even)[j], a0, a1, a2, a3, k & 1 ? v.z : v.x, k & 1 ? v.w : v.y);
      }
    }
  }
  const float scale_top = __uint_as_float(scale.x), scale_low = __uint_as_float(scale.y);
#pragma unroll
  for (int j = 0; j < GROUPS; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) of[j][i] += (even[j][i] + odd[j][i]) * (i < 2 ? scale_top : scale_low);
}
// A whole tile: SLOTS slots, one after the other along k.
template <int NUMBER = 0, class Shape, int SLOTS, int GROUPS>
DEVICE void multiply_tile(Consumer& c, Slot slot, const Inputs<Shape, SLOTS, GROUPS>& inputs, float (*of)[4]) {
  multiply_fp8<NUMBER>(c, slot, inputs, of);
  if constexpr (NUMBER + 1 < SLOTS) multiply_tile<NUMBER + 1>(c, next_slot(c), inputs, of);
}

template <int SLOT_K>
DEVICE void multiply_bf16(const Consumer& c, Slot slot, u32 act, const Columns<COLUMN_GROUPS>& columns, float (*of)[4]) {
  constexpr int TILES = SLOT_K / 32;
  constexpr int EACH = (TILES + NUM_WARPS - 1) / NUM_WARPS;
  uint4 top[EACH], low[EACH], x[COLUMN_GROUPS][EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int tile = c.warp * EACH + i;
    if (tile >= TILES) {
      top[i] = low[i] = make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int j = 0; j < COLUMN_GROUPS; j++) x[j][i] = make_uint4(0, 0, 0, 0);
      continue;
    }
    top[i] = lds128(slot.at + tile * TILE_BYTES + c.lane * 16);
    low[i] = lds128(slot.at + tile * TILE_BYTES + TILE_BYTES / 2 + c.lane * 16);
#pragma unroll
    for (int j = 0; j < COLUMN_GROUPS; j++) x[j][i] = lds128(act + tile * (64 * MAX_ROWS) + columns.at[j]);
  }
  release(c, slot);
#pragma unroll
  for (int i = 0; i < EACH; i++) {
#pragma unroll
    for (int j = 0; j < COLUMN_GROUPS; j++) {
      mma_bf16(of[j], top[i].x, low[i].x, top[i].y, low[i].y, x[j][i].x, x[j][i].y);
      mma_bf16(of[j], top[i].z, low[i].z, top[i].w, low[i].w, x[j][i].z, x[j][i].w);
    }
  }
}

// Adds the warps' sums of up to two groups of columns, or of two tiles of one group, each in one warp: 0 or 1, which of
// `of` this warp then holds complete; -1: none. With BOTH one warp holds both, and the answer is 0 or -1. Whose turn it is
// goes round, so that the work after a tile overlaps with the next tile. Two buffers: a warp is at most one tile ahead of
// the slowest.
template <int COUNT, bool BOTH> DEVICE int reduce(Consumer& c, float (*of)[4]) {
  const u32 buffer = c.sums + (c.tiles & 1) * (SUMS_BYTES / 2);
  const int g = c.lane >> 2, t = c.lane & 3;
  const auto pairs = [](int j) { return BOTH ? column_pairs(j) : column_pairs(0); };
  const auto place = [&](int j, int warp) { return buffer + (j * (NUM_WARPS * 8) * pairs(0) + (warp * 8 + g) * pairs(j) + t) * 16; };
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
    const float* f = of[j];
    if (t < pairs(j))
      sts128(place(j, c.warp), make_uint4(__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]), __float_as_uint(f[3])));
  }
  consumers_sync();
  constexpr int OWNERS = BOTH ? 1 : COUNT;
  const int mine = c.warp - OWNERS * (int)(c.tiles % (NUM_WARPS / OWNERS));
  c.tiles++;
  if (mine < 0 || mine >= OWNERS) return -1;
#pragma unroll
  for (int j = 0; j < (BOTH ? COUNT : 1); j++) {
    float f[4] = {0, 0, 0, 0};
    if (t < pairs(j)) {
#pragma unroll
      for (int w = 0; w < NUM_WARPS; w++) {
        const uint4 v = lds128(place(BOTH ? j : mine, w));
        f[0] += __uint_as_float(v.x);
        f[1] += __uint_as_float(v.y);
        f[2] += __uint_as_float(v.z);
        f[3] += __uint_as_float(v.w);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) of[j][i] = f[i];
  }
  return mine;
}
// Calls body(column, upper, lower) for the lane's columns of a reduced tile: of tile rows g and g + 8.
template <int GROUPS, class Body> DEVICE void for_columns(const Consumer& c, const float (*of)[4], Body body) {
#pragma unroll
  for (int j = 0; j < GROUPS; j++)
#pragma unroll
    for (int i = 0; i < 2; i++) body(8 * j + 2 * (c.lane & 3) + i, of[j][i], of[j][2 + i]);
}
