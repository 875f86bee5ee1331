// The output projection: part by part of its columns, the attention's words are polled into the activation buffer and
// the products added to the residual.
#pragma once
#include "combine.cuh"

DEVICE void load_attention(Consumer& c, int part) {
  constexpr int WORDS = O_WIDTH / 2, EACH = (WORDS / 2 + NUM_THREADS - 1) / NUM_THREADS;  // two words a load
  constexpr int ROWS = MAX_ROWS < 4 ? MAX_ROWS : MAX_ROWS == 12 ? 6 : MAX_ROWS == 16 ? 8 : 4;  // polled together
#pragma unroll
  for (int first = 0; first < MAX_ROWS; first += ROWS) {
    u64 word[ROWS][EACH][2];
    Patience patience;
    for (bool fresh = false; !fresh;) {
      fresh = true;
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
          const int at = (i * NUM_THREADS + c.thread) * 2;
          word[r][i][0] = word[r][i][1] = no_word(c.epoch);
          if (((c.rows >> (first + r)) & 1) && at < WORDS)
            load_relaxed(c.p.attention_words + (first + r) * (Q_WIDTH / 2) + part * WORDS + at, word[r][i][0], word[r][i][1]);
        }
      }
#pragma unroll
      for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < EACH; i++) fresh &= is_fresh(word[r][i][0], c.epoch) && is_fresh(word[r][i][1], c.epoch);
      if (!fresh) patience.lose(FAILED_WORDS);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int i = 0; i < EACH; i++) {
        const int at = (i * NUM_THREADS + c.thread) * 2;
        if (at < WORDS) sts64(c.act + f16_place(first + r, 2 * at), (u32)word[r][i][0], (u32)word[r][i][1]);
      }
  }
  consumers_sync();
}

DEVICE void output_stage(Consumer& c) {
  typedef Inputs<OutputShape, O_SLOTS, COLUMN_GROUPS> Part;
  for_runs(
      c, HIDDEN / TILE_ROWS,
      [&](int part) {
        load_attention(c, part);
        return Part(c, c.act, all_rows(c));
      },
      [&](const Part& inputs, int part, int tile, Slot first) {
        float of[COLUMN_GROUPS][4] = {};
        multiply_tile(c, first, inputs, of);
        if (reduce<COLUMN_GROUPS, true>(c, of) < 0) return;
        const int column = tile * TILE_ROWS + (c.lane >> 2);
        for_columns<COLUMN_GROUPS>(c, of, [&](int row, float upper, float lower) {
          if (!((c.rows >> row) & 1)) return;
          add_residual(c, row, column, upper);
          add_residual(c, row, column + 8, lower);
        });
      });
}
