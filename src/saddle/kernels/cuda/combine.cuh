// Adds the splits of attention: out = sum of 2^(lse_s - max) out_s over sum of 2^(lse_s - max). Each of a KV head's
// multiprocessors finishes an equal share of the outputs of every row and hands them on as pairs of f16.
#pragma once
#include "attention.cuh"

// Rows base .. base + COMBINE_ROWS - 1.
DEVICE void combine_rows(Consumer& c, int head, int split, int base) {
  constexpr int OUTPUTS = COMBINE_OUTPUTS, GROUPS = COMBINE_GROUPS;
  const int row = base + c.thread / OUTPUTS % COMBINE_ROWS, group = c.thread / (OUTPUTS * COMBINE_ROWS);
  const int output = split * OUTPUTS + c.thread % OUTPUTS, query_head = output >> 7;
  const bool real = (c.rows >> row) & 1;
  const int first = real ? c.shared->first_split[row] : 0, last = real ? c.shared->last_split[row] : -1;
  const int units = c.shared->first_unit[MAX_ROWS];
  float maximum = -1e30f, out = 0, total = 0;
  // Two splits at a time, so that their words are on the way together. With fewer units than splits some are empty.
  for (int s = first + group; s <= last; s += 2 * GROUPS) {
    const bool some[2] = {split_begin(units, s) < split_begin(units, s + 1),
                          s + GROUPS <= last && split_begin(units, s + GROUPS) < split_begin(units, s + GROUPS + 1)};
    const u64* words = c.p.partial_words + ((i64)(head * SPLITS + s) * MAX_ROWS + row) * (GROUP * PARTIAL_PITCH)
                       + query_head * PARTIAL_PITCH;
    u64 value[2], lse[2];
    Patience patience;
    for (bool fresh = false; !fresh;) {
      fresh = true;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const u64* mine = words + i * (GROUPS * MAX_ROWS * GROUP * PARTIAL_PITCH);
        value[i] = some[i] ? load_relaxed(mine + (output & 127)) : no_word(c.epoch);
        lse[i] = some[i] ? load_relaxed(mine + HEAD_DIM) : no_word(c.epoch);
      }
#pragma unroll
      for (int i = 0; i < 2; i++) fresh &= is_fresh(value[i], c.epoch) && is_fresh(lse[i], c.epoch);
      if (!fresh) patience.lose(FAILED_WORDS);
    }
    float larger = maximum;
#pragma unroll
    for (int i = 0; i < 2; i++) larger = some[i] ? fmaxf(larger, word_float(lse[i])) : larger;
    const float shrink = exp2_fast(maximum - larger);
    out *= shrink;
    total *= shrink;
    maximum = larger;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float share = some[i] ? exp2_fast(word_float(lse[i]) - larger) : 0.f;
      out += share * word_float(value[i]);
      total += share;
    }
  }
  if (GROUPS > 1) {  // the groups' sums meet in the activation buffer
    sts128(c.act + c.thread * 16, make_uint4(__float_as_uint(maximum), __float_as_uint(out), __float_as_uint(total), 0));
    consumers_sync();
    if (group == 0) {
      float larger = maximum, outs[GROUPS], totals[GROUPS], maxima[GROUPS];
#pragma unroll
      for (int i = 0; i < GROUPS; i++) {
        const uint4 v = lds128(c.act + (i * OUTPUTS * COMBINE_ROWS + c.thread) * 16);
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
}

DEVICE void combine(Consumer& c, int head, int split) {
#pragma unroll 1
  for (int base = 0; base < MAX_ROWS; base += COMBINE_ROWS) combine_rows(c, head, split, base);
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
