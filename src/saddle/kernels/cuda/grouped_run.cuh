// A block's life: barriers, the numbers of its tiles, and its three warpgroups.
#pragma once
#include "grouped_epilogue.cuh"

template <class S, int HALVES>
DEVICE void compute_tile(const Params& p, Consumer& c, Shared* s, u32 ring, const Tile& tile) {
  const int slab = HALVES == 2 ? c.group * SLAB : 0, half = HALVES == 2 ? 0 : c.group;
  int pairs[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = slab + c.warp * 16 + c.lane / 4 + 8 * r;
    pairs[r] = row < tile.count ? pair_of<S>(p, tile, row) : -1;
  }
  float sum[HALVES][64];
  multiply<S, HALVES>(p, c, s, ring, tile, slab, half, sum);
  if constexpr (S::OUT == SWIGLU_FP8) store_active<S, HALVES>(p, c, s, tile, half, pairs, sum);
  else if constexpr (S::OUT == PLAIN_F32 || S::OUT == ADDED_F32) store_f32<S, HALVES>(p, c, tile, half, pairs, sum);
  else if constexpr (S::OUT == TURNED_BF16) store_turned<S, HALVES>(p, c, tile, half, pairs, sum);
  else store_bf16<S, HALVES>(p, c, tile, half, pairs, sum);
}

template <class S> DEVICE void run(const Params& p) {
  extern __shared__ u8 memory[];
  const u32 ring = (shared_address(memory) + 1023) & ~1023u;
  Shared* s = (Shared*)(memory + (ring - shared_address(memory)) + STAGES * STAGE_BYTES);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(shared_address(&s->full[i]), PRODUCERS + 1);
      mbarrier_init(shared_address(&s->empty[i]), CONSUMERS);  // as ring.cuh, every thread for itself
    }
    for (int i = 0; i < TILE_SLOTS; i++) {
      mbarrier_init(shared_address(&s->told[i]), 1);
      mbarrier_init(shared_address(&s->read[i]), BLOCK_THREADS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  count_stretches<S>(p, s);
  if (threadIdx.x >= CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
    produce<S>(p, s, ring);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
    Consumer c{(int)threadIdx.x / 128, (int)threadIdx.x / 32 % 4, (int)threadIdx.x % 32, 0, 0};
    for (int index = 0;; index++) {
      const Tile tile = next_tile(s, index);
      if (tile.count == 0) break;
      if (tile.count > SLAB) compute_tile<S, 2>(p, c, s, ring, tile);
      else compute_tile<S, 1>(p, c, s, ring, tile);
    }
  }
}

#define KERNEL(NAME, PRODUCT)                                                                                             \
  extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1) NAME(const __grid_constant__ Params p) { run<PRODUCT>(p); }
