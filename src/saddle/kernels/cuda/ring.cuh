// The ring of slots between the producer thread and the consumer warps: `full` is completed by the bulk copy, `empty`
// by one arrival of each consumer thread. Slots are used strictly in the order in which the producer fills them.
//
// An arrival of lane 0 behind a __syncwarp would release the whole warp's reads as well (PTX's releases are cumulative)
// and is no faster, but compute-sanitizer's racecheck counts an arrival for the arriving thread's own accesses alone: it
// called every slot a race (tests/gpu/test_racecheck.py).
//
// Contract: every consumer thread takes every slot with `next_slot` and gives it back with `release`, used or not.
#pragma once
#include "state.cuh"

#define LAST_TILE (1 << 30)  // in Shared::code: the stage has no further tile for this multiprocessor
#define NO_TILE (-1)  // in Shared::code: the stage has no tile at all for it

struct Slot {
  int index;
  u32 at;  // address of its bytes
};

DEVICE Slot next_slot(Consumer& c) {
  Slot slot{c.slot, c.ring + c.slot * RING_SLOT_BYTES};
  mbarrier_wait(&c.shared->full[c.slot], c.parity, FAILED_RING);
  if (++c.slot == RING_SLOTS) {
    c.slot = 0;
    c.parity ^= 1;
  }
  return slot;
}
DEVICE void release(const Consumer& c, Slot slot) {
  mbarrier_arrive(shared_address(&c.shared->empty[slot.index]));
}

// Runs `body(tile, first slot)` for the tiles of a stage that the producer sends here. The body releases that slot and
// takes and releases the tile's further ones.
template <class Body> DEVICE void for_tiles(Consumer& c, Body body) {
  for (bool last = false; !last;) {
    Slot slot = next_slot(c);
    int code = c.shared->code[slot.index];
    if (code < 0) {
      release(c, slot);
      break;
    }
    last = code & LAST_TILE;
    body(code & ~LAST_TILE, slot);
  }
}
// The same for stages whose tiles come in runs of `each` tiles with the same second operand: body(state, run, tile of the
// run, first slot), with what enter(run) returned when the run's first tile came. A stage without tiles enters nothing.
template <class Enter, class Body> DEVICE void for_runs(Consumer& c, int each, Enter enter, Body body) {
  Slot slot = next_slot(c);
  int code = c.shared->code[slot.index];
  if (code < 0) {
    release(c, slot);
    return;
  }
  for (;;) {
    const int run = (code & ~LAST_TILE) / each;
    auto state = enter(run);
    do {
      body(state, run, (code & ~LAST_TILE) - run * each, slot);
      if (code & LAST_TILE) return;
      slot = next_slot(c);
      code = c.shared->code[slot.index];
    } while ((code & ~LAST_TILE) / each == run);
  }
}
