// Adds the splits of attention: out = sum of 2^(lse_s - max) out_s over sum of 2^(lse_s - max). Each of a KV head's
// multiprocessors finishes an equal share of the outputs of every row and hands them on as pairs of f16.
#pragma once
#include "attention.cuh"

DEVICE void combine(Consumer& c, int head, int split) {
  constexpr int OUTPUTS = COMBINE_OUTPUTS, GROUPS = COMBINE_GROUPS;
  const int row = c.thread / OUTPUTS % MAX_ROWS, group = c.thread / (OUTPUTS * MAX_ROWS);
  const int output = split * OUTPUTS + c.thread % OUTPUTS, query_head = output >> 7;
  const bool real = (c.rows >> row) & 1;
  const int first = c.shared->first_split[row], last = real ? c.shared->last_split[row] : -1;
  float maximum = -1e30f, out = 0, total = 0;
  // Two splits at a time, so that their words are on the way together.
  for (int s = first + group; s <= last; s += 2 * GROUPS) {
    const bool both = s + GROUPS <= last;
    const u64* words = c.p.partial_words + ((i64)(head * SPLITS + s) * MAX_ROWS + row) * (GROUP * PARTIAL_PITCH)
                       + query_head * PARTIAL_PITCH;
    const u64* others = words + (both ? (i64)GROUPS * MAX_ROWS * GROUP * PARTIAL_PITCH : 0);
    u64 value, lse, other_value, other_lse;
    Patience patience;
    for (;;) {
      value = load_relaxed(words + (output & 127));
      lse = load_relaxed(words + HEAD_DIM);
      other_value = load_relaxed(others + (output & 127));
      other_lse = load_relaxed(others + HEAD_DIM);
      if (is_fresh(value, c.epoch) && is_fresh(lse, c.epoch) && is_fresh(other_value, c.epoch) && is_fresh(other_lse, c.epoch)) break;
      patience.lose(c.p, c.shared, FAILED_WORDS);
    }
    const float larger = fmaxf(maximum, both ? fmaxf(word_float(lse), word_float(other_lse)) : word_float(lse));
    const float shrink = exp2_fast(maximum - larger), share = exp2_fast(word_float(lse) - larger);
    const float other_share = both ? exp2_fast(word_float(other_lse) - larger) : 0.f;
    out = out * shrink + share * word_float(value) + other_share * word_float(other_value);
    total = total * shrink + share + other_share;
    maximum = larger;
  }
  if (GROUPS > 1) {  // the groups' sums meet in the activation buffer
    sts128(c.act + c.thread * 16, make_uint4(__float_as_uint(maximum), __float_as_uint(out), __float_as_uint(total), 0));
    consumers_sync();
    if (group == 0) {
      float larger = maximum, outs[GROUPS], totals[GROUPS], maxima[GROUPS];
#pragma unroll
      for (int i = 0; i < GROUPS; i++) {
        const uint4 v = lds128(c.act + (i * OUTPUTS * MAX_ROWS + c.thread) * 16);
        maxima[i] = __uint_as_float(v.x);
        outs[i] = __uint_as_float(v.y);
        totals[i] = __uint_as_float(v.z);
        larger = fmaxf(larger, maxima[i]);
      }
      out = total = 0;
#pragma unroll
      for (int i = 0; i < GROUPS; i++) {
        const float share = exp2_fast(maxima[i] - larger);
        out += share * outs[i];
        total += share * totals[i];
      }
    }
  }
  const float mine = out / total, next = __shfl_down_sync(~0u, mine, 1);
  if (group == 0 && real && (output & 1) == 0) {
    u64* word = c.p.attention_words + row * (Q_WIDTH / 2) + (head * GROUP * HEAD_DIM + output) / 2;
    put_word(word, pack_f16(mine, next), c.epoch);
  }
  consumers_sync();
}

DEVICE void attention_stage(Consumer& c, int layer) {
  if (c.cta >= ATTENTION_CTAS) return;
#pragma unroll 1
  for (int row = 0; row < MAX_ROWS; row++) {
    Segment s;
    s.head = c.cta / SPLITS;
    if (segment_of(c.shared, row, c.cta % SPLITS, s)) attend(c, layer, s);
    forget(c);
  }
  mark(c, layer, 4);
  combine(c, c.cta / SPLITS, c.cta % SPLITS);
}
