// The producer: one thread that streams, slot by slot, all weights and KV that this multiprocessor will use, in the order
// in which the consumers use them. It runs ahead over every barrier as far as the ring and the window allow; only the
// experts wait, for the routing, and the first layer's KV, for the rows.
//
// Contract: the stages below and the consumers' stages take the same slots in the same order.
#pragma once
#include "query.cuh"
#include "attention.cuh"
#include "experts.cuh"

struct Producer {
  const Params& p;
  Shared* shared;
  u32 ring;
  u64 policy, keep_policy;  // of what is read once; of what is fetched ahead
  int slot = 0;
  u32 parity = 0;
  int window = 1;
  // The last three slots issued, slot | parity << 8, the newest first; -1: none.
  int issued0 = -1, issued1 = -1, issued2 = -1;
};

constexpr int TURN = 31;  // rotations differ from layer to layer

// The next slot, once it is empty and no more than the window is on the way.
DEVICE int take_slot(Producer& d) {
  const int slot = d.slot;
  mbarrier_wait(&d.shared->empty[slot], d.parity ^ 1, FAILED_RING);
  const int oldest = d.window == 1 ? d.issued0 : d.window == 2 ? d.issued1 : d.issued2;
  if (oldest >= 0) mbarrier_wait(&d.shared->full[oldest & 255], oldest >> 8, FAILED_WINDOW);
  d.issued2 = d.issued1;
  d.issued1 = d.issued0;
  d.issued0 = slot | (int)(d.parity << 8);
  if (++d.slot == RING_SLOTS) {
    d.slot = 0;
    d.parity ^= 1;
  }
  return slot;
}
DEVICE void send(Producer& d, const u8* from, u32 bytes, int code) {
  const int slot = take_slot(d);
  const u32 full = shared_address(&d.shared->full[slot]);
  d.shared->code[slot] = code;
  mbarrier_expect(full, bytes);
  bulk_copy(d.ring + slot * RING_SLOT_BYTES, from, bytes, full, d.policy);
}

// The next two tiles that are claimed from a counter, as places in the claimed part of a stage.
struct Claims {
  u32* counter;
  int next, after;
};
DEVICE Claims claim(u32* counter) { return {counter, (int)atomicAdd(counter, 1u), (int)atomicAdd(counter, 1u)}; }
DEVICE Claims no_claims() { return {nullptr, 0, 0}; }

// A stage of `tiles` tiles of `slots` slots: first this multiprocessor's share of the static part, then claimed tiles.
// address(tile) is that of its first slot.
template <class Address>
DEVICE void send_tiles(Producer& d, int tiles, int rotation, int claimed, int slots, u32 bytes, const Claims& claims, Address address) {
  const int fixed = (int)((i64)tiles * (100 - claimed) / 100);
  int begin, end;
  share_of(fixed, rotation, begin, end);
  int next = fixed + claims.next, after = fixed + claims.after;
  if (begin == end && next >= tiles) {
    const int slot = take_slot(d);
    d.shared->code[slot] = NO_TILE;
    mbarrier_arrive(shared_address(&d.shared->full[slot]));
    return;
  }
  for (int tile = begin; tile < end; tile++) {
    const u8* from = address(tile);
    const bool last = tile == end - 1 && next >= tiles;
    for (int i = 0; i < slots; i++) send(d, from + (i64)i * bytes, bytes, tile | (last ? LAST_TILE : 0));
  }
  while (next < tiles) {
    const u8* from = address(next);
    const int code = next | (after >= tiles ? LAST_TILE : 0);
    next = after;
    if (next < tiles) after = fixed + (int)atomicAdd(claims.counter, 1u);
    for (int i = 0; i < slots; i++) send(d, from + (i64)i * bytes, bytes, code);
  }
}

// KV of this multiprocessor's segments: slots of up to SLOT_UNITS units, keys then values then scales, a copy for each
// run of units in one block.
DEVICE void send_kv(Producer& d, int layer) {
  const int head = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS;
  if (blockIdx.x >= ATTENTION_CTAS) return;
  int cached = 0;  // place of the segment's first block in Shared::blocks
  for (int row = 0; row < MAX_ROWS; row++) {
    Segment s;
    if (!segment_of(d.shared, row, split, s) || s.loaded <= 0) continue;
    const int first_block = s.begin / UNITS_PER_BLOCK, last_block = (s.begin + s.loaded - 1) / UNITS_PER_BLOCK;
    const int* table = d.p.block_tables + (i64)d.shared->table[row] * d.p.max_blocks;
    const auto block_at = [&](int index) {
      const int place = cached + index - first_block;
      return place < CACHED_BLOCKS ? d.shared->blocks[place] : __ldg(table + index);
    };
    d.window = s.loaded >= LONG_KV_SLOTS * SLOT_UNITS ? WINDOW_LONG_KV : WINDOW_OTHER;
    int index = first_block, block = block_at(index), ahead = block_at(min(index + 1, last_block));
    for (int first = 0; first < s.loaded; first += SLOT_UNITS) {
      const int count = min(SLOT_UNITS, s.loaded - first), slot = take_slot(d);
      const u32 full = shared_address(&d.shared->full[slot]), at = d.ring + slot * RING_SLOT_BYTES;
      mbarrier_expect(full, count * 2 * (UNIT_BYTES + UNIT_SCALE_BYTES));
      for (int j = 0; j < count;) {
        const int unit = s.begin + first + j, inside = unit % UNITS_PER_BLOCK;
        if (unit / UNITS_PER_BLOCK != index) {
          index++;
          block = ahead;
          ahead = block_at(min(index + 1, last_block));
        }
        const int run = min(count - j, UNITS_PER_BLOCK - inside);
        const i64 place = (i64)layer * d.p.num_blocks + block;
        const u8* keys = d.p.kv + place * KV_BLOCK_BYTES + head * HEAD_BLOCK_BYTES + inside * UNIT_BYTES;
        bulk_copy(at + j * UNIT_BYTES, keys, run * UNIT_BYTES, full, d.policy);
        bulk_copy(at + SLOT_VALUES_AT + j * UNIT_BYTES, keys + NUM_KV_HEADS * HEAD_BLOCK_BYTES, run * UNIT_BYTES, full, d.policy);
        if (KV_FORMAT == KV_FP8_DYNAMIC) {
          const float* scales = d.p.kv_scales + place * KV_BLOCK_SCALES + head * BLOCK_TOKENS + inside * UNIT_TOKENS;
          const u32 to = at + SLOT_SCALES_AT + j * UNIT_SCALE_BYTES;
          bulk_copy(to, scales, run * UNIT_SCALE_BYTES, full, d.policy);
          bulk_copy(to + SLOT_UNITS * UNIT_SCALE_BYTES, scales + NUM_KV_HEADS * BLOCK_TOKENS, run * UNIT_SCALE_BYTES, full, d.policy);
        }
        j += run;
      }
    }
    cached += last_block - first_block + 1;
  }
  d.window = WINDOW_OTHER;
}

// Keeps the ids of the blocks that `send_kv` will ask for first. Consumers, before the step.
DEVICE void cache_blocks(const Params& p, Shared* shared) {
  if (blockIdx.x >= ATTENTION_CTAS) return;
  int cached = 0;
  for (int row = 0; row < MAX_ROWS; row++) {
    Segment s;
    if (!segment_of(shared, row, blockIdx.x % SPLITS, s) || s.loaded <= 0) continue;
    const int first = s.begin / UNITS_PER_BLOCK, count = (s.begin + s.loaded - 1) / UNITS_PER_BLOCK - first + 1;
    const int* table = p.block_tables + (i64)shared->table[row] * p.max_blocks + first;
    for (int i = threadIdx.x; i < count && cached + i < CACHED_BLOCKS; i += NUM_THREADS) shared->blocks[cached + i] = table[i];
    cached += count;
  }
}

// Until the routing comes: brings slots of the layer's q, k and v to L2, more slowly than the memory could.
DEVICE void fetch_ahead(Producer& d, int layer, u32 routed, u32 parity) {
  constexpr int TILE_SLOTS = QkvShape::SLOTS, BYTES = QkvShape::SLOT_BYTES;
  int begin, end;
  share_of(QKV_TILES, layer * TURN, begin, end);
  const u8* from = d.p.layers[layer].qkv + (i64)begin * (TILE_SLOTS * BYTES);
  const int slots = min((end - begin) * TILE_SLOTS, SLOTS_AHEAD);
  if (d.issued0 >= 0) mbarrier_wait(&d.shared->full[d.issued0 & 255], d.issued0 >> 8, FAILED_WINDOW);
  u32 due = clock_cycles();
  for (int i = 0; i < slots && !mbarrier_test(routed, parity);) {
    const u32 now = clock_cycles();
    if ((int)(now - due) < 0) continue;
    due = now + BYTES / AHEAD_BYTES_A_CYCLE;
    bulk_prefetch(from + i * BYTES, BYTES, d.keep_policy);
    i++;
  }
}

// Rotations differ from stage to stage: whoever has a tile more in one has none more in the next.
DEVICE void produce(Producer& d) {
  const Params& p = d.p;
  for (int l = 0; l < p.num_layers; l++) {
    const LayerWeights& layer = p.layers[l];
    u32* claims = p.claims + l * CLAIM_PITCH;
    const int turn = l * TURN;
    if (p.stages & STAGE_ATTENTION) {
      d.window = WINDOW_QKV;
      send_tiles(d, QKV_TILES, turn, 0, QkvShape::SLOTS, QkvShape::SLOT_BYTES, no_claims(),
                 [&](int tile) { return layer.qkv + (i64)tile * (QkvShape::SLOTS * QkvShape::SLOT_BYTES); });
      d.window = WINDOW_OTHER;
      if (l == 0) mbarrier_wait(&d.shared->rows_known, 0, FAILED_RING);
      send_kv(d, l);
      send_tiles(d, O_PARTS * (HIDDEN / TILE_ROWS), turn + NUM_CTAS / 2, 0, O_SLOTS, OutputShape::SLOT_BYTES, no_claims(), [&](int tile) {
        const int part = tile / (HIDDEN / TILE_ROWS), strip = tile % (HIDDEN / TILE_ROWS);
        return layer.o + (i64)(strip * OutputShape::SLOTS + part * O_SLOTS) * OutputShape::SLOT_BYTES;
      });
    }
    if (p.stages & STAGE_EXPERTS) {
      d.window = WINDOW_OTHER;
      constexpr u32 GATE_BYTES = GATE_ROWS * HIDDEN * 4;
      if (blockIdx.x < GATE_CTAS)
        for (int i = 0; i < NORM_SHARE; i++)
          send(d, (const u8*)layer.gate + (i64)(blockIdx.x / NORM_SHARE * NORM_SHARE + i) * GATE_BYTES, GATE_BYTES, 0);
      const Claims up_claims = claim(claims + CLAIM_UP);  // on the way while the routing is
      const u32 routed = shared_address(&d.shared->routed);
      if (SLOTS_AHEAD > 0 && l + 1 < p.num_layers && (p.stages & STAGE_ATTENTION)) fetch_ahead(d, l + 1, routed, l & 1);
      mbarrier_wait(&d.shared->routed, l & 1, FAILED_ROUTING);
      d.window = WINDOW_EXPERTS;
      const int experts = d.shared->num_experts;
      const auto expert_at = [&](int place) { return (i64)(d.shared->expert_list[place] & 0xffff); };
      send_tiles(d, experts * UP_TILES, turn + NUM_CTAS / 4, CLAIMED_EXPERTS, UpShape::SLOTS, UpShape::SLOT_BYTES, up_claims,
                 [&](int tile) {
                   const int place = tile / UP_TILES;
                   return layer.w13 + (expert_at(place) * UP_TILES + tile % UP_TILES) * (UpShape::SLOTS * UpShape::SLOT_BYTES);
                 });
      send_tiles(d, experts * DOWN_UNITS, turn + 3 * NUM_CTAS / 4, CLAIMED_EXPERTS, DOWN_TILES_AT_ONCE, DownShape::SLOT_BYTES,
                 claim(claims + CLAIM_DOWN), [&](int tile) {
                   const int place = tile / DOWN_UNITS;
                   return layer.w2 + (expert_at(place) * DOWN_UNITS + tile % DOWN_UNITS) * (DOWN_TILES_AT_ONCE * DownShape::SLOT_BYTES);
                 });
    }
  }
  if (!(p.stages & STAGE_HEAD)) return;
  d.window = WINDOW_HEAD;
  send_tiles(d, VOCAB / TILE_ROWS, 0, CLAIMED_HEAD, HeadShape::SLOTS, HeadShape::SLOT_BYTES, claim(p.claims + NUM_LAYERS * CLAIM_PITCH),
             [&](int tile) { return p.lm_head + (i64)tile * (HeadShape::SLOTS * HeadShape::SLOT_BYTES); });
}
