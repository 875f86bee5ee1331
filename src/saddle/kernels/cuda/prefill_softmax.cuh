// The online softmax of a turn, in registers: base 2, as the queries carry the factor. A lane holds two lines.
#pragma once
#include "prefill_product.cuh"

struct Softmax {
  float best[2];   // largest scores so far
  float total[2];  // this lane's share of the sums of weights
};

// Keys behind a line's own position count nothing. `seen`: keys of the turn that lines g and g + 8 see, less 2 t. The
// factors come in here: a line that sees no key has UNSEEN for its largest score, and a fused product of that with a
// factor, less its rounded self, may be anything.
DEVICE void mask(float (&scores)[KEYS / 2], const float (&factors)[2], const int (&seen)[2]) {
#pragma unroll
  for (int i = 0; i < KEYS / 2; i++) {
    scores[i] *= factors[i / 2 % 2];
    if (i / 4 * 8 + i % 2 >= seen[i / 2 % 2]) scores[i] = UNSEEN;
  }
}

// Scores, times the factor of their line, become weights; returns in `shrink` what the results so far have to be
// multiplied by. SCALED: the factors are in already.
template <bool SCALED> DEVICE void weigh(float (&scores)[KEYS / 2], const float (&factors)[2], Softmax& now, float (&shrink)[2]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float most[4] = {SCALED ? now.best[r] : UNSEEN, UNSEEN, UNSEEN, UNSEEN};  // four chains: one warp at a time has the scheduler
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) most[j % 2 * 2 + e] = fmaxf(most[j % 2 * 2 + e], scores[4 * j + 2 * r + e]);
    float best = quad_max(fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3])));
    if (!SCALED) best = fmaxf(now.best[r], best * factors[r]);
    shrink[r] = exp2_fast(now.best[r] - best);
    now.best[r] = best;
    float sums[2] = {now.total[r] * shrink[r], 0.f};
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float score = scores[4 * j + 2 * r + e];
        const float weight = exp2_fast(SCALED ? score - best : fmaf(score, factors[r], -best));
        scores[4 * j + 2 * r + e] = weight;
        sums[e] += weight;
      }
    now.total[r] = sums[0] + sums[1];
  }
}

DEVICE void round_weights(const float (&scores)[KEYS / 2], u32 (&weights)[KEYS / 4]) {
#pragma unroll
  for (int i = 0; i < KEYS / 4; i++)
    weights[i] = FP8 ? pack_f16(scores[2 * i], scores[2 * i + 1]) : pack_bf16(scores[2 * i], scores[2 * i + 1]);
}
