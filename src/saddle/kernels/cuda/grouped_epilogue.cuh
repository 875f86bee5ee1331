// From sums to memory. A quad of lanes holds 8 columns of a row, 2 a lane, chunk by chunk; it exchanges them such that
// each lane has 16 adjacent bytes. In every odd chunk (rows 8 to 15 of a tile) the two columns stand exchanged.
#pragma once
#include "grouped_product.cuh"

DEVICE float swiglu(float gate, float up) { return __fdividef(gate, 1.f + __expf(-gate)) * up; }

// silu(gate) * up in E4M3 with a scale per pair and 128 columns.
template <class S, int HALVES>
DEVICE void store_active(const Params& p, Consumer& c, Shared* s, const Tile& tile, int half,
                         const int (&pairs)[2], float (&sum)[HALVES][64]) {
  float largest[2] = {0, 0};
#pragma unroll
  for (int h = 0; h < HALVES; h++)
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float v = swiglu(sum[h][8 * j + e], sum[h][8 * j + 4 + (e ^ 1)]);
        sum[h][8 * j + e] = v;
        largest[e / 2] = fmaxf(largest[e / 2], fabsf(v));
      }
  largest[0] = quad_max(largest[0]);
  largest[1] = quad_max(largest[1]);
  const int t = c.lane % 4, row = c.warp * 16 + c.lane / 4;
  if (HALVES == 1) {  // the other 64 columns are the other warpgroup's
    float(&shared)[2][SLAB] = s->largest[c.exchanges++ % 2];  // one may still read the last one's
    if (t == 0) shared[c.group][row] = largest[0], shared[c.group][row + 8] = largest[1];
    consumers_sync();
    largest[0] = fmaxf(largest[0], shared[c.group ^ 1][row]);
    largest[1] = fmaxf(largest[1], shared[c.group ^ 1][row + 8]);
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float scale = fmaxf(largest[r], 1e-10f) / 448.f, inverse = 1.f / scale;
    const bool real = pairs[r] >= 0;
    if (real && t == 0 && half == 0) p.output_scales[(size_t)pairs[r] * (S::N / 256) + tile.block] = scale;
    u8* to = (u8*)p.output + (size_t)pairs[r] * (S::N / 2) + tile.block * 128 + half * 64 + t * 16;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      u32 w[4];
#pragma unroll
      for (int q = 0; q < 4; q++) {
        const float* v = sum[h] + 16 * q + 2 * r;
        w[q] = pack_e4m3(v[0] * inverse, v[1] * inverse) | pack_e4m3(v[8] * inverse, v[9] * inverse) << 16;
      }
      quad_transpose(w, c.lane);
      const uint4 all = make_uint4(__byte_perm(w[0], w[1], 0x5410), __byte_perm(w[2], w[3], 0x5410),
                                   __byte_perm(w[0], w[1], 0x7632), __byte_perm(w[2], w[3], 0x7632));
      if (real) *(uint4*)(to + h * 64) = all;
    }
  }
}

// In bf16; times the pair's share of its token where that is what it is.
template <class S, int HALVES>
DEVICE void store_bf16(const Params& p, const Consumer& c, const Tile& tile, int half, const int (&pairs)[2],
                         float (&sum)[HALVES][64]) {
  const int t = c.lane % 4;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const bool real = pairs[r] >= 0;
    const float share = S::OUT != SHARES_BF16 ? 1.f : real ? p.shares[pairs[r]] : 0.f;
    u16* to = (u16*)p.output + (size_t)pairs[r] * S::N + tile.block * ROWS + half * HALF + t * 8;
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
      for (int q = 0; q < 4; q++) {
        u32 w[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float* v = sum[h] + 16 * q + 4 * j + 2 * r;
          w[j] = pack_bf16(v[j % 2] * share, v[1 - j % 2] * share);
        }
        quad_transpose(w, c.lane);
        if (real) *(uint4*)(to + h * HALF + q * 32) = make_uint4(w[0], w[1], w[2], w[3]);
      }
  }
}

// Queries: times the gain of their norm, and rotated; 1 / rms, of all of a token's heads, joins in attention. A half of
// a tile is a head, its numbers i and i + 32 lie in one thread, four chunks apart. Keys and values as they are.
template <class S, int HALVES>
DEVICE void store_turned(const Params& p, const Consumer& c, const Tile& tile, int half, const int (&pairs)[2],
                         float (&sum)[HALVES][64]) {
  const int t = c.lane % 4;
  if (tile.block < p.turned) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = max(pairs[r], 0), position = max(p.positions[row], 0);
      float2 cos[4], sin[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        cos[j] = *(const float2*)(p.cos + (size_t)position * 32 + 8 * j + 2 * t);
        sin[j] = *(const float2*)(p.sin + (size_t)position * 32 + 8 * j + 2 * t);
      }
#pragma unroll
      for (int h = 0; h < HALVES; h++) {
        const int head = tile.block * 2 + half + h;
        const float* gain = p.gain + head * 128 + 2 * t;
        float square = 0;
#pragma unroll
        for (int j = 0; j < 16; j++) {
          const float2 g = *(const float2*)(gain + 8 * j);
          float* v = sum[h] + 4 * j + 2 * r;
          square = fmaf(v[0], v[0], fmaf(v[1], v[1], square));
          v[j % 2] *= g.x, v[1 - j % 2] *= g.y;
        }
        square = quad_sum(square);
        if (t == 0 && pairs[r] >= 0) p.squares[(size_t)row * p.turned * 2 + head] = square;
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float &first = sum[h][4 * j + 2 * r + (e ^ j % 2)], &second = sum[h][4 * (j + 4) + 2 * r + (e ^ j % 2)];
            const float a = first, b = second, co = e ? cos[j].y : cos[j].x, si = e ? sin[j].y : sin[j].x;
            first = a * co - b * si, second = b * co + a * si;
          }
      }
    }
  }
  store_bf16<S, HALVES>(p, c, tile, half, pairs, sum);
}

// ADDED_F32: on top of what is there. Nobody else adds to these numbers, so the order of sums is the same every time.
template <class S, int HALVES>
DEVICE void store_f32(const Params& p, const Consumer& c, const Tile& tile, int half, const int (&pairs)[2],
                      float (&sum)[HALVES][64]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    if (pairs[r] < 0) continue;
    float* to = (float*)p.output + (size_t)pairs[r] * S::N + tile.block * ROWS + half * HALF + c.lane % 4 * 2;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      float2 old[16];  // all under way at once; of more there are no registers
      if constexpr (S::OUT == ADDED_F32)
#pragma unroll
        for (int j = 0; j < 16; j++) old[j] = *(const float2*)(to + h * HALF + 8 * j);
#pragma unroll
      for (int j = 0; j < 16; j++) {
        const float* v = sum[h] + 4 * j + 2 * r;
        float2 all = make_float2(v[j % 2], v[1 - j % 2]);
        if constexpr (S::OUT == ADDED_F32) all.x += old[j].x, all.y += old[j].y;
        *(float2*)(to + h * HALF + 8 * j) = all;
      }
    }
  }
}
