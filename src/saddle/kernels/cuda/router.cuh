// Top-k of the router's sigmoid scores plus bias, exact, ties to the lower expert; weights are the scores themselves,
// made to sum to one. Every multiprocessor does it for itself and lists the chosen experts in ascending order.
//
// Uniform routing (timing with dummy weights): the experts are a hash of layer, position and token; the weights are
// the router's own scores of them.
#pragma once
#include "norm.cuh"

constexpr int LANE_EXPERTS = 8;

// The row's logits of experts 8 lane .. 8 lane + 7; beyond the last expert: minus infinity. Words are read side by side
// and turned in the row's part of the sums' buffer, which is free here.
constexpr int ROW_SCRATCH = 1024;
// Behind it: 8 or 16 bits an expert, the rows that chose it.
constexpr int EXPERT_BITS = MAX_ROWS <= 8 ? 8 : 16, EXPERTS_A_WORD = 32 / EXPERT_BITS;
constexpr int EXPERT_ROWS_AT = MAX_ROWS * ROW_SCRATCH;
static_assert(EXPERT_ROWS_AT + NUM_EXPERTS * EXPERT_BITS / 8 <= SUMS_BYTES && NUM_EXPERTS * 4 <= ROW_SCRATCH, "logits do not fit");
DEVICE u32 expert_word(const Consumer& c, int expert) { return c.sums + EXPERT_ROWS_AT + expert / EXPERTS_A_WORD * 4; }
DEVICE int expert_shift(int expert) { return expert % EXPERTS_A_WORD * EXPERT_BITS; }
DEVICE void wait_logits(const Consumer& c, int row, float* logit) {
  constexpr int EACH = (NUM_EXPERTS + 31) / 32;
  const u64* words = c.p.router_words + row * NUM_EXPERTS + c.lane;
  const u32 scratch = c.sums + row * ROW_SCRATCH;
  u64 word[EACH];
  Patience patience;
  for (bool fresh = false; !fresh;) {
    fresh = true;
#pragma unroll
    for (int i = 0; i < EACH; i++) word[i] = i * 32 + c.lane < NUM_EXPERTS ? load_relaxed(words + i * 32) : no_word(c.epoch);
#pragma unroll
    for (int i = 0; i < EACH; i++) fresh &= is_fresh(word[i], c.epoch);
    if (!fresh) patience.lose(FAILED_WORDS);
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) sts32(scratch + (i * 32 + c.lane) * 4, (u32)word[i]);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < LANE_EXPERTS; i++) {
    const int expert = c.lane * LANE_EXPERTS + i;
    logit[i] = expert < NUM_EXPERTS ? lds_f32(scratch + expert * 4) : -__int_as_float(0x7f800000);
  }
  __syncwarp();
}

// Writes the row's experts and their scores to Shared::chosen, chosen_weight. One warp.
DEVICE void choose(const Consumer& c, int row, const float* logit, const float* bias) {
  float score[LANE_EXPERTS];
  u32 key[LANE_EXPERTS], best = 0;
#pragma unroll
  for (int i = 0; i < LANE_EXPERTS; i++) {
    score[i] = sigmoid(logit[i]);
    const u32 bits = __float_as_uint(score[i] + bias[i]);
    key[i] = bits & 0x80000000u ? ~bits : bits | 0x80000000u;  // integers in the order of the floats
    if (c.lane * LANE_EXPERTS >= NUM_EXPERTS) key[i] = 0;
    best = max(best, key[i]);
  }
  // The TOP_K lanes with the largest maxima hold all winners, and nothing below the last of these maxima can win.
  int rank = 0;
#pragma unroll
  for (int i = 0; i < 32; i++) {
    const u32 other = __shfl_sync(~0u, best, i);
    rank += other > best || (other == best && i < c.lane);
  }
  const u32 threshold = __shfl_sync(~0u, best, __ffs(__ballot_sync(~0u, rank == TOP_K - 1)) - 1);
  // Candidates, at most 64, in the order of lanes: key, score and expert.
  constexpr int CANDIDATES = TOP_K * LANE_EXPERTS;
  const u32 keys = c.sums + row * ROW_SCRATCH, scores = keys + CANDIDATES * 4, experts = scores + CANDIDATES * 4;
  static_assert(CANDIDATES * 12 <= ROW_SCRATCH, "candidates do not fit");
  int count = 0;
#pragma unroll
  for (int i = 0; i < LANE_EXPERTS; i++) {
    const bool candidate = rank < TOP_K && key[i] >= threshold && c.lane * LANE_EXPERTS < NUM_EXPERTS;
    const u32 lanes = __ballot_sync(~0u, candidate);
    const int at = count + __popc(lanes & ((1u << c.lane) - 1));
    if (candidate) {
      sts32(keys + at * 4, key[i]);
      sts32(scores + at * 4, __float_as_uint(score[i]));
      sts32(experts + at * 4, c.lane * LANE_EXPERTS + i);
    }
    count += __popc(lanes);
  }
  __syncwarp();
  for (int mine = c.lane; mine < count; mine += 32) {
    const u32 my_key = lds32(keys + mine * 4), expert = lds32(experts + mine * 4);
    int better = 0;
#pragma unroll 4
    for (int i = 0; i < count; i++) {
      const u32 other = lds32(keys + i * 4);
      better += other > my_key || (other == my_key && lds32(experts + i * 4) < expert);
    }
    if (better < TOP_K) {
      c.shared->chosen[row * TOP_K + better] = (u8)expert;
      c.shared->chosen_weight[row * TOP_K + better] = lds_f32(scores + mine * 4);
    }
  }
  __syncwarp();
}

DEVICE void choose_uniformly(const Consumer& c, int layer, int row) {
  if (c.lane < TOP_K) {
    const u32 position = c.shared->position[row], token = c.shared->token[row];
    const u32 first = mix((u32)layer * 0x9E3779B1u ^ position * 0x85EBCA6Bu ^ token * 0xC2B2AE35u);
    const u32 stride = 2 * ((mix(first) >> 1) & 127) + 1;  // odd: different experts where their number is a power of two
    const int expert = (first + c.lane * stride) % NUM_EXPERTS;
    const u64 word = load_relaxed(c.p.router_words + row * NUM_EXPERTS + expert);  // fresh: this warp has waited for all
    c.shared->chosen[row * TOP_K + c.lane] = (u8)expert;
    c.shared->chosen_weight[row * TOP_K + c.lane] = sigmoid(word_float(word));
  }
  __syncwarp();
}

// The experts of all rows, ascending, each with the rows that chose it. One warp.
DEVICE void list_experts(const Consumer& c) {
  Shared* s = c.shared;
  int count = 0;
#pragma unroll
  for (int first = 0; first < NUM_EXPERTS; first += 32) {
    const int expert = first + c.lane;
    u32 rows = 0;
    if (expert < NUM_EXPERTS) rows = (lds32(expert_word(c, expert)) >> expert_shift(expert)) & ((1u << EXPERT_BITS) - 1);
    const u32 lanes = __ballot_sync(~0u, rows != 0);
    const int place = count + __popc(lanes & ((1u << c.lane) - 1));
    if (rows) s->expert_list[place] = expert | rows << 16;
    count += __popc(lanes);
  }
  if (c.lane == 0) s->num_experts = count;
  mbarrier_arrive(shared_address(&s->routed));
}

// Rows as the columns of one product, four bits each; columns beyond the last row repeat the first.
DEVICE u32 gather(u32 rows) {
  const u32 first = __ffs(rows) - 1;
  u32 columns = 0;
#pragma unroll
  for (int column = 0; column < 8; column++) {
    columns |= (rows ? __ffs(rows) - 1 : first) << (4 * column);
    rows &= rows - 1;
  }
  return columns;
}

// What the row's output of an expert that it chose is multiplied by.
DEVICE float routing_weight(const Consumer& c, int row, u32 expert) {
  float weight = 0;
#pragma unroll
  for (int i = 0; i < TOP_K; i++)
    if (c.shared->chosen[row * TOP_K + i] == expert) weight = c.shared->chosen_weight[row * TOP_K + i];
  return weight;
}

DEVICE void router_stage(Consumer& c, int layer) {
  Shared* s = c.shared;
  float bias[LANE_EXPERTS];
#pragma unroll
  for (int i = 0; i < LANE_EXPERTS; i++) {
    const int expert = c.lane * LANE_EXPERTS + i;
    bias[i] = c.warp < MAX_ROWS && expert < NUM_EXPERTS ? __ldg(c.p.layers[layer].gate_bias + expert) : 0.f;
  }
  if (c.thread < NUM_EXPERTS / EXPERTS_A_WORD) sts32(expert_word(c, c.thread * EXPERTS_A_WORD), 0);
  consumers_sync();
  const auto choose_row = [&](int row) {
    if (row >= MAX_ROWS || !((c.rows >> row) & 1)) return;
    float logit[LANE_EXPERTS];
    wait_logits(c, row, logit);
    if (c.p.uniform_routing) choose_uniformly(c, layer, row);
    else choose(c, row, logit, bias);
    const int pair = row * TOP_K + c.lane;
    const float weight = c.lane < TOP_K ? s->chosen_weight[pair] : 0.f;
    const float total = warp_sum(weight);
    if (c.lane < TOP_K) {
      const int expert = s->chosen[pair];
      s->chosen_weight[pair] = weight / total;
      or_shared(expert_word(c, expert), (1u << row) << expert_shift(expert));
    }
  };
  if (MAX_ROWS <= NUM_WARPS) {
    choose_row(c.warp);
  } else {
#pragma unroll 1
    for (int row = c.warp; row < MAX_ROWS; row += NUM_WARPS) choose_row(row);
  }
  consumers_sync();
  if (c.warp == 0) list_experts(c);
  consumers_sync();
  if (COLUMN_GROUPS > 1) {
    if (c.thread < s->num_experts) s->expert_columns[c.thread] = gather(s->expert_list[c.thread] >> 16);
    consumers_sync();
  }
}
