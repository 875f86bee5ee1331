// What the kernel is given (`Params`), what a multiprocessor keeps in shared memory (`Shared`) and what a consumer
// thread carries from stage to stage (`Consumer`). Contract: `Params` is mirrored field by field by
// kernels/persistent.py; a test compares the two.
#pragma once
#include "ptx.cuh"

struct LayerWeights {
  const u8* qkv;  // packed FP8 [QKV_WIDTH, HIDDEN]
  const u8* o;  // packed FP8 [HIDDEN, Q_WIDTH]
  const u8* w13;  // packed FP8 [NUM_EXPERTS][2 INTERMEDIATE, HIDDEN], interleaved
  const u8* w2;  // packed FP8 [NUM_EXPERTS][HIDDEN, INTERMEDIATE]
  const float* gate;  // [NUM_EXPERTS][HIDDEN]
  const float* gate_bias;  // [NUM_EXPERTS]
  const float* input_norm;  // [HIDDEN]
  const float* post_norm;  // [HIDDEN]
  const float* q_norm;  // [Q_WIDTH]
  const float* k_norm;  // [KV_WIDTH]
  float k_scale;  // of static FP8 KV
  float v_scale;
};

struct Params {
  // the step
  const int* token_ids;  // [num_rows]
  const int* positions;  // [num_rows], -1: the row only pads
  const int* context_lens;  // [num_rows], this step's token included; 0: the row only pads
  const int* row_ids;  // [num_rows], rows of block_tables
  const int* block_tables;  // [.., max_blocks]
  float* logits;  // [num_rows][VOCAB]
  // memory
  u8* kv;  // [layer][block], see shapes.cuh
  float* kv_scales;  // [layer][block][k|v][kv head][64], dynamic FP8 only
  const u16* embed;  // bf16 [VOCAB][HIDDEN]
  const float* final_norm;  // [HIDDEN]
  const u8* lm_head;  // packed bf16 [VOCAB, HIDDEN]
  // workspace
  i64* residual;  // [MAX_ROWS][HIDDEN], residual.cuh
  u64* qkv_words;  // [MAX_ROWS][QKV_WIDTH]
  u64* square_words;  // [QKV_WIDTH / 16][SQUARE_PITCH]: sum of squares of a tile's rows, a column each
  u64* partial_words;  // [ATTENTION_CTAS][MAX_ROWS][GROUP][PARTIAL_PITCH]
  u64* attention_words;  // [MAX_ROWS][Q_WIDTH / 2]: pairs of f16
  u64* router_words;  // [MAX_ROWS][NUM_EXPERTS]
  u16* activations;  // f16 [MAX_PAIRS][MAX_ROWS][INTERMEDIATE]
  u32* claims;  // [NUM_LAYERS + 1][CLAIM_PITCH]
  u32* sync;  // SYNC_*
  u32* error;  // in memory of the host: 0, or why the kernel gave up
  u64* profile;  // [NUM_LAYERS + 1][16][NUM_CTAS] of builds with SADDLE_PROFILE
  i64 step_limit;  // nanoseconds after which a step that still waits has failed
  int num_rows;
  int max_blocks;
  int num_blocks;
  int num_layers;  // at most NUM_LAYERS
  int stages;  // STAGE_*: all of them but in tests
  int uniform_routing;  // experts by hash instead of the router's choice
  float rotary_frequencies[ROTARY_DIM / 2];
  LayerWeights layers[NUM_LAYERS];
};

#define STAGE_ATTENTION 1
#define STAGE_EXPERTS 2
#define STAGE_HEAD 4

// Words of Params::sync, a cache line apart.
#define SYNC_BARRIER 0
#define SYNC_DONE 32
#define SYNC_EPOCH 64
#define SYNC_BAD_ROWS 96
#define SYNC_WORDS 128
#define CLAIM_PITCH 32
#define CLAIM_UP 0
#define CLAIM_DOWN 16

struct Shared {
  u64 full[RING_SLOTS];
  u64 empty[RING_SLOTS];
  u64 routed;  // the layer's experts are listed: an arrival of each lane of the warp that lists them
  u64 rows_known;  // the step's rows are set, once a launch: an arrival of each consumer
  u64 normed;  // the other multiprocessor's rows of a norm have come: their bytes, and an arrival of this one's first thread
  int code[RING_SLOTS];  // tile in the slot, LAST_TILE, or NO_TILE
  int blocks[CACHED_BLOCKS];
  float warp_sums[NUM_WARPS][max_of((1 + GATE_ROWS * NORM_SHARE) * NORM_ROWS, 4)];
  float rotary[MAX_ROWS][ROTARY_DIM];  // cosines, sines
  float new_scales[2 * UNIT_TOKENS];  // of the new unit's keys and values, dynamic FP8; only its first token has one
  u32 expert_list[MAX_PAIRS];  // expert | rows that chose it << 16, ascending
  u32 expert_columns[MAX_PAIRS];  // 4 bits a column of the product: its row, where 8 columns hold the expert's rows
  int num_experts;
  int last_cta;
  u8 chosen[MAX_PAIRS];  // experts of a row, by rank
  float chosen_weight[MAX_PAIRS];
  // The step's rows, the same in all layers.
  u64 started;  // nanoseconds
  i64 step_limit;
  u32* error;
  u32 rows;  // bit r: row r holds a token
  u32 bad_rows;  // bit r: the residual of row r left its range
  int context[MAX_ROWS];
  int position[MAX_ROWS];
  int token[MAX_ROWS];
  int table[MAX_ROWS];  // row of block_tables
  int first_unit[MAX_ROWS + 1];  // units of 16 tokens of all rows, one after the other
  int first_split[MAX_ROWS];
  int last_split[MAX_ROWS];
};
constexpr int SHARED_BYTES = RING_SLOTS * RING_SLOT_BYTES + ACT_BYTES + SUMS_BYTES + (int)sizeof(Shared);
static_assert(SHARED_BYTES <= 232448, "more shared memory than a block may use");

// Why the kernel gave up: Params::error = code | multiprocessor << 8.
#define FAILED_RING 1
#define FAILED_WINDOW 2
#define FAILED_BARRIER 3
#define FAILED_WORDS 4
#define FAILED_ROUTING 5

extern __shared__ __align__(1024) u8 block_memory[];  // ring, activations, sums, Shared
DEVICE Shared* shared_of_block() { return (Shared*)(block_memory + RING_SLOTS * RING_SLOT_BYTES + ACT_BYTES + SUMS_BYTES); }

// Ends the kernel if the step has taken too long: a wait would not end, so neither would the step. The host reads why
// from its own memory. It is a store to address 0 and no `trap`, because with a trap in it the compiler does not give the
// consumers the registers that setmaxnreg has moved to them; and a call, because every wait has one.
__device__ __noinline__ void check_time(u32 code) {
  const Shared* shared = shared_of_block();
  if ((i64)(global_nanoseconds() - shared->started) <= shared->step_limit) return;
  *(volatile u32*)shared->error = code | blockIdx.x << 8;
  __threadfence_system();
  asm volatile("st.global.u32 [%0],%1;" ::"l"(0ull), "r"(code) : "memory");
}

// Counts the tries of a wait and at every 4,096th looks at how long the step has taken in all: milliseconds, if well.
struct Patience {
  u32 tries = 0;
  DEVICE void lose(u32 code) {
    if ((++tries & 4095) == 0) check_time(code);
  }
};
DEVICE void mbarrier_wait(const u64* barrier, u32 parity, u32 code) {
  const u32 at = shared_address(barrier);
  Patience patience;
  while (!mbarrier_try(at, parity)) patience.lose(code);
}

struct Consumer {
  const Params& p;
  Shared* shared;
  u32 ring, act, sums;  // addresses in shared memory
  int cta, thread, warp, lane;  // from `forget`
  int slot = 0;  // of the ring, next to be read
  u32 parity = 0;
  u32 barriers = 0;  // grid barriers of this launch
  u32 epoch = 0;  // of this layer's words
  u32 tiles = 0;
  u32 norms = 0;  // whose rows have come
  u32 rows = 0;  // Shared::rows
};

// The multiprocessor's share of tiles [0, tiles): contiguous, rotated from stage to stage so that the same ones do not
// always get the larger share.
DEVICE void share_of(int tiles, int rotation, int& begin, int& end) {
  int cta = ((int)blockIdx.x + rotation) % NUM_CTAS;
  begin = (int)((i64)tiles * cta / NUM_CTAS);
  end = (int)((i64)tiles * (cta + 1) / NUM_CTAS);
}
// Units [begin, end) of the concatenation of all rows' units that attention split `split` reads.
DEVICE int split_begin(int units, int split) { return (int)((i64)units * split / SPLITS); }

// Called between stages: reads who this thread is anew, so that nothing that the compiler works out from it in one stage
// is kept, that is spilled, for the next stage or the next layer.
DEVICE void forget(Consumer& c) {
  asm volatile("mov.u32 %0,%%tid.x;" : "=r"(c.thread));
  asm volatile("mov.u32 %0,%%ctaid.x;" : "=r"(c.cta));
  c.warp = c.thread >> 5;
  c.lane = c.thread & 31;
}

DEVICE void mark(const Consumer& c, int layer, int stage) {
#ifdef SADDLE_PROFILE
  if (c.thread == 0) c.p.profile[(layer * 16 + stage) * NUM_CTAS + blockIdx.x] = global_nanoseconds();
#endif
}
