// What a block works on: tiles of a row's new tokens and of one KV head, or a part of their keys.
//
// Tiles are numbered row by row and taken from the last one on: those of a row that see most keys come first. All KV
// heads of a tile follow each other, and all parts of each. A block's first tile is its own number; then it claims the
// next one that nobody has.
#pragma once
#include "prefill_shapes.cuh"

struct Params {
  TensorMap queries;        // [T][heads][128] bf16
  TensorMap memory;         // [block, k or v, kv head, token][128] bf16 or E4M3
  const float* query_factors;  // [T], of scores, or null
  const int* block_tables;  // [rows of the engine][table_stride]
  const int* row_ids;       // [R]
  const int* query_starts;  // [R + 1]
  const int* context_lens;  // [R]
  void* output;             // [T][heads][128] bf16, or E4M3 where there are scales
  float* output_scales;     // [T][heads] or null
  float* partial;           // [parts][LINES][128], of split keys
  float* stats;             // [parts][2][LINES]
  int* queue;               // tiles claimed, blocks that are done; zeros between launches
  int table_stride;
  int first_row;
  int num_rows;
  int num_splits;
  float k_scale, v_scale;   // of FP8 memory
};

struct Tile {
  int head;      // of KV
  int token;     // in [T]
  int count;     // tokens, at most TOKENS; 0: no tile is left
  int position;  // of the first token
  int context;   // of the row
  int low, high; // turns
  int part;      // in `partial`
  int table;     // row of `block_tables`; what only the producer reads
};

struct Shared {
  u64 query_full[QUERY_SLOTS], query_empty[QUERY_SLOTS];
  u64 key_full[STAGES], key_empty[STAGES], value_full[STAGES], value_empty[STAGES];
  u64 narrow_full[STAGES], narrow_empty[STAGES];
  int known[STAGES];  // keys of the turn that lie within the context; -1: no turn follows
  Tile tiles[QUERY_SLOTS];
  u16 ends[MAX_ROWS];  // tiles up to and with this row
};

// Sums of tiles by row. One warp.
DEVICE void count_tiles(const Params& p, Shared* s, int lane) {
  int before = 0;
  for (int base = 0; base < p.num_rows; base += 32) {
    const int row = base + lane;
    int sum = 0;
    if (row < p.num_rows) {
      const int* starts = p.query_starts + p.first_row + row;
      sum = (starts[1] - starts[0] + TOKENS - 1) / TOKENS;
    }
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(~0u, sum, offset);
      if (lane >= offset) sum += other;
    }
    if (row < p.num_rows) s->ends[row] = (u16)(before + sum);
    before += __shfl_sync(~0u, sum, 31);
  }
}

DEVICE Tile find_tile(const Params& p, const Shared* s, int number) {
  const int split = number % p.num_splits, rest = number / p.num_splits;
  const int head = rest % KV_HEADS, place = rest / KV_HEADS;
  const int tile = s->ends[p.num_rows - 1] - 1 - place;
  Tile found{};
  if (tile < 0) return found;
  int low = 0, high = p.num_rows - 1;  // the first row whose tiles end behind this one
  while (low < high) {
    const int middle = (low + high) / 2;
    if (s->ends[middle] > tile) high = middle;
    else low = middle + 1;
  }
  const int row = p.first_row + low, first = (tile - (low ? s->ends[low - 1] : 0)) * TOKENS;
  const int begin = p.query_starts[row], length = p.query_starts[row + 1] - begin;
  found.head = head;
  found.token = begin + first;
  found.count = min(TOKENS, length - first);
  found.context = p.context_lens[row];
  found.position = found.context - length + first;
  const int turns = (found.position + found.count + KEYS - 1) / KEYS;
  found.low = turns * split / p.num_splits;
  found.high = turns * (split + 1) / p.num_splits;
  found.part = number % p.num_splits + ((place * KV_HEADS) + head) * p.num_splits;
  found.table = p.row_ids[row];
  return found;
}
