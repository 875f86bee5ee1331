// One decode step of MiniMax-M2 in one launch: every multiprocessor runs one block of 12 consumer warps and a producer
// thread from the embedding to the logits. This file is the list of the stages; each has its header.
//
//   producer.cuh   weights and KV, slot by slot, ahead of everything below
//   norm.cuh       residual -> activations, router rows
//   qkv.cuh        -> words of q, k, v              query.cuh      QK-norm, rotary, KV write
//   attention.cuh  splits of paged KV               combine.cuh    splits -> words of the attention's output
//   output.cuh     -> residual                      router.cuh     top-k, list of experts
//   experts.cuh    up and down -> residual          lm_head.cuh    -> logits
//
// Between multiprocessors stand polled words (q, k, v; splits; attention's output; router) and three grid barriers a
// layer, where sums into the residual or the experts' activations have to be complete. From 4 rows on blocks come in
// clusters of two, which share the norms.
// Sizes and their reasons: shapes.cuh. What was measured: docs/LOG.md.
#include "combine.cuh"
#include "experts.cuh"
#include "lm_head.cuh"
#include "norm.cuh"
#include "output.cuh"
#include "producer.cuh"
#include "qkv.cuh"
#include "router.cuh"

// The step's rows: lengths, positions, rotations, and how attention's splits fall. Consumers; ends with their barrier.
DEVICE void start_step(const Params& p, Shared* s) {
  const int thread = threadIdx.x;
  if (thread < MAX_ROWS) {
    const bool given = thread < p.num_rows;
    const int context = given ? p.context_lens[thread] : 0;
    s->context[thread] = context;
    s->position[thread] = given ? p.positions[thread] : -1;
    s->token[thread] = context > 0 ? p.token_ids[thread] : 0;
    s->table[thread] = context > 0 ? p.row_ids[thread] : 0;
  }
  consumers_sync();
  if (thread == 0) {
    u32 rows = 0;
    int units = 0;
    for (int row = 0; row < MAX_ROWS; row++) {
      s->first_unit[row] = units;
      if (s->context[row] <= 0) continue;
      rows |= 1u << row;
      units += (s->context[row] + UNIT_TOKENS - 1) / UNIT_TOKENS;
    }
    s->first_unit[MAX_ROWS] = units;
    s->rows = rows;
  }
  for (int number = thread; number < MAX_ROWS * (ROTARY_DIM / 2); number += NUM_THREADS) {
    const int row = number / (ROTARY_DIM / 2), i = number % (ROTARY_DIM / 2);
    // The angle is the reference's float32 product; turns are counted in double, or they would be lost in it.
    const double turns = (double)((float)max(s->position[row], 0) * p.rotary_frequencies[i]) * 0.15915494309189535;
    float sine, cosine;
    sincospif(2.f * (float)(turns - rint(turns)), &sine, &cosine);
    s->rotary[row][i] = cosine;
    s->rotary[row][ROTARY_DIM / 2 + i] = sine;
  }
  for (int i = thread; i < 2 * UNIT_TOKENS; i += NUM_THREADS) s->new_scales[i] = 0;
  consumers_sync();
  if (thread < MAX_ROWS) {
    // The split that holds unit u is the last one that begins at or before it. A row that pads has none.
    const int units = s->first_unit[MAX_ROWS];
    const bool real = (s->rows >> thread) & 1;
    s->first_split[thread] = real ? (s->first_unit[thread] * SPLITS + SPLITS - 1) / units : 0;
    s->last_split[thread] = real ? ((s->first_unit[thread + 1] - 1) * SPLITS + SPLITS - 1) / units : -1;
  }
  cache_blocks(p, s);
  consumers_sync();
}

DEVICE void run_layer(Consumer& c, int l) {
  const LayerWeights& layer = c.p.layers[l];
  c.epoch++;
  if (c.p.stages & STAGE_ATTENTION) {
    const NormWeights weights = load_norm_weights(c, layer.input_norm);
    grid_wait(c);
    forget(c);
    mark(c, l, 0);
    norm<false, false>(c, weights);
    forget(c);
    mark(c, l, 1);
    qkv_stage(c);
    forget(c);
    mark(c, l, 2);
    attention_stage(c, l);
    forget(c);
    mark(c, l, 5);
    output_stage(c);
    forget(c);
    mark(c, l, 6);
    grid_arrive(c);
  }
  if (c.p.stages & STAGE_EXPERTS) {
    const NormWeights weights = load_norm_weights(c, layer.post_norm);
    grid_wait(c);
    forget(c);
    mark(c, l, 7);
    norm<true, false>(c, weights);
    forget(c);
    mark(c, l, 8);
    router_stage(c, l);
    forget(c);
    mark(c, l, 9);
    up_stage(c);
    forget(c);
    mark(c, l, 10);
    grid_arrive(c);
    grid_wait(c);
    forget(c);
    mark(c, l, 11);
    down_stage(c);
    forget(c);
    mark(c, l, 12);
    grid_arrive(c);
  }
}

// The last multiprocessor to come here sets everything that a launch counts back for the next one.
DEVICE void end_step(Consumer& c) {
  if (NORM_SHARE > 1) cluster_sync();  // the other one may still copy from here
  consumers_sync();
  if (c.thread == 0) c.shared->last_cta = fetch_add_acq_rel(c.p.sync + SYNC_DONE, 1) == NUM_CTAS - 1;
  consumers_sync();
  if (!c.shared->last_cta) return;
  for (int i = c.thread; i < (NUM_LAYERS + 1) * CLAIM_PITCH; i += NUM_THREADS) c.p.claims[i] = 0;
  if (c.thread == 0) {
    c.p.sync[SYNC_BARRIER] = c.p.sync[SYNC_DONE] = c.p.sync[SYNC_BAD_ROWS] = 0;
    c.p.sync[SYNC_EPOCH] = c.epoch;
  }
}

extern "C" __global__ void __cluster_dims__(NORM_SHARE, 1, 1) __launch_bounds__(BLOCK_THREADS, 1)
    persistent_decode(const __grid_constant__ Params p) {
  const u32 ring = shared_address(block_memory), act = ring + RING_SLOTS * RING_SLOT_BYTES;
  Shared* shared = shared_of_block();
  if (threadIdx.x == 0) {
    for (int i = 0; i < RING_SLOTS; i++) {
      mbarrier_init(shared_address(&shared->full[i]), 1);
      mbarrier_init(shared_address(&shared->empty[i]), NUM_THREADS);
    }
    mbarrier_init(shared_address(&shared->routed), 32);
    mbarrier_init(shared_address(&shared->rows_known), NUM_THREADS);
    mbarrier_init(shared_address(&shared->normed), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    shared->started = global_nanoseconds();
    shared->step_limit = p.step_limit;
    shared->error = p.error;
  }
  __syncthreads();
  if (NORM_SHARE > 1) cluster_sync();  // the other one's copies complete a barrier that is set
  if (threadIdx.x >= NUM_THREADS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
    if (threadIdx.x == NUM_THREADS) {
      Producer d{p, shared, ring, evict_first_policy(), evict_last_policy()};
      produce(d);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
    start_step(p, shared);
    mbarrier_arrive(shared_address(&shared->rows_known));
    Consumer c{p, shared, ring, act, act + ACT_BYTES};
    forget(c);
    c.rows = shared->rows;
    c.epoch = load_acquire(p.sync + SYNC_EPOCH);
    start_residual(c);
    grid_arrive(c);
    for (int l = 0; l < p.num_layers; l++) run_layer(c, l);
    forget(c);
    if (p.stages & STAGE_HEAD) {
      const NormWeights weights = load_norm_weights(c, p.final_norm);
      grid_wait(c);
      norm<false, true>(c, weights);
      lm_head_stage(c);
    } else {
      grid_wait(c);
    }
    end_step(c);
  }
}
