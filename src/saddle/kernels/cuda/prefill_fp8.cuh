// What FP8 memory needs. Keys are multiplied as they are, in E4M3: of each query, the nearest E4M3 numbers and those of
// the rest, which together keep bf16's bits, at twice its rate. Values have their tokens along k, and such an operand
// of wgmma must be of 16 bits: three warps widen them to float16, which holds E4M3 exactly.
#pragma once
#include "prefill_producer.cuh"

// The queries of a warpgroup's 64 lines, bf16 at `from`, become two parts at `to`: [part][line][128 bytes]. `factors`:
// what products of lines g and g + 8 have to be multiplied by. The warpgroup's threads, which meet here.
DEVICE void split_queries(u32 from, u32 to, int group, int warp, int lane, float k_scale, float (&factors)[2]) {
  const int line = warp * 16 + lane % 16, half = lane / 16;  // half a line a lane
  from += half * QUERY_HALF + line * LINE_BYTES;
  to += line * LINE_BYTES;
  float largest = 0;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const uint4 v = load_shared(from + ((j ^ line % 8) << 4));
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
      largest = fmaxf(largest, fmaxf(fabsf(__uint_as_float(words[i] << 16)), fabsf(__uint_as_float(words[i] & 0xFFFF0000))));
  }
  largest = fmaxf(fmaxf(largest, __shfl_xor_sync(~0u, largest, 16)), 1e-10f);
  const float grow = 448.f / largest, factor = largest * (k_scale / 448.f);
  factors[0] = __shfl_sync(~0u, factor, lane / 4);
  factors[1] = __shfl_sync(~0u, factor, lane / 4 + 8);
  barrier_sync(GROUP_OF + group, 128);  // nobody multiplies the parts of the tile before any more
#pragma unroll
  for (int j = 0; j < 4; j++) {
    u32 parts[2][4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint4 v = load_shared(from + (((2 * j + i) ^ line % 8) << 4));
      const u32 words[4] = {v.x, v.y, v.z, v.w};
      u32 pairs[2][4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const float low = __uint_as_float(words[k] << 16) * grow, high = __uint_as_float(words[k] & 0xFFFF0000) * grow;
        pairs[0][k] = pack_e4m3(low, high);
        const float2 near = unpack_f16(widen_e4m3(pairs[0][k]));
        pairs[1][k] = pack_e4m3(low - near.x, high - near.y);
      }
#pragma unroll
      for (int part = 0; part < 2; part++)
#pragma unroll
        for (int k = 0; k < 2; k++) parts[part][2 * i + k] = pairs[part][2 * k] | pairs[part][2 * k + 1] << 16;
    }
#pragma unroll
    for (int part = 0; part < 2; part++)
      store_shared(to + part * PART_BYTES + (((half * 4 + j) ^ line % 8) << 4),
                   make_uint4(parts[part][0], parts[part][1], parts[part][2], parts[part][3]));
  }
  fence_async();
  barrier_sync(GROUP_OF + group, 128);
}

// Values of turn after turn to float16, in the places where bf16 ones would lie; zeros behind the context, where memory
// may hold NaN. Three warps take 12 rows at a time, 16 numbers a lane, and fetch the next while they write.
DEVICE void widen_values(Shared* s, u32 memory, int thread) {
  constexpr int ROWS = WIDENERS / 8, ROUNDS = (KEYS + ROWS - 1) / ROWS;
  static_assert(ROWS % 8 == 4 && KEYS % ROWS == 8, "rows alternate between two swizzles; the last round is not full");
  const u32 first = thread / 8;
  u32 places[2];
  bool right[2];  // half of the row
#pragma unroll
  for (int odd = 0; odd < 2; odd++) {
    const u32 row = (first + 4 * odd) % 8, chunk = (thread % 8) ^ row;
    right[odd] = chunk / 4;
    // Eight lanes hold a row: those of the right half of it begin with their right chunks, so that no two lanes write to
    // the same banks.
    places[odd] = first * LINE_BYTES + (right[odd] ? KEY_HALF : 0) + (((chunk % 4 * 2 + right[odd]) ^ row) << 4);
  }
  for (int turns = 0;; turns++) {
    const int stage = turns % STAGES;
    mbarrier_wait(shared_address(&s->narrow_full[stage]), (turns / STAGES) & 1);
    const int known = s->known[stage] - (int)first;
    if (s->known[stage] < 0) return;
    if (turns >= STAGES) mbarrier_wait(shared_address(&s->value_empty[stage]), (turns / STAGES - 1) & 1);
    const u32 from = memory + NARROW_AT + stage * LOADED_BYTES + thread * 16, to = memory + VALUES_AT + stage * KEY_BYTES;
    uint4 next = load_shared(from);
#pragma unroll
    for (int n = 0; n < ROUNDS; n++) {
      const bool full = n < ROUNDS - 1;
      uint4 v = next;
      if (n < ROUNDS - 2 || (n < ROUNDS - 1 && first < 8)) next = load_shared(from + (n + 1) * (WIDENERS * 16));
      if (n * ROWS >= known) v = make_uint4(0, 0, 0, 0);
      const uint4 low = make_uint4(widen_e4m3(v.x), widen_e4m3(v.x >> 16), widen_e4m3(v.y), widen_e4m3(v.y >> 16));
      const uint4 high = make_uint4(widen_e4m3(v.z), widen_e4m3(v.z >> 16), widen_e4m3(v.w), widen_e4m3(v.w >> 16));
      const u32 at = to + places[n % 2] + n * (ROWS * LINE_BYTES);
      if (full || first < 8) {
        store_shared(at, right[n % 2] ? high : low);
        store_shared(at ^ 16, right[n % 2] ? low : high);
      }
    }
    mbarrier_arrive(shared_address(&s->narrow_empty[stage]));
    fence_async();
    __syncwarp();
    if (thread % 32 == 0) mbarrier_arrive(shared_address(&s->value_full[stage]));
  }
}
