// The loading thread: claims tiles, fetches their queries, and fills the rings of keys and values, all by the copy
// engine. Keys are taken from the last on, so that those which only some tokens see come first.
//
// FP8 values go through a ring of their own, from which other warps widen them (prefill_fp8.cuh).
//
// Memory holds a token's 16-byte chunk c at c ^ token % 8: copied as it is, in halves of 128 bytes (FP8: whole), a block has
// the swizzle that wgmma reads. Entries of a table behind a row's blocks point nowhere; the last block stands for them.
#pragma once
#include "prefill_work.cuh"

DEVICE void copy_block(u32 to, const TensorMap* map, int line, u32 mbarrier) {
#pragma unroll
  for (int half = 0; half < (FP8 ? 1 : 2); half++)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1,{%2,%3}],[%4];" ::"r"(
            to + half * KEY_HALF),
        "l"(map), "r"(half * HALF), "r"(line), "r"(mbarrier)
        : "memory");
}
DEVICE void copy_queries(u32 to, const TensorMap* map, int head, int token, u32 mbarrier) {
#pragma unroll
  for (int half = 0; half < 2; half++)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1,{%2,%3,%4}],[%5];" ::"r"(
            to + half * QUERY_HALF),
        "l"(map), "r"(half * HALF), "r"(head), "r"(token), "r"(mbarrier)
        : "memory");
}

struct Blocks {
  int ids[BLOCKS];
};
DEVICE Blocks blocks_of(const int* table, int turn, int last) {
  Blocks found;
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) found.ids[i] = table[min(max(turn, 0) * BLOCKS + i, last)];
  return found;
}

// Keys (plane 0) or values (1) of one turn, the `turns`-th of this block.
DEVICE void load_turn(const Params& p, u32 ring, const u64* full, const u64* empty, int turns, const Blocks& blocks,
                      int plane, int head) {
  const int stage = turns % STAGES;
  if (turns >= STAGES) mbarrier_wait(shared_address(&empty[stage]), (turns / STAGES - 1) & 1);
  const u32 barrier = shared_address(&full[stage]);
  mbarrier_expect(barrier, LOADED_BYTES);
#pragma unroll
  for (int i = 0; i < BLOCKS; i++)
    copy_block(ring + stage * LOADED_BYTES + i * (BLOCK * LINE_BYTES), &p.memory,
               ((blocks.ids[i] * 2 + plane) * KV_HEADS + head) * BLOCK, barrier);
}

DEVICE void load_keys(const Params& p, Shared* s, u32 memory, int turns, const Blocks& blocks, int head) {
  load_turn(p, memory + KEYS_AT, s->key_full, s->key_empty, turns, blocks, 0, head);
}
// `known`: keys of this turn within the row's context.
DEVICE void load_values(const Params& p, Shared* s, u32 memory, int turns, const Blocks& blocks, int head, int known) {
  if (!FP8) return load_turn(p, memory + VALUES_AT, s->value_full, s->value_empty, turns, blocks, 1, head);
  const int stage = turns % STAGES;
  if (turns >= STAGES) mbarrier_wait(shared_address(&s->narrow_empty[stage]), (turns / STAGES - 1) & 1);
  s->known[stage] = known;
  if (known < 0) mbarrier_arrive(shared_address(&s->narrow_full[stage]));
  else load_turn(p, memory + NARROW_AT, s->narrow_full, s->narrow_empty, turns, blocks, 1, head);
}

DEVICE void produce(const Params& p, Shared* s, u32 memory) {
  int turns = 0;
  Tile tile = find_tile(p, s, blockIdx.x);
  for (int index = 0;; index++) {
    const int slot = index % QUERY_SLOTS;
    const u32 full = shared_address(&s->query_full[slot]);
    if (index >= QUERY_SLOTS) mbarrier_wait(shared_address(&s->query_empty[slot]), (index / QUERY_SLOTS - 1) & 1);
    s->tiles[slot] = tile;
    if (tile.count == 0) {
      mbarrier_arrive(full);
      break;
    }
    mbarrier_expect(full, QUERY_COPIED);
    copy_queries(memory + slot * QUERY_BYTES, &p.queries, tile.head * GROUP, tile.token, full);
    const int claimed = gridDim.x + atomicAdd(p.queue, 1);
    const int* table = p.block_tables + (size_t)tile.table * p.table_stride;
    const int last = (tile.position + tile.count - 1) / BLOCK;
    Blocks now = blocks_of(table, tile.high - 1, last), before = now;
    for (int turn = tile.high - 1; turn >= tile.low; turn--, turns++) {
      const Blocks next = blocks_of(table, turn - 1, last);  // fetched a turn ahead
      load_keys(p, s, memory, turns, now, tile.head);
      if (turn < tile.high - 1)
        load_values(p, s, memory, turns - 1, before, tile.head, tile.context - (turn + 1) * KEYS);
      before = now;
      now = next;
    }
    const int head = tile.head, known = tile.context - tile.low * KEYS;
    const bool any = tile.high > tile.low;
    tile = find_tile(p, s, claimed);
    if (any) load_values(p, s, memory, turns - 1, before, head, known);
  }
  if (FP8) load_values(p, s, memory, turns, Blocks{}, 0, -1);
  // Every block has claimed its last tile when the last one comes here: the next launch counts from zero.
  if (atomicAdd(p.queue + 1, 1) == (int)gridDim.x - 1) p.queue[0] = p.queue[1] = 0;
}
