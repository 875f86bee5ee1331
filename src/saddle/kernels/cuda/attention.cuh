// Attention over paged KV. All rows' units of 16 tokens stand one after the other; a KV head's 16 multiprocessors cut
// that line into equal parts, whatever the rows' lengths. A part is a few segments, one a row; of each segment a
// multiprocessor hands on normalised outputs and their log-sum-exp, and combine.cuh adds the splits.
//
// One warp takes a unit: keys and values are the mma's 8 columns, the group's query heads its rows (half of them idle).
#pragma once
#include "query.cuh"

DEVICE bool segment_of(const Shared* shared, int row, int split, Segment& s) {
  const int units = shared->first_unit[MAX_ROWS], first = shared->first_unit[row];
  const int begin = max(split_begin(units, split), first), end = min(split_begin(units, split + 1), shared->first_unit[row + 1]);
  if (begin >= end) return false;
  s.row = row;
  s.begin = begin - first;
  s.end = end - first;
  s.ends = end == shared->first_unit[row + 1];
  const int old_units = (shared->context[row] - 1 + UNIT_TOKENS - 1) / UNIT_TOKENS;
  s.loaded = min(s.end, old_units) - s.begin;
  return true;
}

// Flash attention of one warp: running maximum, total and output of lane 4 g + t's query head g.
struct Flash {
  float maximum = -1e30f, total = 0;
  float reference = 0;  // of dynamic FP8: the largest scale of values so far, in which `out` counts
  float out[HEAD_DIM / 8][4];  // of an mma's columns: which dims, says `out_dim`
};
// Dim of out[i][j], j = 0 or 1, in lane t of a quad. FP8 values come as pairs of dims, even ones first.
DEVICE int out_dim(int i, int j, int t) {
  return KV_FORMAT == KV_BF16 ? 8 * i + 2 * t + j : 16 * (i >> 1) + 4 * t + 2 * j + (i & 1);
}

struct Unit {
  u32 keys, values;  // addresses
  u32 key_scales, value_scales;  // of dynamic FP8
  int valid;  // tokens
};

// Query heads as operand rows, with k in the order in which ldmatrix delivers keys.
DEVICE void load_query(const Consumer& c, u32* query) {
  const u32 row = c.act + QUERY_AT + (c.lane >> 2) * (QUERY_PITCH * 2);
  const int t = c.lane & 3;
#pragma unroll
  for (int k = 0; k < 8; k++) {
    if (KV_FORMAT == KV_BF16) {
      query[2 * k] = lds32(row + (16 * k + 2 * t) * 2);
      query[2 * k + 1] = lds32(row + (16 * k + 2 * t + 8) * 2);
    } else {
      const uint2 v = lds64(row + (16 * k + 4 * t) * 2);
      query[2 * k] = v.x;
      query[2 * k + 1] = v.y;
    }
  }
}

// Address of chunk `chunk` (even) + `odd` of a token whose offset in its block is `row` modulo 8; tokens are 128-byte
// aligned, so that the swizzle of the lower three bits is one exclusive or and the rest a constant.
DEVICE u32 chunk_address(u32 token, int row, int odd, int chunk) {
  return ((token + ((odd ^ row) << 4)) ^ ((chunk & 7) << 4)) + (chunk >> 3) * 128;
}

// score[0..1]: tokens 2 t, 2 t + 1; [2..3]: 2 t + 8, 2 t + 9.
DEVICE void unit_scores(const Consumer& c, const u32* query, const Unit& unit, float* score) {
  const int row = c.lane & 7, matrix = c.lane >> 3;
  const u32 token = unit.keys + (row + (matrix >> 1) * 8) * TOKEN_BYTES;
  float low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};  // [2] and [3] are the operand's idle rows
  if (KV_FORMAT == KV_BF16) {
#pragma unroll
    for (int k = 0; k < 8; k++) {  // matrices: tokens 0-7, chunks 2 k and 2 k + 1; tokens 8-15, the same
      u32 b[4];
      ldmatrix(chunk_address(token, row, matrix & 1, 2 * k), b);
      mma_bf16(low, query[2 * k], 0, query[2 * k + 1], 0, b[0], b[1]);
      mma_bf16(high, query[2 * k], 0, query[2 * k + 1], 0, b[2], b[3]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < 8; k += 2) {  // a lane's 4 bytes of a chunk are dims 4 t .. 4 t + 3
      u32 four[4];
      ldmatrix(chunk_address(token, row, matrix & 1, k), four);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        u32 b0, b1;
        e4m3_to_f16(four[j], b0, b1);
        mma_f16(low, query[2 * (k + j)], 0, query[2 * (k + j) + 1], 0, b0, b1);
        e4m3_to_f16(four[2 + j], b0, b1);
        mma_f16(high, query[2 * (k + j)], 0, query[2 * (k + j) + 1], 0, b0, b1);
      }
    }
  }
  score[0] = low[0];
  score[1] = low[1];
  score[2] = high[0];
  score[3] = high[1];
}

// out += p v. Values of masked tokens are cut out: whatever lies in memory behind a context, 0 x NaN would be NaN.
DEVICE void unit_values(const Consumer& c, const Unit& unit, const float* p, Flash& f) {
  const int row = c.lane & 7, matrix = c.lane >> 3, t = c.lane & 3;
  constexpr bool BF16 = KV_FORMAT == KV_BF16;
  const u32 p_low = BF16 ? pack_bf16(p[0], p[1]) : pack_f16(p[0], p[1]), p_high = BF16 ? pack_bf16(p[2], p[3]) : pack_f16(p[2], p[3]);
  const u32 keep_low = (2 * t < unit.valid ? 0xffffu : 0) | (2 * t + 1 < unit.valid ? 0xffff0000u : 0);
  const u32 keep_high = (2 * t + 8 < unit.valid ? 0xffffu : 0) | (2 * t + 9 < unit.valid ? 0xffff0000u : 0);
  const u32 token = unit.values + (row + (matrix & 1) * 8) * TOKEN_BYTES;
  if (KV_FORMAT == KV_BF16) {
#pragma unroll
    for (int i = 0; i < 8; i++) {  // matrices: chunk 2 i of tokens 0-7 and 8-15, chunk 2 i + 1 of the same
      u32 v[4];
      ldmatrix_transposed(chunk_address(token, row, matrix >> 1, 2 * i), v);
      mma_bf16(f.out[2 * i], p_low, 0, p_high, 0, v[0] & keep_low, v[1] & keep_high);
      mma_bf16(f.out[2 * i + 1], p_low, 0, p_high, 0, v[2] & keep_low, v[3] & keep_high);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {  // an item of a matrix is a pair of dims: bytes (token 2 t: even, odd; 2 t + 1: ..)
      u32 v[4];
      ldmatrix_transposed(chunk_address(token, row, matrix >> 1, i), v);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        u32 even_low, odd_low, even_high, odd_high;
        e4m3_to_f16(permute_bytes(v[2 * j], 0, 0x3120), even_low, odd_low);
        e4m3_to_f16(permute_bytes(v[2 * j + 1], 0, 0x3120), even_high, odd_high);
        mma_f16(f.out[2 * (i + j)], p_low, 0, p_high, 0, even_low & keep_low, even_high & keep_high);
        mma_f16(f.out[2 * (i + j) + 1], p_low, 0, p_high, 0, odd_low & keep_low, odd_high & keep_high);
      }
    }
  }
}

DEVICE void attend_unit(const Consumer& c, const u32* query, const Unit& unit, Flash& f) {
  const int t = c.lane & 3;
  float s[4];
  unit_scores(c, query, unit, s);
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const int token = 2 * t + (j & 1) + (j >> 1) * 8;
    if (KV_FORMAT == KV_FP8_DYNAMIC) s[j] *= lds_f32(unit.key_scales + token * 4);
    if (token >= unit.valid) s[j] = -1e30f;
  }
  float maximum = fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3]));
  maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 1));
  maximum = fmaxf(fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 2)), f.maximum);
  float shrink = exp2_fast(f.maximum - maximum);
  f.maximum = maximum;
  float sum = 0, scale[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const int token = 2 * t + (j & 1) + (j >> 1) * 8;
    s[j] = token < unit.valid ? exp2_fast(s[j] - maximum) : 0.f;
    sum += s[j];
    if (KV_FORMAT == KV_FP8_DYNAMIC) scale[j] = token < unit.valid ? lds_f32(unit.value_scales + token * 4) : 0.f;
  }
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  f.total = f.total * shrink + sum;
  if (KV_FORMAT == KV_FP8_DYNAMIC) {  // in parts of the largest scale, probabilities times scales fit f16
    float largest = fmaxf(fmaxf(scale[0], scale[1]), fmaxf(scale[2], scale[3]));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(fmaxf(largest, __shfl_xor_sync(~0u, largest, 2)), f.reference);
    const float part = 1.f / largest;
    shrink *= f.reference * part;
    f.reference = largest;
#pragma unroll
    for (int j = 0; j < 4; j++) s[j] *= scale[j] * part;
  }
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 8; i++) {
    f.out[i][0] *= shrink;
    f.out[i][1] *= shrink;
  }
  unit_values(c, unit, s, f);
}

// All units of a segment: unit i goes to warp i % 8, the new token to the next in turn.
DEVICE void attend_segment(Consumer& c, const Segment& s, Flash& f) {
  u32 query[16];
  load_query(c, query);
  const int old_tokens = c.shared->context[s.row] - 1;
  for (int first = 0; first < s.loaded; first += SLOT_UNITS) {
    const Slot slot = next_slot(c);
    const int count = min(SLOT_UNITS, s.loaded - first);
    for (int j = 0; j < count; j++) {
      if ((first + j) % ATTENTION_WARPS != c.warp) continue;
      const Unit unit{slot.at + j * UNIT_BYTES, slot.at + SLOT_VALUES_AT + j * UNIT_BYTES,
                      slot.at + SLOT_SCALES_AT + j * UNIT_SCALE_BYTES, slot.at + SLOT_SCALES_AT + (SLOT_UNITS + j) * UNIT_SCALE_BYTES,
                      min(UNIT_TOKENS, old_tokens - (s.begin + first + j) * UNIT_TOKENS)};
      attend_unit(c, query, unit, f);
    }
    release(c, slot);
  }
  if (s.ends && s.loaded % ATTENTION_WARPS == c.warp) {
    const u32 scales = shared_address(c.shared->new_scales);
    attend_unit(c, query, Unit{c.act, c.act + UNIT_BYTES, scales, scales + UNIT_TOKENS * 4, 1}, f);
  }
}

// Merges the warps' outputs of a segment and hands them on.
DEVICE void put_partials(Consumer& c, int layer, const Segment& s) {
  u64* words = c.p.partial_words + ((i64)c.cta * MAX_ROWS + s.row) * (GROUP * PARTIAL_PITCH);
  const float out_scale = KV_FORMAT == KV_FP8_STATIC ? c.p.layers[layer].v_scale : 1.f;
  for (int index = c.thread; index < GROUP * HEAD_DIM; index += NUM_THREADS) {
    const int head = index >> 7, d = index & 127;
    float maximum = lds_f32(c.act + WARP_MAX_AT + head * 4);
#pragma unroll
    for (int w = 1; w < ATTENTION_WARPS; w++) maximum = fmaxf(maximum, lds_f32(c.act + WARP_MAX_AT + (w * GROUP + head) * 4));
    float out = 0, total = 0;
#pragma unroll
    for (int w = 0; w < ATTENTION_WARPS; w++) {
      const float share = exp2_fast(lds_f32(c.act + WARP_MAX_AT + (w * GROUP + head) * 4) - maximum);
      out += share * lds_f32(c.act + ((w * GROUP + head) * MERGE_PITCH + d) * 4);
      total += share * lds_f32(c.act + WARP_TOTAL_AT + (w * GROUP + head) * 4);
    }
    put_word(words + head * PARTIAL_PITCH + d, out / total * out_scale, c.epoch);
    if (d == 0) put_word(words + head * PARTIAL_PITCH + HEAD_DIM, maximum + log2_fast(total), c.epoch);
  }
}

DEVICE void attend(Consumer& c, int layer, const Segment& s) {
  prepare_query(c, layer, s);
  Flash f;
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 8; i++) f.out[i][0] = f.out[i][1] = f.out[i][2] = f.out[i][3] = 0;
  attend_segment(c, s, f);
  consumers_sync();  // the new unit has been read
  const int g = c.lane >> 2, t = c.lane & 3;
  if (KV_FORMAT == KV_FP8_DYNAMIC) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) f.out[i][j] *= f.reference;
  }
  if (c.warp < ATTENTION_WARPS && g < GROUP) {
    if (t == 0) {
      sts32(c.act + WARP_MAX_AT + (c.warp * GROUP + g) * 4, __float_as_uint(f.maximum));
      sts32(c.act + WARP_TOTAL_AT + (c.warp * GROUP + g) * 4, __float_as_uint(f.total));
    }
    const u32 row = c.act + (c.warp * GROUP + g) * (MERGE_PITCH * 4);
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; i++) {
      if (KV_FORMAT == KV_BF16) {
        sts64(row + out_dim(i, 0, t) * 4, __float_as_uint(f.out[i][0]), __float_as_uint(f.out[i][1]));
      } else if (i % 2 == 0) {  // even and odd dims are neighbours
        sts128(row + out_dim(i, 0, t) * 4, make_uint4(__float_as_uint(f.out[i][0]), __float_as_uint(f.out[i + 1][0]),
                                                    __float_as_uint(f.out[i][1]), __float_as_uint(f.out[i + 1][1])));
      }
    }
  }
  consumers_sync();
  put_partials(c, layer, s);
  consumers_sync();
}
