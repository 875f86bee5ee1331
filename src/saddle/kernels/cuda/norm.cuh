// RMSNorm of the residual into the activations of the next stage, computed by every multiprocessor for itself (a row is
// 24 KB of L2 traffic; a barrier more would cost as much), or of 4 rows and more by pairs of multiprocessors, each half
// of the rows, which then copy them into each other's shared memory. With ROUTER also GATE_ROWS rows of the router:
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

// Dot products of the weighted rows with GATE_ROWS rows of the router, a sum a warp, from warp_sums[..][at * NORM_ROWS] on.
DEVICE void gate_products(const Consumer& c, Slot slot, int at, const float2 (*x)[NORM_PAIRS]) {
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
      if (c.lane == 0) c.shared->warp_sums[c.warp][(at + e) * NORM_ROWS + row] = sum;
    }
  }
}

// Gives the other multiprocessor of the pair the rows from `first` on, and waits for its rows. Rows lie in pieces of 64
// bytes, one beside the other for each of HIDDEN / 32 places. Nobody writes the buffer before the copies have been read:
// what writes it next waits for words or a barrier of all multiprocessors that have tiles of the stage behind the norm.
DEVICE void exchange_rows(Consumer& c, int first) {
  constexpr u32 BYTES = NORM_ROWS * 64, PIECES = HIDDEN / 32;
  const u32 normed = shared_address(&c.shared->normed), peer = (c.cta & 1) ^ 1;
  if (c.thread == 0) mbarrier_expect(normed, BYTES * PIECES);
  if (c.thread < PIECES) {
    const u32 at = c.act + c.thread * (64 * MAX_ROWS) + first * 64;
    copy_to_peer(address_in_peer(at, peer), at, BYTES, address_in_peer(normed, peer));
  }
  mbarrier_wait(&c.shared->normed, c.norms & 1, FAILED_WORDS);
  c.norms++;
}

template <bool ROUTER, bool BF16> DEVICE void norm(Consumer& c, const NormWeights& weights) {
  constexpr int GATES = GATE_ROWS * NORM_SHARE;  // rows of the router, for this multiprocessor's rows of the step
  const bool routes = ROUTER && c.cta < GATE_CTAS;
  const int first = NORM_SHARE == 1 ? 0 : (c.cta & 1) * NORM_ROWS;
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
#pragma unroll 1
    for (int i = 0; i < NORM_SHARE; i++) {
      const Slot slot = next_slot(c);
      gate_products(c, slot, 1 + i * GATE_ROWS, x);
      release(c, slot);
    }
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
  if (routes && c.thread < GATES * NORM_ROWS) {
    const int row = c.thread / GATES, e = c.thread % GATES;
    float product = 0, sum = 0;
    for (int w = 0; w < NUM_WARPS; w++) {
      sum += c.shared->warp_sums[w][row];
      product += c.shared->warp_sums[w][(1 + e) * NORM_ROWS + row];
    }
    const float logit = product * rsqrtf(sum * (1.f / HIDDEN) + NORM_EPS);
    put_word(c.p.router_words + (first + row) * NUM_EXPERTS + c.cta / NORM_SHARE * GATES + e, logit, c.epoch);
  }
  if (NORM_SHARE > 1) fence_async();
  consumers_sync();
  if (NORM_SHARE > 1) exchange_rows(c, first);
}
