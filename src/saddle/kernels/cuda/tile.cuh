// Products of packed weight tiles and the activations of up to 12 rows on tensor cores.
//
// A tile's 16 rows are the rows of mma.m16n8k16, the batch its 8 columns; more rows are the columns of a second mma with
// the same weights. Lane 4 g + t reads 16 bytes at row g (and row g + 8), byte 16 t of a tile: no bank conflicts, and the
// numbers are an operand if the activations' k is permuted alike. So activations lie in shared memory in the order in
// which lanes want them:
//   FP8 stages  f16:  [k / 64][k / 8 % 2][row][k / 16 % 4][8]     a lane's k of one tile are 16 t .. 16 t + 15
//   lm_head     bf16: [k / 32][row][32]                           8 t .. 8 t + 7
// FP8 weights become f16 exactly; activations stay f16, which is closer to the reference than FP8 would be.
// Warp w computes block w of 128 columns, which has one scale; the warps' sums meet in shared memory.
#pragma once
#include "ring.cuh"

DEVICE u32 f16_place(int row, int k) {
  return (k >> 6) * (128 * MAX_ROWS) + ((k >> 3) & 1) * (64 * MAX_ROWS) + row * 64 + ((k >> 4) & 3) * 16 + (k & 7) * 2;
}
DEVICE u32 bf16_place(int row, int k) { return (k >> 5) * (64 * MAX_ROWS) + row * 64 + (k & 31) * 2; }

// What a lane multiplies and sums of a tile, in the mma's layout: in group j of columns, tile rows g and g + 8, columns
// 8 j + 2 t and 8 j + 2 t + 1. Column n is row n, or the n-th of some rows.
template <int GROUPS> struct Sums {
  u32 inputs[GROUPS];  // where the row of column 8 j + g begins, plus 16 t
  float of[GROUPS][4] = {};
};
DEVICE Sums<COLUMN_GROUPS> all_rows(const Consumer& c) {
  Sums<COLUMN_GROUPS> sum;  // columns without a row repeat the last one
#pragma unroll
  for (int j = 0; j < COLUMN_GROUPS; j++) sum.inputs[j] = min(8 * j + (c.lane >> 2), MAX_ROWS - 1) * 64 + (c.lane & 3) * 16;
  return sum;
}
// The n-th of `rows`, -1: there are fewer.
DEVICE int nth_row(u32 rows, int n) {
  for (; n > 0 && rows; n--) rows &= rows - 1;
  return __ffs(rows) - 1;
}
DEVICE Sums<1> some_rows(const Consumer& c, u32 rows) {
  Sums<1> sum;
  const int row = nth_row(rows, c.lane >> 2);
  sum.inputs[0] = (row < 0 ? __ffs(rows) - 1 : row) * 64 + (c.lane & 3) * 16;
  return sum;
}

// Adds a slot's product to the sums and gives the slot back. `act`: address of the slot's first column.
template <int SLOT_K, int GROUPS> DEVICE void multiply_fp8(const Consumer& c, Slot slot, u32 act, Sums<GROUPS>& sum) {
  constexpr int BLOCKS = SLOT_K / SCALE_K;
  if (BLOCKS < NUM_WARPS && c.warp >= BLOCKS) {
    release(c, slot);
    return;
  }
  const u32 weights = slot.at + c.warp * (2 * TILE_BYTES) + c.lane * 16;
  const u32 inputs = act + c.warp * (256 * MAX_ROWS);
  uint4 w[4], x[GROUPS][4];
#pragma unroll
  for (int i = 0; i < 4; i++) w[i] = lds128(weights + i * (TILE_BYTES / 2));
  const uint2 scale = lds64(slot.at + TILE_ROWS * SLOT_K + c.warp * 8);
#pragma unroll
  for (int j = 0; j < GROUPS; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) x[j][i] = lds128(inputs + sum.inputs[j] + i * (64 * MAX_ROWS));
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
    for (int i = 0; i < 4; i++) sum.of[j][i] += (even[j][i] + odd[j][i]) * (i < 2 ? scale_top : scale_low);
}

template <int SLOT_K> DEVICE void multiply_bf16(const Consumer& c, Slot slot, u32 act, Sums<COLUMN_GROUPS>& sum) {
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
    for (int j = 0; j < COLUMN_GROUPS; j++) x[j][i] = lds128(act + tile * (64 * MAX_ROWS) + sum.inputs[j]);
  }
  release(c, slot);
#pragma unroll
  for (int i = 0; i < EACH; i++) {
#pragma unroll
    for (int j = 0; j < COLUMN_GROUPS; j++) {
      mma_bf16(sum.of[j], top[i].x, low[i].x, top[i].y, low[i].y, x[j][i].x, x[j][i].y);
      mma_bf16(sum.of[j], top[i].z, low[i].z, top[i].w, low[i].w, x[j][i].z, x[j][i].w);
    }
  }
}

// Adds the warps' sums. Returns true in the one warp that then holds them; which one goes round, so that the work after
// a tile overlaps with the next tile. Two buffers: a warp is at most one tile ahead of the slowest.
template <int GROUPS> DEVICE bool reduce_tile(Consumer& c, Sums<GROUPS>& sum) {
  const u32 buffer = c.sums + (c.tiles & 1) * (SUMS_BYTES / 2);
  const int g = c.lane >> 2, t = c.lane & 3;
  const auto place = [&](int j, int warp) {
    return buffer + (j * (NUM_WARPS * 8 * 4) + (warp * 8 + g) * column_pairs(j) + t) * 16;
  };
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    const float* f = sum.of[j];
    if (t < column_pairs(j))
      sts128(place(j, c.warp), make_uint4(__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]), __float_as_uint(f[3])));
  }
  consumers_sync();
  const bool mine = c.tiles % NUM_WARPS == c.warp;
  c.tiles++;
  if (!mine) return false;
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    float* f = sum.of[j];
    f[0] = f[1] = f[2] = f[3] = 0;
    if (t >= column_pairs(j)) continue;
#pragma unroll
    for (int w = 0; w < NUM_WARPS; w++) {
      const uint4 v = lds128(place(j, w));
      f[0] += __uint_as_float(v.x);
      f[1] += __uint_as_float(v.y);
      f[2] += __uint_as_float(v.z);
      f[3] += __uint_as_float(v.w);
    }
  }
  return true;
}
// Calls body(column, upper, lower) for the lane's columns of a reduced tile: of tile rows g and g + 8.
template <int GROUPS, class Body> DEVICE void for_columns(const Consumer& c, const Sums<GROUPS>& sum, Body body) {
#pragma unroll
  for (int j = 0; j < GROUPS; j++)
#pragma unroll
    for (int i = 0; i < 2; i++) body(8 * j + 2 * (c.lane & 3) + i, sum.of[j][i], sum.of[j][2 + i]);
}

// A whole tile of an FP8 matrix: SLOTS slots, one after the other along k.
template <class Shape, int SLOTS, int GROUPS> DEVICE void multiply_tile(Consumer& c, Slot first, u32 act, Sums<GROUPS>& sum) {
  multiply_fp8<Shape::SLOT_K>(c, first, act, sum);
#pragma unroll
  for (int i = 1; i < SLOTS; i++) {
    const Slot slot = next_slot(c);
    multiply_fp8<Shape::SLOT_K>(c, slot, act + i * (Shape::SLOT_K * 2 * MAX_ROWS), sum);
  }
}
