// The model's shape and the sizes that follow from it. All are compile-time: one binary a model shape, number of rows
// and KV format, so that every loop unrolls and every address is a shift or a constant.
//
// Contract: the host defines SADDLE_* (kernels/persistent.py says what each has to divide); nothing else reads them.
#pragma once
#include "common.cuh"

constexpr int MAX_ROWS = SADDLE_MAX_ROWS;  // 1, 2, 4, 8, 12 or 16: columns of one or two mma.m16n8k16
constexpr int HIDDEN = SADDLE_HIDDEN;
constexpr int NUM_HEADS = SADDLE_NUM_HEADS;
constexpr int NUM_KV_HEADS = SADDLE_NUM_KV_HEADS;
constexpr int NUM_EXPERTS = SADDLE_NUM_EXPERTS;
constexpr int TOP_K = SADDLE_TOP_K;
constexpr int INTERMEDIATE = SADDLE_INTERMEDIATE;
constexpr int VOCAB = SADDLE_VOCAB;
constexpr int NUM_LAYERS = SADDLE_NUM_LAYERS;
constexpr int NUM_CTAS = SADDLE_NUM_CTAS;  // one a multiprocessor, all resident at once
constexpr float NORM_EPS = SADDLE_NORM_EPS;

constexpr int HEAD_DIM = 128;
constexpr int ROTARY_DIM = 64;
constexpr int GROUP = NUM_HEADS / NUM_KV_HEADS;  // query heads of a KV head: rows of one mma operand
constexpr int Q_WIDTH = NUM_HEADS * HEAD_DIM;
constexpr int KV_WIDTH = NUM_KV_HEADS * HEAD_DIM;
constexpr int QKV_WIDTH = Q_WIDTH + 2 * KV_WIDTH;
constexpr int MAX_PAIRS = MAX_ROWS * TOP_K;  // (row, expert)

// ---- threads
constexpr int NUM_WARPS = 12;  // consumers: a slot of 1,536 columns is 12 blocks of 128, one scale each, one a warp
constexpr int NUM_THREADS = NUM_WARPS * 32;
constexpr int BLOCK_THREADS = NUM_THREADS + 128;  // and one warpgroup whose first thread is the producer
// 12 x 32 x 152 + 4 x 32 x 56 = 65,536 registers. Consumers spill below 152, and with all of shared memory in use a
// spilled register is a trip to L2.
#define CONSUMER_REGISTERS 152
#define PRODUCER_REGISTERS 56

// ---- packed weights (kernels/tiles.py)
constexpr int TILE_ROWS = 16;
constexpr int TILE_BYTES = 1024;
constexpr int SCALE_K = 128;
constexpr int widest_slot(int columns, int limit, int unit) {
  int slot = limit;
  while (columns % slot) slot -= unit;
  return slot;
}
constexpr int round_up(int value, int to) { return (value + to - 1) / to * to; }

template <int COLUMNS> struct Fp8Shape {
  static constexpr int SLOT_K = widest_slot(COLUMNS, 1536, SCALE_K);
  static constexpr int SLOTS = COLUMNS / SLOT_K;
  static constexpr int BLOCKS = SLOT_K / SCALE_K;
  static constexpr int SCALES_AT = TILE_ROWS * SLOT_K;
  static constexpr int SLOT_BYTES = round_up(SCALES_AT + BLOCKS * 8, 128);
};
template <int COLUMNS> struct Bf16Shape {
  static constexpr int SLOT_K = widest_slot(COLUMNS, 768, 64);
  static constexpr int SLOTS = COLUMNS / SLOT_K;
  static constexpr int TILES = SLOT_K / 32;
  static constexpr int SLOT_BYTES = TILE_ROWS * SLOT_K * 2;
};
typedef Fp8Shape<HIDDEN> QkvShape;
typedef Fp8Shape<HIDDEN> UpShape;  // w1 and w3, interleaved 8 rows by 8
typedef Fp8Shape<INTERMEDIATE> DownShape;
typedef Fp8Shape<Q_WIDTH> OutputShape;
typedef Bf16Shape<HIDDEN> HeadShape;
// The attention output of 8 rows does not fit beside the ring: O is computed in parts of at most 3,072 columns.
constexpr int O_PARTS = (Q_WIDTH + 3071) / 3072;
constexpr int O_WIDTH = Q_WIDTH / O_PARTS;
constexpr int O_SLOTS = OutputShape::SLOTS / O_PARTS;
constexpr int GATE_ROWS = 2;  // rows of the router a multiprocessor: 128 of them cover 256 experts in one slot each
constexpr int GATE_CTAS = NUM_EXPERTS / GATE_ROWS;

// ---- the ring
constexpr int RING_SLOT_BYTES = 24704;  // the largest slot: 16 x 1,536 FP8 and 24 scales
// As many slots as fit beside the activations: they fill while the consumers wait at a barrier.
constexpr int RING_SLOTS = MAX_ROWS <= 2 ? 8 : MAX_ROWS <= 4 ? 7 : MAX_ROWS <= 8 ? 6 : MAX_ROWS <= 12 ? 5 : 4;
// Slots issued but not landed. Two (49 KB a multiprocessor) saturate the memory; more only queue in front of every
// barrier, poll and small load. Never more than the ring has: a wait on a wrapped parity would not end.
constexpr int WINDOW_EXPERTS = 2;
constexpr int WINDOW_QKV = MAX_ROWS <= 12 ? 1 : 2;  // streams while the norm waits at its barrier
constexpr int WINDOW_OTHER = 1;  // KV, O and router: words are polled meanwhile
// A long context is a stream like the experts.
constexpr int WINDOW_LONG_KV = WINDOW_EXPERTS, LONG_KV_SLOTS = 8;
constexpr int WINDOW_HEAD = 3;  // nobody else wants the memory
// Share of the tiles that multiprocessors claim at run time: they are served up to 19 % unequally. With more than 8 rows it
// takes longer to come to another expert, and claimed tiles are those of another expert most often.
constexpr int CLAIMED_EXPERTS = MAX_ROWS <= 8 ? 60 : 50;
constexpr int CLAIMED_HEAD = 20;
// Slots of the next layer's q, k and v that are brought to L2 while the experts are not known and the memory idles; they
// are read in 2/3 of the time then. More cost more than they gain: what is on the way delays the routing and the experts'
// first slots. With more than 8 rows none gained anything.
constexpr int SLOTS_AHEAD = MAX_ROWS == 1 ? 4 : MAX_ROWS <= 8 ? 3 : 0;
constexpr int AHEAD_BYTES_A_CYCLE = 9;  // two thirds of a multiprocessor's share of the memory's rate

// ---- KV memory (kernels/paged_kv.py): [block][k|v][kv head][64 tokens][128]
#define KV_BF16 0
#define KV_FP8_STATIC 1
#define KV_FP8_DYNAMIC 2
constexpr int KV_FORMAT = SADDLE_KV_FORMAT;
constexpr int KV_ITEM_BYTES = KV_FORMAT == KV_BF16 ? 2 : 1;
constexpr int BLOCK_TOKENS = 64;
constexpr int UNIT_TOKENS = 16;  // what one warp reads at once: k of one mma over values
constexpr int UNITS_PER_BLOCK = BLOCK_TOKENS / UNIT_TOKENS;
constexpr int TOKEN_BYTES = HEAD_DIM * KV_ITEM_BYTES;
constexpr int UNIT_BYTES = UNIT_TOKENS * TOKEN_BYTES;  // keys or values of one unit and head
constexpr int HEAD_BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES;
constexpr int KV_BLOCK_BYTES = 2 * NUM_KV_HEADS * HEAD_BLOCK_BYTES;
constexpr int UNIT_SCALE_BYTES = KV_FORMAT == KV_FP8_DYNAMIC ? UNIT_TOKENS * 4 : 0;
constexpr int KV_BLOCK_SCALES = 2 * NUM_KV_HEADS * BLOCK_TOKENS;
constexpr int SLOT_UNITS = 24576 / (2 * (UNIT_BYTES + UNIT_SCALE_BYTES));  // 3, 6 or 5 units a slot
constexpr int SLOT_VALUES_AT = SLOT_UNITS * UNIT_BYTES;
constexpr int SLOT_SCALES_AT = 2 * SLOT_VALUES_AT;
// Splits of a KV head's tokens: 16 x 8 heads fill 128 multiprocessors. With fewer heads some stay idle here.
constexpr int SPLITS = 16;
constexpr int ATTENTION_CTAS = NUM_KV_HEADS * SPLITS;
constexpr int ATTENTION_WARPS = 8;  // their partial outputs, 8 x 6 x 128 floats, fill the activation buffer
constexpr int MERGE_PITCH = HEAD_DIM + 8;  // floats of a partial output: four heads' 8 floats fall into all banks
constexpr int QUERY_PITCH = HEAD_DIM + 8;  // bf16 or f16 of a query head: spreads heads over banks
// Attention's part of the activation buffer: partial outputs (before them, the new unit and raw q and k), the group's
// query heads as 8 rows, the warps' maxima and totals. The end may lie in the buffer of the sums.
constexpr int QUERY_AT = ATTENTION_WARPS * GROUP * MERGE_PITCH * 4;
constexpr int WARP_MAX_AT = QUERY_AT + 8 * QUERY_PITCH * 2;
constexpr int WARP_TOTAL_AT = WARP_MAX_AT + ATTENTION_WARPS * GROUP * 4;
constexpr int ATTENTION_BYTES = WARP_TOTAL_AT + ATTENTION_WARPS * GROUP * 4;
constexpr int PARTIAL_PITCH = HEAD_DIM + 2;  // words a query head: values, log-sum-exp, padding to 16 bytes
constexpr int COMBINE_OUTPUTS = GROUP * HEAD_DIM / SPLITS;  // outputs of a row and KV head that one split finishes
constexpr int COMBINE_ROWS = MAX_ROWS < 8 ? MAX_ROWS : 8;  // finished at a time
constexpr int COMBINE_GROUPS = 8 / COMBINE_ROWS;  // threads that share an output's splits
// Block ids of a multiprocessor's first units, kept for all layers: 262,144 or 196,608 tokens over all rows and splits.
// Longer contexts read the rest from the table, one block ahead.
constexpr int CACHED_BLOCKS = MAX_ROWS <= 12 ? 256 : 192;

// ---- activations in shared memory, as the mma's second operand (tile.cuh)
constexpr int max_of(int a, int b) { return a > b ? a : b; }
constexpr int UP_BYTES = 2 * MAX_ROWS * INTERMEDIATE;  // an expert's activations; two experts' lie there
// At least 25 KB: attention needs them, and the activations of all experts of a single row.
constexpr int ACT_BYTES = max_of(max_of(2 * MAX_ROWS * max_of(HIDDEN, O_WIDTH), 2 * UP_BYTES), 25600);
constexpr int COLUMN_GROUPS = (MAX_ROWS + 7) / 8;  // of 8 columns, an mma each
// Lanes of a quad that hold columns of real rows, in a group of columns.
constexpr int column_pairs(int group) { return MAX_ROWS - 8 * group >= 8 ? 4 : (MAX_ROWS - 8 * group + 1) / 2; }
// Tiles of the down projection that are summed at once: they are one slot each, and a sum costs as much as a slot.
constexpr int DOWN_TILES_AT_ONCE = 2;
constexpr int SUM_PAIRS = max_of((MAX_ROWS + 1) / 2, DOWN_TILES_AT_ONCE * column_pairs(0));
constexpr int SUMS_BYTES = 2 * NUM_WARPS * 8 * SUM_PAIRS * 16;  // two buffers of the warps' partial sums
constexpr int SQUARE_PITCH = 8 * COLUMN_GROUPS;  // words of a tile's sums of squares
constexpr int NORM_SHARE = MAX_ROWS >= 4 ? 2 : 1;  // multiprocessors that share a norm's rows: blocks of a cluster
constexpr int NORM_ROWS = MAX_ROWS / NORM_SHARE;  // a thread holds as many rows at once

static_assert(MAX_ROWS <= 8 ? 8 % MAX_ROWS == 0 : MAX_ROWS == 12 || MAX_ROWS == 16, "rows are columns of two mma");
static_assert(HIDDEN % 128 == 0 && HIDDEN <= 3072, "a thread holds at most 8 columns of a row");
static_assert(INTERMEDIATE % 128 == 0 && INTERMEDIATE <= 1536, "an expert's activation is one slot wide");
static_assert(Q_WIDTH % O_PARTS == 0 && OutputShape::SLOTS % O_PARTS == 0, "parts of O are whole slots");
static_assert(GROUP * NUM_KV_HEADS == NUM_HEADS && GROUP <= 8, "query heads of a KV head are rows of an operand");
static_assert(COMBINE_OUTPUTS * 8 == NUM_THREADS, "eight splits' worth of outputs fill the threads");
static_assert(NUM_EXPERTS <= 256 && NUM_EXPERTS % 8 == 0 && TOP_K <= 8, "a warp's lanes hold 8 experts each");
static_assert(GATE_CTAS <= NUM_CTAS && ATTENTION_CTAS <= NUM_CTAS, "too few multiprocessors");
static_assert(ATTENTION_BYTES <= ACT_BYTES + SUMS_BYTES, "attention does not fit");
static_assert(MAX_ROWS > 1 || TOP_K * UP_BYTES <= ACT_BYTES, "activations of a row's experts do not fit");
static_assert(HIDDEN * 4 * GATE_ROWS <= RING_SLOT_BYTES, "rows of the router are one slot");
