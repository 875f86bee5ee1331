// Before attention: QK-norm over the whole width, rotary on the first 64 dims, the KV write, for one row and KV head.
//
// Contract: afterwards QUERY_AT holds the group's query heads, times 128^-0.5 log2(e), and, where the segment ends
// its row, `new_unit` in shared memory holds the row's new key and value as the first token of a unit of KV memory; the
// same numbers are in the cache. Uses the activation buffer: [new unit][raw q and k].
#pragma once
#include "norm.cuh"

// What a multiprocessor reads of one row: old tokens of units [begin, end), and this step's token if `ends`.
struct Segment {
  int row, head;
  int begin, end;  // units of the row
  int loaded;  // units that hold old tokens: begin .. begin + loaded - 1
  bool ends;
};

constexpr int QK_NUMBERS = (GROUP + 1) * HEAD_DIM;  // query heads of the group and their key
constexpr int QK_EACH = (QK_NUMBERS + NUM_THREADS - 1) / NUM_THREADS;
constexpr int QKV_TILES = QKV_WIDTH / TILE_ROWS, Q_TILES = Q_WIDTH / TILE_ROWS, K_TILES = KV_WIDTH / TILE_ROWS;
constexpr int TILES_EACH = (QKV_TILES + NUM_THREADS - 1) / NUM_THREADS;
constexpr u32 RAW_AT = 2 * UNIT_BYTES;  // of the activation buffer
constexpr float QUERY_SCALE = 0.08838834764831845f * 1.4426950408889634f;  // softmax in powers of two
constexpr float E4M3_MAX = 448.f;
constexpr float SMALLEST_SCALE = 1e-10f;  // as kernels/paged_kv.py: 1 / scale stays finite

// Dim d of a head turns with dim `partner`: (a, b) -> (a cos - b sin, b cos + a sin).
DEVICE int rotary_partner(int d) { return d < ROTARY_DIM / 2 ? d + ROTARY_DIM / 2 : d < ROTARY_DIM ? d - ROTARY_DIM / 2 : d; }

struct HeadWeights {
  float own[QK_EACH], partner[QK_EACH], cosine[QK_EACH], sine[QK_EACH];
};
// Of this thread's numbers (i * NUM_THREADS + thread): norm weights and rotation. Read before the wait for q and k.
DEVICE HeadWeights load_head_weights(const Consumer& c, const LayerWeights& layer, const Segment& s) {
  HeadWeights w;
#pragma unroll
  for (int i = 0; i < QK_EACH; i++) {
    const int index = i * NUM_THREADS + c.thread, head = index >> 7, d = index & 127;
    w.own[i] = w.partner[i] = w.sine[i] = 0;
    w.cosine[i] = 1;
    if (index >= QK_NUMBERS) continue;
    const float* weight = head < GROUP ? layer.q_norm + (s.head * GROUP + head) * HEAD_DIM : layer.k_norm + s.head * HEAD_DIM;
    w.own[i] = __ldg(weight + d);
    w.partner[i] = __ldg(weight + rotary_partner(d));
    if (d < ROTARY_DIM) {
      const float* turn = c.shared->rotary[s.row] + (d & (ROTARY_DIM / 2 - 1));
      w.cosine[i] = turn[0];
      w.sine[i] = d < ROTARY_DIM / 2 ? -turn[ROTARY_DIM / 2] : turn[ROTARY_DIM / 2];
    }
  }
  return w;
}

struct HeadNumbers {
  float qk[QK_EACH];
  float value;  // of v, threads < 128
  float inverse_q, inverse_k;  // 1 / rms over the whole widths
};
// Waits for the row's q, k and v of this head and for the squares of all tiles. The latter also says that every
// multiprocessor has read the residual for its norm: what follows may add to it.
DEVICE HeadNumbers wait_head_numbers(Consumer& c, const Segment& s) {
  const u64* words = c.p.qkv_words + s.row * QKV_WIDTH;
  u64 squares[TILES_EACH], qk[QK_EACH], value;
  Patience patience;
  for (bool fresh = false; !fresh;) {
#pragma unroll
    for (int i = 0; i < TILES_EACH; i++) {
      const int tile = i * NUM_THREADS + c.thread;
      squares[i] = tile < QKV_TILES ? load_relaxed(c.p.square_words + tile * SQUARE_PITCH + s.row) : no_word(c.epoch);
    }
#pragma unroll
    for (int i = 0; i < QK_EACH; i++) {
      const int index = i * NUM_THREADS + c.thread, head = index >> 7;
      const int column = head < GROUP ? s.head * GROUP * HEAD_DIM + index : Q_WIDTH + s.head * HEAD_DIM + (index & 127);
      qk[i] = index < QK_NUMBERS ? load_relaxed(words + column) : no_word(c.epoch);
    }
    value = c.thread < HEAD_DIM ? load_relaxed(words + Q_WIDTH + KV_WIDTH + s.head * HEAD_DIM + c.thread) : no_word(c.epoch);
    fresh = is_fresh(value, c.epoch);
#pragma unroll
    for (int i = 0; i < TILES_EACH; i++) fresh &= is_fresh(squares[i], c.epoch);
#pragma unroll
    for (int i = 0; i < QK_EACH; i++) fresh &= is_fresh(qk[i], c.epoch);
    if (!fresh) patience.lose(FAILED_WORDS);
  }
  HeadNumbers n;
  n.value = word_float(value);
  float square_q = 0, square_k = 0;
#pragma unroll
  for (int i = 0; i < TILES_EACH; i++) {
    const int tile = i * NUM_THREADS + c.thread;
    if (tile < Q_TILES) square_q += word_float(squares[i]);
    else if (tile < Q_TILES + K_TILES) square_k += word_float(squares[i]);
  }
  square_q = warp_sum(square_q);
  square_k = warp_sum(square_k);
  if (c.lane == 0) {
    c.shared->warp_sums[c.warp][0] = square_q;
    c.shared->warp_sums[c.warp][1] = square_k;
  }
#pragma unroll
  for (int i = 0; i < QK_EACH; i++) {
    const int index = i * NUM_THREADS + c.thread;
    n.qk[i] = word_float(qk[i]);
    if (index < QK_NUMBERS) sts32(c.act + RAW_AT + index * 4, __float_as_uint(n.qk[i]));
  }
  if (s.ends)  // tokens of the new unit behind the first are masked, but have to be finite
    for (int i = c.thread; i < 2 * UNIT_BYTES / 16; i += NUM_THREADS) sts128(c.act + i * 16, make_uint4(0, 0, 0, 0));
  consumers_sync();
  square_q = square_k = 0;
#pragma unroll
  for (int w = 0; w < NUM_WARPS; w++) {
    square_q += c.shared->warp_sums[w][0];
    square_k += c.shared->warp_sums[w][1];
  }
  n.inverse_q = rsqrtf(square_q * (1.f / Q_WIDTH) + NORM_EPS);
  n.inverse_k = rsqrtf(square_k * (1.f / KV_WIDTH) + NORM_EPS);
  return n;
}

// Where the row's new token goes: byte offset of its key's first number of head `head`, and of its scale.
struct NewToken {
  u8* key;
  float* key_scale;
  int offset;  // in its block
};
DEVICE NewToken new_token(const Consumer& c, int layer, const Segment& s) {
  const int position = c.shared->position[s.row], offset = position % BLOCK_TOKENS;
  const int block = __ldg(c.p.block_tables + (i64)c.shared->table[s.row] * c.p.max_blocks + position / BLOCK_TOKENS);
  const i64 index = (i64)layer * c.p.num_blocks + block;
  return {c.p.kv + index * KV_BLOCK_BYTES + s.head * HEAD_BLOCK_BYTES + offset * TOKEN_BYTES,
          c.p.kv_scales + index * KV_BLOCK_SCALES + s.head * BLOCK_TOKENS + offset, offset};
}
// Stores number d of the new key (which = 0) or value (1) in the new unit (its token 0, unswizzled) and in the cache.
DEVICE void store_new(const Consumer& c, const NewToken& to, int which, int d, float number) {
  constexpr int CHUNK = 16 / KV_ITEM_BYTES;
  const int place = ((d / CHUNK) ^ (to.offset & 7)) * 16 + (d % CHUNK) * KV_ITEM_BYTES;
  u8* cached = to.key + which * (NUM_KV_HEADS * HEAD_BLOCK_BYTES) + place;
  const u32 unit = c.act + which * UNIT_BYTES + d * KV_ITEM_BYTES;
  if (KV_FORMAT == KV_BF16) {
    const u32 bits = pack_bf16(number, 0.f);
    sts16(unit, (u16)bits);
    *(u16*)cached = (u16)bits;
  } else {
    const u32 bits = pack_e4m3(number, 0.f) & 0xff;
    sts8(unit, bits);
    *cached = (u8)bits;
  }
}

// Dynamic FP8 scale of a key or value whose 128 numbers four warps hold, one a thread. All consumers call it.
DEVICE float dynamic_scale(const Consumer& c, float number, bool has_number) {
  float* largest = c.shared->warp_sums[0];  // four floats; free since the norms were summed
  consumers_sync();
  float mine = fabsf(number);
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) mine = fmaxf(mine, __shfl_xor_sync(~0u, mine, offset));
  if (has_number && c.lane == 0) largest[c.warp & 3] = mine;
  consumers_sync();
  return fmaxf(fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3])), SMALLEST_SCALE) / E4M3_MAX;
}

DEVICE void prepare_query(Consumer& c, int layer_index, const Segment& s) {
  const LayerWeights& layer = c.p.layers[layer_index];
  const HeadWeights w = load_head_weights(c, layer, s);
  const NewToken to = new_token(c, layer_index, s);
  const HeadNumbers n = wait_head_numbers(c, s);
  const float query_scale = KV_FORMAT == KV_FP8_STATIC ? QUERY_SCALE * layer.k_scale : QUERY_SCALE;
  float key = 0;  // of the thread whose number is the key's
#pragma unroll
  for (int i = 0; i < QK_EACH; i++) {
    const int index = i * NUM_THREADS + c.thread, head = index >> 7, d = index & 127;
    if (index >= QK_NUMBERS) continue;
    const float partner = lds_f32(c.act + RAW_AT + ((index & ~127) + rotary_partner(d)) * 4);
    const float inverse = head < GROUP ? n.inverse_q : n.inverse_k;
    const float turned = inverse * (n.qk[i] * w.own[i] * w.cosine[i] + partner * w.partner[i] * w.sine[i]);
    if (head < GROUP) {
      const float q = turned * query_scale;
      sts16(c.act + QUERY_AT + (head * QUERY_PITCH + d) * 2, (u16)(KV_FORMAT == KV_BF16 ? pack_bf16(q, 0.f) : pack_f16(q, 0.f)));
    } else {
      key = turned;
    }
  }
  if (c.thread < (8 - GROUP) * HEAD_DIM) sts16(c.act + QUERY_AT + ((GROUP + (c.thread >> 7)) * QUERY_PITCH + (c.thread & 127)) * 2, 0);
  // The key's numbers are those of four whole warps, the value's of the first four.
  constexpr int KEY_FIRST = (GROUP * HEAD_DIM) % NUM_THREADS;
  static_assert(KEY_FIRST + HEAD_DIM <= NUM_THREADS, "a thread holds the key's number once");
  const bool has_key = c.thread >= KEY_FIRST && c.thread < KEY_FIRST + HEAD_DIM, has_value = c.thread < HEAD_DIM;
  float key_scale = layer.k_scale, value_scale = layer.v_scale;
  if (KV_FORMAT == KV_FP8_DYNAMIC) {
    key_scale = dynamic_scale(c, key, has_key);
    value_scale = dynamic_scale(c, n.value, has_value);
    if (s.ends && c.thread == 0) {
      c.shared->new_scales[0] = to.key_scale[0] = key_scale;
      c.shared->new_scales[UNIT_TOKENS] = to.key_scale[NUM_KV_HEADS * BLOCK_TOKENS] = value_scale;
    }
  }
  if (s.ends) {
    const bool scaled = KV_FORMAT != KV_BF16;
    if (has_key) store_new(c, to, 0, (c.thread - KEY_FIRST) & 127, scaled ? key / key_scale : key);
    if (has_value) store_new(c, to, 1, c.thread, scaled ? n.value / value_scale : n.value);
  }
  consumers_sync();
}
