// The residual stream: 64-bit fixed point, 2^-32 a step. Many multiprocessors add to it at once; integer sums do not
// depend on their order, so a step gives the same bits whenever it is run on the same input.
//
// Range: contributions of magnitude 2^20 and more, infinities and NaN are not added but mark their row; its logits
// become NaN. 2^20 times all additions of 62 layers (8 experts, 2 halves of O each) stays below 2^31, the format's end.
#pragma once
#include "words.cuh"

constexpr float RESIDUAL_ONE = 4294967296.f;
constexpr float RESIDUAL_LIMIT = 1048576.f;
static_assert((TOP_K + O_PARTS) * NUM_LAYERS < 2048, "a residual could leave 64 bits");

DEVICE i64 to_residual(float value) {
  i64 fixed;
  asm("cvt.rni.s64.f32 %0,%1;" : "=l"(fixed) : "f"(value * RESIDUAL_ONE));
  return fixed;
}
DEVICE float from_residual(i64 fixed) { return (float)fixed * (1.f / RESIDUAL_ONE); }

DEVICE void add_residual(const Consumer& c, int row, int column, float value) {
  if (fabsf(value) < RESIDUAL_LIMIT) add_relaxed(c.p.residual + row * HIDDEN + column, to_residual(value));
  else or_relaxed(c.p.sync + SYNC_BAD_ROWS, 1u << row);
}
// The residual starts as the embedding; multiprocessors write a share each.
DEVICE void start_residual(const Consumer& c) {
  for (int i = (c.cta * NUM_THREADS + c.thread) * 2; i < MAX_ROWS * HIDDEN; i += NUM_CTAS * NUM_THREADS * 2) {
    const int row = i / HIDDEN;
    u32 pair = 0;
    if ((c.rows >> row) & 1) pair = __ldg((const u32*)(c.p.embed + (i64)c.shared->token[row] * HIDDEN + i - row * HIDDEN));
    const float x[2] = {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
    for (int j = 0; j < 2; j++) {
      const bool fits = fabsf(x[j]) < RESIDUAL_LIMIT;
      c.p.residual[i + j] = fits ? to_residual(x[j]) : 0;
      if (!fits) or_relaxed(c.p.sync + SYNC_BAD_ROWS, 1u << row);
    }
  }
}
