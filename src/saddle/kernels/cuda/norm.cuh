// RMSNorm of the residual into the activations of the next stage, computed by every multiprocessor for itself (a row is
// 24 KB of L2 traffic; a barrier more would cost as much). With ROUTER also GATE_ROWS rows of the router:
//   logit = sum_k x_k w_k gate_k / rms(x)     in float32, x not rounded
#pragma once
#include "residual.cuh"
#include "tile.cuh"

// A thread's columns are pairs (i * NUM_THREADS + thread): each load of a warp is whole lines.
constexpr int NORM_PAIRS = (HIDDEN / 2 + NUM_THREADS - 1) / NUM_THREADS;
constexpr bool NORM_EVEN = HIDDEN % (2 * NUM_THREADS) == 0;  // no thread idles
DEVICE int norm_column(const Consumer& c, int i) { return (i * NUM_THREADS + c.thread) * 2; }

struct NormWeights {
  float2 pair[NORM_PAIRS];
};
// Read before the barrier that the norm waits for.
DEVICE NormWeights load_norm_weights(const Consumer& c, const float* weight) {
  NormWeights w;
#pragma unroll
  for (int i = 0; i < NORM_PAIRS; i++) {
    const int k = norm_column(c, i);
    w.pair[i] = NORM_EVEN || k < HIDDEN ? __ldg((const float2*)(weight + k)) : make_float2(0.f, 0.f);
  }
  return w;
}

// Rows first .. first + NORM_ROWS - 1.
DEVICE void load_rows(const Consumer& c, int first, float2 (*x)[NORM_PAIRS]) {
#pragma unroll
  for (int row = 0; row < NORM_ROWS; row++) {
#pragma unroll
    for (int i = 0; i < NORM_PAIRS; i++) {
      const int k = norm_column(c, i);
      x[row][i] = make_float2(0.f, 0.f);
      if (!((c.rows >> (first + row)) & 1) || !(NORM_EVEN || k < HIDDEN)) continue;
      i64 a, b;
      load_cg(c.p.residual + (first + row) * HIDDEN + k, a, b);
      x[row][i] = make_float2(from_residual(a), from_residual(b));
    }
  }
}

// Dot products of the weighted rows with this multiprocessor's rows of the router, a sum a warp.
DEVICE void gate_products(const Consumer& c, Slot slot, const float2 (*x)[NORM_PAIRS]) {
#pragma unroll
  for (int e = 0; e < GATE_ROWS; e++) {
    float2 gate[NORM_PAIRS];
#pragma unroll
    for (int i = 0; i < NORM_PAIRS; i++) {
      const int k = norm_column(c, i);
      const uint2 v = NORM_EVEN || k < HIDDEN ? lds64(slot.at + (e * HIDDEN + k) * 4) : make_uint2(0, 0);
      gate[i] = make_float2(__uint_as_float(v.x), __uint_as_float(v.y));
    }
#pragma unroll
    for (int row = 0; row < NORM_ROWS; row++) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < NORM_PAIRS; i++) sum += x[row][i].x * gate[i].x + x[row][i].y * gate[i].y;
      sum = warp_sum(sum);
      if (c.lane == 0) c.shared->warp_sums[c.warp][(1 + e) * NORM_ROWS + row] = sum;
    }
  }
}

template <bool ROUTER, bool BF16> DEVICE void norm(Consumer& c, const NormWeights& weights) {
  const bool routes = ROUTER && c.cta < GATE_CTAS;
  Slot slot;
#pragma unroll 1
  for (int first = 0; first < MAX_ROWS; first += NORM_ROWS) {
    float2 x[NORM_ROWS][NORM_PAIRS];
    load_rows(c, first, x);
#pragma unroll
    for (int row = 0; row < NORM_ROWS; row++) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < NORM_PAIRS; i++) {
        sum += x[row][i].x * x[row][i].x + x[row][i].y * x[row][i].y;
        x[row][i].x *= weights.pair[i].x;
        x[row][i].y *= weights.pair[i].y;
      }
      sum = warp_sum(sum);
      if (c.lane == 0) c.shared->warp_sums[c.warp][row] = sum;
    }
    if (routes) {
      if (first == 0) slot = next_slot(c);
      gate_products(c, slot, x);
      if (first + NORM_ROWS == MAX_ROWS) release(c, slot);
    }
    consumers_sync();
#pragma unroll
    for (int row = 0; row < NORM_ROWS; row++) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < NUM_WARPS; w++) sum += c.shared->warp_sums[w][row];
      const float inverse = rsqrtf(sum * (1.f / HIDDEN) + NORM_EPS);
#pragma unroll
      for (int i = 0; i < NORM_PAIRS; i++) {
        const int k = norm_column(c, i);
        const float a = x[row][i].x * inverse, b = x[row][i].y * inverse;
        if (NORM_EVEN || k < HIDDEN)
          sts32(c.act + (BF16 ? bf16_place(first + row, k) : f16_place(first + row, k)), BF16 ? pack_bf16(a, b) : pack_f16(a, b));
      }
    }
    if (routes && c.thread < GATE_ROWS * NORM_ROWS) {
      const int row = c.thread / GATE_ROWS, e = c.thread % GATE_ROWS;
      float product = 0, sum = 0;
      for (int w = 0; w < NUM_WARPS; w++) {
        sum += c.shared->warp_sums[w][row];
        product += c.shared->warp_sums[w][(1 + e) * NORM_ROWS + row];
      }
      const float logit = product * rsqrtf(sum * (1.f / HIDDEN) + NORM_EPS);
      put_word(c.p.router_words + (first + row) * NUM_EXPERTS + c.cta * GATE_ROWS + e, logit, c.epoch);
    }
    consumers_sync();
  }
}
