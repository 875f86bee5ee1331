// Sizes of the experts' products over many tokens. Compile-time: one binary a model shape.
//
// Contract: the host defines SADDLE_* (kernels/grouped.py says what each has to divide); nothing else reads them.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

constexpr int HIDDEN = SADDLE_HIDDEN;
constexpr int INTERMEDIATE = SADDLE_INTERMEDIATE;
constexpr int NUM_EXPERTS = SADDLE_NUM_EXPERTS;
constexpr int TOP_K = SADDLE_TOP_K;

// ---- the tile of a block: 128 pairs x 256 rows of a weight, 128 columns a turn
// What a multiprocessor reads a multiplication is 1 / 128 + 1 / 256: at 128 x 128 the second-level cache would not keep
// up with FP8. More does not fit the registers: two warpgroups hold 128 sums a thread, and 64 of the turn at work.
constexpr int PAIRS = 128;
constexpr int ROWS = 256;
constexpr int TURN_K = 128;  // one scale a turn: a token's for 128 columns, a weight's for 128 x 128
constexpr int SLAB = 64;     // pairs of one wgmma; a tile of at most 64 pairs is one slab
constexpr int HALF = 128;    // rows of one wgmma

// ---- threads: two warpgroups multiply, one loads
constexpr int CONSUMERS = 256;
constexpr int PRODUCERS = 128;
constexpr int BLOCK_THREADS = CONSUMERS + PRODUCERS;
// 256 x 232 + 128 x 40 = 64,512 of 65,536 registers.
#define CONSUMER_REGISTERS 232
#define PRODUCER_REGISTERS 40

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

// One product: COLUMNS (k) of an input, and a weight of ALL_ROWS rows.
template <int COLUMNS, int ALL_ROWS> struct Shape {
  static constexpr int K = COLUMNS;
  static constexpr int N = ALL_ROWS;
  static constexpr int TURNS = COLUMNS / TURN_K;
  static constexpr int BLOCKS = ALL_ROWS / ROWS;
  static constexpr int ROW_TILES = ALL_ROWS / TILE_ROWS;
  static constexpr int SLOT_K = widest_slot(COLUMNS);
  static constexpr int SLOTS = COLUMNS / SLOT_K;
  static constexpr int SLOT_TURNS = SLOT_K / TURN_K;
  static constexpr int SCALES_AT = TILE_ROWS * SLOT_K;
  static constexpr int SLOT_BYTES = (SCALES_AT + SLOT_TURNS * 8 + 127) / 128 * 128;
  static_assert(COLUMNS % TURN_K == 0 && ALL_ROWS % ROWS == 0, "tiles are whole");
  static_assert(TURNS <= 32, "a lane holds the scales of one turn");
};
struct Up : Shape<HIDDEN, 2 * INTERMEDIATE> {
  static constexpr bool IS_UP = true;
};
struct Down : Shape<INTERMEDIATE, HIDDEN> {
  static constexpr bool IS_UP = false;
};

static_assert(NUM_EXPERTS <= BLOCK_THREADS, "a thread counts one expert");
