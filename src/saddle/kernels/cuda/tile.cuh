// Products of packed weight tiles and the activations of up to 8 rows on tensor cores.
//
// A tile's 16 rows are the rows of mma.m16n8k16, the batch its 8 columns. Lane 4 g + t reads 16 bytes at row g (and
// row g + 8), byte 16 t of a tile: no bank conflicts, and the numbers are an operand if the activations' k is permuted
// alike. So activations lie in shared memory in the order in which lanes want them:
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

// Adds a slot's product to sum[4] (the mma's layout) and gives the slot back. `act`: address of the slot's first column.
template <int SLOT_K> DEVICE void multiply_fp8(const Consumer& c, Slot slot, u32 act, float* sum) {
  constexpr int BLOCKS = SLOT_K / SCALE_K;
  if (BLOCKS < NUM_WARPS && c.warp >= BLOCKS) {
    release(c, slot);
    return;
  }
  const int g = min(c.lane >> 2, MAX_ROWS - 1), t = c.lane & 3;  // columns without a row repeat the last one
  const u32 weights = slot.at + c.warp * (2 * TILE_BYTES) + c.lane * 16;
  const u32 inputs = act + c.warp * (256 * MAX_ROWS) + g * 64 + t * 16;
  uint4 w[4], x[4];
#pragma unroll
  for (int i = 0; i < 4; i++) w[i] = lds128(weights + i * (TILE_BYTES / 2));
  const uint2 scale = lds64(slot.at + TILE_ROWS * SLOT_K + c.warp * 8);
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = lds128(inputs + i * (64 * MAX_ROWS));
  release(c, slot);
  float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};  // two chains: an mma waits for the one before on its sum
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 top[4] = {w[2 * i].x, w[2 * i].y, w[2 * i].z, w[2 * i].w};
    const u32 low[4] = {w[2 * i + 1].x, w[2 * i + 1].y, w[2 * i + 1].z, w[2 * i + 1].w};
    const u32 b[8] = {x[2 * i].x,     x[2 * i].y,     x[2 * i].z,     x[2 * i].w,
                      x[2 * i + 1].x, x[2 * i + 1].y, x[2 * i + 1].z, x[2 * i + 1].w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      u32 a0, a1, a2, a3;
      e4m3_to_f16(top[j], a0, a2);
      e4m3_to_f16(low[j], a1, a3);
      mma_f16(j & 1 ? odd : even, a0, a1, a2, a3, b[2 * j], b[2 * j + 1]);
    }
  }
  const float scale_top = __uint_as_float(scale.x), scale_low = __uint_as_float(scale.y);
  sum[0] += (even[0] + odd[0]) * scale_top;
  sum[1] += (even[1] + odd[1]) * scale_top;
  sum[2] += (even[2] + odd[2]) * scale_low;
  sum[3] += (even[3] + odd[3]) * scale_low;
}

template <int SLOT_K> DEVICE void multiply_bf16(const Consumer& c, Slot slot, u32 act, float* sum) {
  constexpr int TILES = SLOT_K / 32;
  constexpr int EACH = (TILES + NUM_WARPS - 1) / NUM_WARPS;
  const int g = min(c.lane >> 2, MAX_ROWS - 1), t = c.lane & 3;
  uint4 top[EACH], low[EACH], x[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int tile = c.warp * EACH + i;
    if (tile >= TILES) {
      top[i] = low[i] = x[i] = make_uint4(0, 0, 0, 0);
      continue;
    }
    top[i] = lds128(slot.at + tile * TILE_BYTES + c.lane * 16);
    low[i] = lds128(slot.at + tile * TILE_BYTES + TILE_BYTES / 2 + c.lane * 16);
    x[i] = lds128(act + tile * (64 * MAX_ROWS) + g * 64 + t * 16);
  }
  release(c, slot);
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    mma_bf16(sum, top[i].x, low[i].x, top[i].y, low[i].y, x[i].x, x[i].y);
    mma_bf16(sum, top[i].z, low[i].z, top[i].w, low[i].w, x[i].z, x[i].w);
  }
}

// Adds the warps' sums. Returns true in the one warp that then holds them; which one goes round, so that the work after
// a tile overlaps with the next tile. Two buffers: a warp is at most one tile ahead of the slowest.
DEVICE bool reduce_tile(Consumer& c, float* sum) {
  const u32 buffer = c.sums + (c.tiles & 1) * (SUMS_BYTES / 2);
  const int g = c.lane >> 2, t = c.lane & 3;
  if (t < COLUMN_PAIRS) {
    sts128(buffer + ((c.warp * 8 + g) * COLUMN_PAIRS + t) * 16,
           make_uint4(__float_as_uint(sum[0]), __float_as_uint(sum[1]), __float_as_uint(sum[2]), __float_as_uint(sum[3])));
  }
  consumers_sync();
  const bool mine = c.tiles % NUM_WARPS == c.warp;
  c.tiles++;
  if (!mine) return false;
  sum[0] = sum[1] = sum[2] = sum[3] = 0;
  if (t < COLUMN_PAIRS) {
#pragma unroll
    for (int w = 0; w < NUM_WARPS; w++) {
      const uint4 v = lds128(buffer + ((w * 8 + g) * COLUMN_PAIRS + t) * 16);
      sum[0] += __uint_as_float(v.x);
      sum[1] += __uint_as_float(v.y);
      sum[2] += __uint_as_float(v.z);
      sum[3] += __uint_as_float(v.w);
    }
  }
  return true;
}

// A whole tile of an FP8 matrix: SLOTS slots, one after the other along k.
template <class Shape, int SLOTS> DEVICE void multiply_tile(Consumer& c, Slot first, u32 act, float* sum) {
  multiply_fp8<Shape::SLOT_K>(c, first, act, sum);
#pragma unroll
  for (int i = 1; i < SLOTS; i++) {
    const Slot slot = next_slot(c);
    multiply_fp8<Shape::SLOT_K>(c, slot, act + i * (Shape::SLOT_K * 2 * MAX_ROWS), sum);
  }
}
