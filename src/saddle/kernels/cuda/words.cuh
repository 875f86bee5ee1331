// How multiprocessors hand over: words and the grid barrier.
//
// A word is (value, epoch) in 64 bits, written and read in one access. The reader polls the data itself, so neither a
// fence nor a barrier stands between the two. Epochs grow by one a layer and never repeat, so words need no reset; a
// word is overwritten a layer later, with at least one grid barrier between its last reader and the next writer.
//
// The barrier is one counter that only grows within a launch; the last multiprocessor to finish sets it back.
#pragma once
#include "state.cuh"

DEVICE void put_word(u64* at, u32 value, u32 epoch) { store_relaxed(at, (u64)value | ((u64)epoch << 32)); }
DEVICE void put_word(u64* at, float value, u32 epoch) { put_word(at, __float_as_uint(value), epoch); }
DEVICE bool is_fresh(u64 word, u32 epoch) { return (u32)(word >> 32) == epoch; }
DEVICE u64 no_word(u32 epoch) { return (u64)epoch << 32; }  // zero, and fresh
DEVICE float word_float(u64 word) { return __uint_as_float((u32)word); }

DEVICE void grid_arrive(Consumer& c) {
  consumers_sync();
  if (c.thread == 0) add_release(c.p.sync + SYNC_BARRIER, 1);
  c.barriers++;
}
DEVICE void grid_wait(Consumer& c) {
  if (c.thread == 0) {
    u32 target = c.barriers * NUM_CTAS;
    Patience patience;
    while (load_acquire(c.p.sync + SYNC_BARRIER) < target) patience.lose(FAILED_BARRIER);
  }
  consumers_sync();
}
