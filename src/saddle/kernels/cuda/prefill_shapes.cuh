// Sizes of attention over prompts. Compile-time: one binary for a number of heads.
//
// Contract: the host defines SADDLE_* (kernels/prompt_attention.py checks them); nothing else reads them.
#pragma once
#include "hopper.cuh"

constexpr int KV_HEADS = SADDLE_KV_HEADS;
constexpr int GROUP = SADDLE_GROUP;  // query heads of a KV head
constexpr int HEADS = KV_HEADS * GROUP;
constexpr int HEAD_DIM = 128;

// ---- paged memory (kernels/paged_kv.py): [block][k, v][kv head][64 tokens][128] bf16, or E4M3 with a scale a layer
constexpr bool FP8 = SADDLE_FP8;
constexpr int BLOCK = 64;
constexpr int HALF = 64;         // numbers in the 128 bytes that a swizzle spans
constexpr int LINE_BYTES = 128;

// ---- a tile: tokens x query heads of a KV head, line = token * GROUP + head; and the keys of a turn
constexpr int LINES = 128;
constexpr int SLAB = 64;  // lines of a warpgroup
constexpr int TOKENS = LINES / GROUP;
constexpr int KEYS = SADDLE_KEYS;
constexpr int BLOCKS = KEYS / BLOCK;
constexpr int MAX_ROWS = SADDLE_MAX_ROWS;
static_assert(KEYS == 128, "products of so many keys are written out");
static_assert(GROUP <= LINES, "a token's heads fit a tile");

// ---- threads: two warpgroups compute, one thread loads; of FP8 memory, three warps beside it widen values
constexpr int CONSUMERS = 256;
constexpr int BLOCK_THREADS = CONSUMERS + 128;
// 256 x 232 + 128 x 40 = 64,512 of 65,536 registers.
#define CONSUMER_REGISTERS 232
#define PRODUCER_REGISTERS 40
// Named barriers; 0 is __syncthreads. TURN_OF + g: warpgroup g may issue its products.
constexpr int TURN_OF = 1;
constexpr int ALL_CONSUMERS = 3;
constexpr int GROUP_OF = 4;  // + g: the threads of warpgroup g

// ---- shared memory: queries, rings of keys and of values, each [half][line][128 bytes]; FP8 has lines of 128 bytes
constexpr int STAGES = SADDLE_STAGES;
constexpr int QUERY_SLOTS = SADDLE_QUERY_SLOTS;
constexpr int QUERY_HALF = LINES * LINE_BYTES;
constexpr int QUERY_BYTES = 2 * QUERY_HALF;
constexpr int QUERY_COPIED = 2 * TOKENS * GROUP * LINE_BYTES;
constexpr int KEY_HALF = KEYS * LINE_BYTES;
constexpr int KEY_BYTES = 2 * KEY_HALF;
constexpr int KEYS_AT = QUERY_SLOTS * QUERY_BYTES;
constexpr int LOADED_BYTES = FP8 ? KEYS * LINE_BYTES : KEY_BYTES;  // keys or values of a turn, as they lie in memory
constexpr int VALUES_AT = KEYS_AT + STAGES * LOADED_BYTES;
// FP8 alone: both parts of the queries (prefill_fp8.cuh), and values before they are widened.
constexpr int PARTS_AT = VALUES_AT + STAGES * KEY_BYTES;
constexpr int PART_BYTES = LINES * LINE_BYTES;
constexpr int NARROW_AT = PARTS_AT + (FP8 ? 2 * PART_BYTES : 0);
constexpr int SHARED_AT = NARROW_AT + (FP8 ? STAGES * LOADED_BYTES : 0);
constexpr int WIDENERS = 96;

constexpr float UNSEEN = -1e30f;  // finite: a difference of two is 0, not NaN
