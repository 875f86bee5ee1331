// The choice: a token's experts by score + bias, their weights, and each expert's list of pairs (router.py says what
// these are). Blocks that share 128 tokens wait for each other's sums and then take a part of the tokens each; a warp
// takes up to four at a time, its lanes 8 adjacent experts each. This code runs once a launch, and fetching it takes
// longer than running it: what can be a loop is one.
//
// Contract: blocks that share tokens run at the same time (there are no more blocks than multiprocessors, or none
// share).
#pragma once
#include "gate_shapes.cuh"

struct Params {
  const float* x;          // [tokens][HIDDEN]
  const u8* image;         // [HIDDEN / 32][high, low][EXPERTS_PADDED][32] float16, swizzled as gate.py says
  const float* factors;    // [EXPERTS_PADDED] by which an expert's products are to be multiplied
  const float* gain;       // [HIDDEN]
  float* logits;           // [splits][tokens][EXPERTS]
  float* squares;          // [splits][tokens]
  u8* numbers;             // [tokens][HIDDEN] E4M3
  float* scales;           // [tokens][GROUPS]
  const float* bias;       // [EXPERTS]
  const int* positions;    // [tokens], -1: a row that pads
  const int* token_ids;    // [tokens]
  int* ids;                // [tokens][TOP_K], -1 where the row pads
  float* weights;          // [tokens][TOP_K]
  int* counts;             // [EXPERTS + 1]: pairs of each expert, units
  int* lists;              // [EXPERTS][capacity] pairs of each expert
  int* units;              // as in router.py
  int* flags;              // zeros between launches, see below
  int num_tokens;
  int splits;              // blocks that share the columns of a token; GROUPS is a multiple
  int capacity;            // of a list
  int unit;                // pairs of a unit; 0: no units
  int layer;
  int uniform;             // ids are a hash of layer, position and token id
  float eps;
};

struct Shared {
  u64 x_full[X_SLOTS], x_empty[X_SLOTS];
  u64 part_full[PART_SLOTS], part_empty[PART_SLOTS];
  int is_last;  // of all blocks to end
};
constexpr int SHARED_BYTES = 1024 + PART_SLOTS * PART_BYTES + X_SLOTS * X_BYTES + sizeof(Shared);

// Flags: what is counted, a line of 128 bytes each, so that the cache counts them side by side; blocks that are done;
// and for each 128 tokens, blocks whose sums are written.
constexpr int APART = 32;
constexpr int DONE_AT = (EXPERTS + 1) * APART;
constexpr int SUMS_AT = DONE_AT + APART;

struct Work {
  int token, tokens;  // first one, how many
  int group, groups;  // of 128 columns: first one, how many
  int split;
};

DEVICE Work work_of(const Params& p) {
  const int split = blockIdx.x % p.splits, groups = GROUPS / p.splits, token = blockIdx.x / p.splits * TOKENS;
  return Work{token, min(TOKENS, p.num_tokens - token), split * groups, groups, split};
}

constexpr int TOP_K = SADDLE_TOP_K;
constexpr int at_least(int number) {
  int power = 1;
  while (power < number) power *= 2;
  return power;
}
constexpr int CHOICES = at_least(TOP_K);
constexpr int WARPS = CONSUMERS / 32;
constexpr int BATCH = 4;  // most tokens of a warp at once: lane CHOICES * token + choice has one of the results
constexpr int OWN = 8;    // experts of a lane
static_assert(BATCH * CHOICES <= 32, "a lane for each result");

DEVICE void add_release(int* at, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0],%1;" ::"l"(at), "r"(value) : "memory");
}
DEVICE int load_acquire(const int* at) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0,[%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
// What was there; all that this thread knows of becomes visible, and all that those before have added to.
DEVICE int add_all(int* at, int value) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0,[%1],%2;" : "=r"(before) : "l"(at), "r"(value) : "memory");
  return before;
}
DEVICE u32 warp_max(u32 value) {
  u32 r;
  asm("redux.sync.max.u32 %0,%1,0xffffffff;" : "=r"(r) : "r"(value));
  return r;
}
DEVICE float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// Of the hash of where a token is (router.py, `_uniform_ids`).
DEVICE u32 mixed(u32 v) {
  v = (v ^ v >> 16) * 0x7FEB352Du;
  v = (v ^ v >> 15) * 0x846CA68Bu;
  return v ^ v >> 16;
}
DEVICE int uniform_id(const Params& p, int token, int choice) {
  const u32 start = mixed(p.layer * 0x9E3779B1u ^ p.positions[token] * 0x85EBCA6Bu ^ p.token_ids[token] * 0xC2B2AE35u);
  return (start + choice * ((mixed(start) >> 1 & 127) * 2 + 1)) % EXPERTS;
}

// The sums of all blocks of a batch's tokens, scored: sigmoid of logit / rms; and 1 / rms also into the FP8 scales.
DEVICE void score(const Params& p, int first, int count, int lane, const float (&factors)[OWN],
                  float (&scores)[BATCH][OWN]) {
  const bool real = lane * OWN < EXPERTS;
#pragma unroll
  for (int j = 0; j < BATCH; j++)
#pragma unroll
    for (int i = 0; i < OWN; i++) scores[j][i] = 0;
  const float* from = p.logits + (size_t)first * EXPERTS + (real ? lane * OWN : 0);
#pragma unroll 1
  for (int base = 0; base < p.splits; base += 4) {
#pragma unroll
    for (int s = base; s < base + 4; s++)  // what several blocks left is under way together
#pragma unroll
      for (int j = 0; j < BATCH; j++) {
        const float4* at = (const float4*)(from + ((size_t)s * p.num_tokens + j) * EXPERTS);
        float4 a = make_float4(0, 0, 0, 0), b = a;
        if (j < count && s < p.splits) a = __ldcg(at), b = __ldcg(at + 1);
        const float v[OWN] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < OWN; i++) scores[j][i] += v[i];
      }
  }
#pragma unroll
  for (int j = 0; j < BATCH; j++) {
    if (j >= count) break;
    float square = 0;
#pragma unroll 1
    for (int s = lane; s < p.splits; s += 32) square += __ldcg(p.squares + (size_t)s * p.num_tokens + first + j);
    const float inverse = rsqrtf(warp_sum(square) / HIDDEN + p.eps);
#pragma unroll 1
    for (int group = lane; group < GROUPS; group += 32) {
      float* at = p.scales + (size_t)(first + j) * GROUPS + group;
      *at = __ldcg(at) * inverse;
    }
#pragma unroll
    for (int i = 0; i < OWN; i++) scores[j][i] = __fdividef(1.f, 1.f + __expf(-scores[j][i] * (inverse * factors[i])));
  }
}

// The largest TOP_K keys of each token, equal ones in the order of ids; ids and scores to the lanes that have them. The
// tokens' turns are independent: each waits for its warp's answers while the others ask.
DEVICE void choose_top(const float (&scores)[BATCH][OWN], const float (&bias)[OWN], int count, int lane, int& id,
                       float& share) {
  u32 keys[BATCH][OWN];
#pragma unroll
  for (int j = 0; j < BATCH; j++)
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const u32 bits = __float_as_uint(scores[j][i] + bias[i]);
      // Unsigned, in the order of floats.
      keys[j][i] = lane * OWN >= EXPERTS ? 0 : bits >> 31 ? ~bits : bits | 1u << 31;
    }
#pragma unroll 1
  for (int choice = 0; choice < TOP_K; choice++) {
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      if (j >= count) break;
      u32 own = keys[j][0];
#pragma unroll
      for (int i = 1; i < OWN; i++) own = max(own, keys[j][i]);
      const u32 best = warp_max(own);
      const int owner = __ffs(__ballot_sync(~0u, own == best)) - 1;
      int place = 0;
      float score = 0;
#pragma unroll
      for (int i = OWN - 1; i >= 0; i--)
        if (keys[j][i] == best) place = i, score = scores[j][i];
#pragma unroll
      for (int i = 0; i < OWN; i++)
        if (lane == owner && i == place) keys[j][i] = 0;
      place = __shfl_sync(~0u, place, owner), score = __shfl_sync(~0u, score, owner);
      if (lane == j * CHOICES + choice) id = owner * OWN + place, share = score;
    }
  }
}

// One warp, up to BATCH tokens.
DEVICE void choose_batch(const Params& p, int first, int count, int lane, const float (&bias)[OWN],
                         const float (&factors)[OWN]) {
  const int mine = lane / CHOICES, choice = lane % CHOICES, token = first + mine;
  const bool active = mine < count && choice < TOP_K;
  float scores[BATCH][OWN], share = 0;
  score(p, first, count, lane, factors, scores);
  int id = 0;
  if (p.uniform) {
    if (active) id = uniform_id(p, token, choice);
#pragma unroll
    for (int j = 0; j < BATCH; j++)
#pragma unroll
      for (int i = 0; i < OWN; i++) {
        const float found = __shfl_sync(~0u, scores[j][i], id / OWN);
        if (active && j == mine && i == id % OWN) share = found;
      }
  } else {
    choose_top(scores, bias, count, lane, id, share);
  }
  float total = active ? share : 0;
#pragma unroll
  for (int offset = CHOICES / 2; offset; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
  if (!active) return;
  const int pair = token * TOP_K + choice;
  const bool listed = p.positions[token] >= 0;
  p.weights[pair] = share / total;
  p.ids[pair] = listed ? id : -1;
  if (!listed) return;
  const int place = atomicAdd(p.flags + id * APART, 1);
  p.lists[(size_t)id * p.capacity + place] = pair;
  if (p.unit && place % p.unit == 0) p.units[atomicAdd(p.flags + EXPERTS * APART, 1)] = id | place / p.unit << 16;
}

// All multiplying threads of a block, behind their sums.
DEVICE void choose_experts(const Params& p, Shared* s, const Work& work) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int* sums = p.flags + SUMS_AT + blockIdx.x / p.splits;
  float bias[OWN], factors[OWN];
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    bias[i] = lane * OWN < EXPERTS ? p.bias[lane * OWN + i] : 0;
    factors[i] = p.factors[lane * OWN + i];
  }
  barrier_sync(1, CONSUMERS);
  if (threadIdx.x == 0) {
    add_release(sums, 1);
    while (load_acquire(sums) < p.splits) {
    }
  }
  barrier_sync(1, CONSUMERS);
  const int begin = work.split * TOKENS / p.splits, end = min(work.tokens, (work.split + 1) * TOKENS / p.splits);
  const int batch = min(BATCH, max(1, (end - begin + WARPS - 1) / WARPS));
#pragma unroll 1
  for (int first = begin + warp * batch; first < end; first += WARPS * batch)
    choose_batch(p, work.token + first, min(batch, end - first), lane, bias, factors);
  barrier_sync(1, CONSUMERS);
  if (threadIdx.x == 0) s->is_last = add_all(p.flags + DONE_AT, 1) == (int)gridDim.x - 1;
  barrier_sync(1, CONSUMERS);
  if (!s->is_last) return;
#pragma unroll 1
  for (int i = threadIdx.x; i <= EXPERTS; i += CONSUMERS) {
    p.counts[i] = __ldcg(p.flags + i * APART);
    p.flags[i * APART] = 0;
  }
  if (threadIdx.x == 0) p.flags[DONE_AT] = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < (int)gridDim.x / p.splits; i += CONSUMERS) p.flags[SUMS_AT + i] = 0;
}
