// Sizes of FP8 products over many tokens, and what they depend on. All are compile-time: one binary a shape.
#pragma once
#include "hopper.cuh"

// ---- the tile of a block: 128 pairs x 256 rows of a weight, 128 columns a turn
// More sums do not fit the registers: two warpgroups hold 128 a thread, and 64 of the turn at work. (Two blocks that
// share the weights of 256 pairs read a third less, and are no faster.)
constexpr int PAIRS = 128;
constexpr int ROWS = 256;
constexpr int TURN_K = 128;  // one scale a turn: a token's for 128 columns, a weight's for 128 x 128
constexpr int SLAB = 64;     // pairs of one wgmma; a tile of at most 64 pairs is one slab
constexpr int HALF = 128;    // rows of one scale, and what a warpgroup takes of a tile of one slab
constexpr int PIECE = 64;    // rows of one wgmma

// ---- threads: two warpgroups multiply, one loads
constexpr int CONSUMERS = 256;
constexpr int PRODUCERS = 128;
constexpr int BLOCK_THREADS = CONSUMERS + PRODUCERS;
// 256 x 224 + 128 x 56 = 64,512 registers, what 384 threads of 168 have.
#define CONSUMER_REGISTERS 224
#define PRODUCER_REGISTERS 56

// ---- packed weights (kernels/tiles.py)
constexpr int TILE_ROWS = 16;
constexpr int TILE_BYTES = 1024;
constexpr int TILE_K = 64;
constexpr int widest_slot(int columns) {
  int slot = 1536;
  while (columns % slot) slot -= 128;
  return slot;
}

// ---- shared memory: a ring of turns. Addresses of weights and inputs are multiples of 1,024, as their swizzle repeats.
constexpr int STAGES = 4;
constexpr int HALF_TURN_BYTES = ROWS * TILE_K;            // weights of 64 columns
constexpr int WEIGHT_BYTES = 2 * HALF_TURN_BYTES;
constexpr int INPUT_BYTES = PAIRS * TURN_K;
constexpr int STAGE_BYTES = WEIGHT_BYTES + INPUT_BYTES;
constexpr int TILE_SLOTS = 4;  // tiles that the producers may be ahead

constexpr int MAX_EXPERTS = BLOCK_THREADS;  // a thread counts one

// One product: COLUMNS (k) of an input, and weights of ALL_ROWS rows. LISTED: an expert's list says which
// pairs it has, a row of the input serves SHARE pairs; else there is one weight, for all rows.
enum Output { SWIGLU_FP8, SHARES_BF16, PLAIN_BF16, PLAIN_F32, ADDED_F32, TURNED_BF16 };
template <int COLUMNS, int ALL_ROWS, int ALL_EXPERTS, int PAIRS_A_ROW, Output OUTPUT> struct Shape {
  static constexpr int K = COLUMNS;
  static constexpr int N = ALL_ROWS;
  static constexpr int EXPERTS = ALL_EXPERTS;
  static constexpr int SHARE = PAIRS_A_ROW;
  static constexpr Output OUT = OUTPUT;
  static constexpr bool IS_UP = OUTPUT == SWIGLU_FP8;
  static constexpr bool LISTED = OUTPUT == SWIGLU_FP8 || OUTPUT == SHARES_BF16;
  static constexpr int TURNS = COLUMNS / TURN_K;
  static constexpr int BLOCKS = ALL_ROWS / ROWS;
  static constexpr int ROW_TILES = ALL_ROWS / TILE_ROWS;
  static constexpr int SLOT_K = widest_slot(COLUMNS);
  static constexpr int SLOTS = COLUMNS / SLOT_K;
  static constexpr int SLOT_TURNS = SLOT_K / TURN_K;
  static constexpr int SCALES_AT = TILE_ROWS * SLOT_K;
  static constexpr int SLOT_BYTES = (SCALES_AT + SLOT_TURNS * 8 + 127) / 128 * 128;
  static_assert(COLUMNS % TURN_K == 0 && ALL_ROWS % ROWS == 0, "tiles are whole");
  static_assert(ALL_EXPERTS <= MAX_EXPERTS, "a thread counts one expert");
};
