// Causal attention of prompts over paged bf16 memory, in the way of FlashAttention 3: one thread loads; two warpgroups
// take 64 lines of a tile each, and while one computes its softmax the other's products run. Within a warpgroup, the
// scores of a turn are multiplied while the weights of the turn before meet their values.
//
//   prefill_work.cuh      which tiles there are
//   prefill_producer.cuh  queries, keys and values into shared memory
//   prefill_fp8.cuh       FP8 memory: queries in two parts, values widened
//   prefill_product.cuh   wgmma
//   prefill_softmax.cuh   scores to weights
//   prefill_output.cuh    results to memory
//
// Sizes: prefill_shapes.cuh. What was measured: docs/LOG.md.
#include "prefill_output.cuh"

struct Consumer {
  int group, warp, lane;  // warpgroup; warp within it
  int turns;              // of the rings, so far
};

DEVICE void release(const u64* barrier, int lane) {
  if (lane == 0) mbarrier_arrive(shared_address(barrier));
}

// One turn behind the first: its scores, and the result of the one before.
template <bool MASKED>
DEVICE void compute_turn(Shared* s, u32 memory, const Consumer& c, u32 queries, int turn, const int (&seen)[2],
                         const float (&factors)[2], u32 (&weights)[KEYS / 4], float (&result)[64], Softmax& now) {
  const int stage = turn % STAGES, before = (turn - 1) % STAGES;
  float scores[KEYS / 2], shrink[2];
  mbarrier_wait(shared_address(&s->key_full[stage]), (turn / STAGES) & 1);
  barrier_sync(TURN_OF + c.group, CONSUMERS);
  wgmma_begin();
  issue_scores(scores, queries, memory + KEYS_AT + stage * LOADED_BYTES);
  mbarrier_wait(shared_address(&s->value_full[before]), ((turn - 1) / STAGES) & 1);
  issue_result(result, weights, memory + VALUES_AT + before * KEY_BYTES);
  barrier_arrive(TURN_OF + (c.group ^ 1), CONSUMERS);
  wgmma_wait<1>();
  pin(scores);
  release(&s->key_empty[stage], c.lane);
  if (MASKED) mask(scores, factors, seen);
  weigh<MASKED>(scores, factors, now, shrink);
  wgmma_wait<0>();
  pin(result);
  pin(weights);
  release(&s->value_empty[before], c.lane);
  round_weights(scores, weights);
#pragma unroll
  for (int i = 0; i < 64; i++) result[i] *= shrink[i / 2 % 2];
}

// Values behind the row's context: another request may have left NaN there, and 0 times that is not 0.
DEVICE void clear_values(u32 values, int known) {
  for (int i = known * 8 + threadIdx.x % CONSUMERS; i < KEYS * 8; i += CONSUMERS)
#pragma unroll
    for (int half = 0; half < 2; half++)
      asm volatile("st.shared.v4.b32 [%0],{%1,%1,%1,%1};" ::"r"(values + half * KEY_HALF + i * 16), "r"(0) : "memory");
  fence_async();
  barrier_sync(ALL_CONSUMERS, CONSUMERS);
}

DEVICE void compute_tile(const Params& p, Shared* s, u32 memory, Consumer& c, const Tile& tile, int slot) {
  const int line = c.group * SLAB + c.warp * 16 + c.lane / 4;
  float result[64] = {};
  Softmax now{{UNSEEN, UNSEEN}, {0.f, 0.f}};
  if (tile.low < tile.high) {
    u32 queries = memory + slot * QUERY_BYTES + c.group * (SLAB * LINE_BYTES);
    float factors[2] = {1.f, 1.f};
    if (FP8) {
      split_queries(queries, memory + PARTS_AT + c.group * (SLAB * LINE_BYTES), c.group, c.warp, c.lane, p.k_scale, factors);
      queries = memory + PARTS_AT + c.group * (SLAB * LINE_BYTES);
      mbarrier_arrive(shared_address(&s->query_empty[slot]));
    }
    int turn = tile.high - 1, seen[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int token = min((line + 8 * r) / GROUP, tile.count - 1);
      if (p.query_factors != nullptr) factors[r] *= p.query_factors[tile.token + token];
      seen[r] = tile.position + token + 1 - c.lane % 4 * 2 - turn * KEYS;
    }
    u32 weights[KEYS / 4];
    {
      const int stage = c.turns % STAGES, parity = (c.turns / STAGES) & 1;
      float scores[KEYS / 2], shrink[2];
      mbarrier_wait(shared_address(&s->key_full[stage]), parity);
      wgmma_begin();
      issue_scores(scores, queries, memory + KEYS_AT + stage * LOADED_BYTES);
      if (!FP8 && tile.high * KEYS > tile.context) {
        mbarrier_wait(shared_address(&s->value_full[stage]), parity);
        clear_values(memory + VALUES_AT + stage * KEY_BYTES, tile.context - turn * KEYS);
      }
      wgmma_wait<0>();
      pin(scores);
      release(&s->key_empty[stage], c.lane);
      mask(scores, factors, seen);
      weigh<true>(scores, factors, now, shrink);
      round_weights(scores, weights);
    }
    const int all_seen = max(tile.low, (tile.position + 1) / KEYS);  // by the first token
    for (turn--, c.turns++; turn >= all_seen; turn--, c.turns++) {
      seen[0] += KEYS, seen[1] += KEYS;
      compute_turn<true>(s, memory, c, queries, c.turns, seen, factors, weights, result, now);
    }
    for (; turn >= tile.low; turn--, c.turns++)
      compute_turn<false>(s, memory, c, queries, c.turns, seen, factors, weights, result, now);
    if (!FP8) mbarrier_arrive(shared_address(&s->query_empty[slot]));
    const int stage = (c.turns - 1) % STAGES;
    mbarrier_wait(shared_address(&s->value_full[stage]), ((c.turns - 1) / STAGES) & 1);
    wgmma_begin();
    issue_result(result, weights, memory + VALUES_AT + stage * KEY_BYTES);
    wgmma_wait<0>();
    pin(result);
    pin(weights);
    release(&s->value_empty[stage], c.lane);
  } else {
    mbarrier_arrive(shared_address(&s->query_empty[slot]));
  }
  store(p, tile, line, c.lane, result, now);
}

DEVICE void consume(const Params& p, Shared* s, u32 memory) {
  Consumer c{(int)threadIdx.x / 128, (int)threadIdx.x / 32 % 4, (int)threadIdx.x % 32, 0};
  if (c.group == 1) barrier_arrive(TURN_OF, CONSUMERS);  // the first one begins
  for (int index = 0;; index++) {
    const int slot = index % QUERY_SLOTS;
    mbarrier_wait(shared_address(&s->query_full[slot]), (index / QUERY_SLOTS) & 1);
    const Tile tile = s->tiles[slot];
    if (tile.count == 0) break;
    compute_tile(p, s, memory, c, tile, slot);
  }
  if (c.group == 0) barrier_sync(TURN_OF, CONSUMERS);
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1) prefill(const __grid_constant__ Params p) {
  extern __shared__ u8 raw[];
  const u32 memory = (shared_address(raw) + 1023) & ~1023u;
  u8* aligned = raw + (memory - shared_address(raw));
  Shared* s = (Shared*)(aligned + SHARED_AT);
  if (threadIdx.x == 0) {
    for (int i = 0; i < QUERY_SLOTS; i++) {
      mbarrier_init(shared_address(&s->query_full[i]), 1);
      mbarrier_init(shared_address(&s->query_empty[i]), CONSUMERS);  // who read `tiles` says so
    }
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(shared_address(&s->key_full[i]), 1);
      mbarrier_init(shared_address(&s->key_empty[i]), CONSUMERS / 32);
      mbarrier_init(shared_address(&s->value_full[i]), FP8 ? WIDENERS / 32 : 1);
      mbarrier_init(shared_address(&s->value_empty[i]), CONSUMERS / 32);
      mbarrier_init(shared_address(&s->narrow_full[i]), 1);
      mbarrier_init(shared_address(&s->narrow_empty[i]), WIDENERS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  // Lines that no token has, behind the last copied one: never written by a copy, but multiplied.
  constexpr int UNUSED = (LINES - TOKENS * GROUP) * LINE_BYTES / 4;
  for (int i = threadIdx.x; i < UNUSED; i += BLOCK_THREADS)
    for (int half = 1; half <= 2 * QUERY_SLOTS; half++) ((u32*)(aligned + half * QUERY_HALF))[i - UNUSED] = 0;
  fence_async();
  if (threadIdx.x / 32 == CONSUMERS / 32) count_tiles(p, s, threadIdx.x % 32);
  __syncthreads();
  if (threadIdx.x >= CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
    if (threadIdx.x == CONSUMERS) produce(p, s, memory);
    if (FP8 && threadIdx.x >= CONSUMERS + 32) widen_values(s, memory, threadIdx.x - CONSUMERS - 32);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
    consume(p, s, memory);
  }
}
