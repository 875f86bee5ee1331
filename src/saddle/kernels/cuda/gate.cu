// The router's logits of many tokens, and the experts' input in FP8, in one pass over the residual x.
//
//   logits = x (gain * gate)                  before the norm: 1 / rms joins where experts are chosen (gate_choose.cuh)
//   numbers, scales = x * gain in E4M3        over 128 columns; a scale times 1 / rms is the normalised input's
//   squares = sum of x^2
//
// A float32 product is three of float16: x = high + low after a power of two of its own for each token, gain * gate
// likewise for each expert (gate.py, `image`); the fourth product, of two low parts, is below float32's rounding.
// A block has 128 tokens, all experts and a part of the columns; two warpgroups take 64 tokens each, two warps load.
#include "gate_choose.cuh"

// ---- loading
DEVICE void bulk_copy(u32 to, const void* from, u32 bytes, u32 mbarrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];"
               :: "r"(to), "l"(from), "r"(bytes), "r"(mbarrier) : "memory");
}

// One warp: rows of x, 128 columns at a time, and the gain of these columns behind them.
DEVICE void load_x(const Params& p, Shared* s, const Work& work, u32 slots, int lane) {
  for (int i = 0; i < work.groups; i++) {
    const int slot = i % X_SLOTS;
    const u32 full = shared_address(&s->x_full[slot]), at = slots + slot * X_BYTES;
    const float* from = p.x + (size_t)work.token * HIDDEN + (work.group + i) * GROUP;
    if (i >= X_SLOTS) mbarrier_wait(shared_address(&s->x_empty[slot]), (i / X_SLOTS - 1) & 1);
    if (lane == 0) {
      mbarrier_expect(full, (work.tokens + 1) * (GROUP * 4));
      bulk_copy(at + TOKENS * PITCH, p.gain + (work.group + i) * GROUP, GROUP * 4, full);
    }
    __syncwarp();
    for (int row = lane; row < work.tokens; row += 32)
      bulk_copy(at + row * PITCH, from + (size_t)row * HIDDEN, GROUP * 4, full);
  }
}

// One thread: the gate's high and low parts, 16 columns at a time.
DEVICE void load_parts(const Params& p, Shared* s, const Work& work, u32 ring) {
  const u8* from = p.image + (size_t)work.group * (GROUP / 16) * PART_BYTES;
  for (int i = 0; i < work.groups * (GROUP / 16); i++) {
    const int slot = i % PART_SLOTS;
    const u32 full = shared_address(&s->part_full[slot]);
    if (i >= PART_SLOTS) mbarrier_wait(shared_address(&s->part_empty[slot]), (i / PART_SLOTS - 1) & 1);
    mbarrier_expect(full, PART_BYTES);
    bulk_copy(ring + slot * PART_BYTES, from + (size_t)i * PART_BYTES, PART_BYTES, full);
  }
}

// ---- multiplying. A lane has of two rows (lane / 4, and 8 on) the columns 8 (lane % 4) to + 7 of each 32.
struct Rows {
  int row;          // the first of the two
  bool real[2];
  int exponent[2];  // biased, of the power of two by which x is multiplied
  float square[2];
  float inverse[2];  // of the FP8 scale of the 128 columns at work
};

// The 8 numbers of a lane, of 32 columns of a row.
DEVICE void load8(float (&v)[8], u32 at) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint4 w = load_shared(at + 16 * i);
    v[4 * i] = __uint_as_float(w.x), v[4 * i + 1] = __uint_as_float(w.y);
    v[4 * i + 2] = __uint_as_float(w.z), v[4 * i + 3] = __uint_as_float(w.w);
  }
}

// Sums of squares and scales of 128 columns. Returns by what the sums so far must be multiplied, exact powers of two:
// 1 but where a number of this group exceeds all before it so far that it would leave float16's range.
DEVICE float2 look(const Params& p, const Work& work, Rows& rows, u32 x_at, u32 gain_at, int group, int t) {
  float raw[2] = {0, 0}, gained[2] = {0, 0}, rescale[2] = {1, 1};
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    float gain[8], v[8];
    load8(gain, gain_at + step * (STEP * 4));
#pragma unroll
    for (int r = 0; r < 2; r++) {
      load8(v, x_at + r * 8 * PITCH + step * (STEP * 4));
#pragma unroll
      for (int i = 0; i < 8; i++) {
        raw[r] = fmaxf(raw[r], fabsf(v[i]));
        gained[r] = fmaxf(gained[r], fabsf(v[i] * gain[i]));
        rows.square[r] = fmaf(v[i], v[i], rows.square[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    raw[r] = quad_max(raw[r]);
    const float largest = fmaxf(quad_max(gained[r]), 1e-30f);
    rows.inverse[r] = 448.f / largest;
    if (t == 0 && rows.real[r])
      p.scales[(size_t)(work.token + rows.row + 8 * r) * GROUPS + group] = largest / 448.f;
    if (raw[r] * __int_as_float(rows.exponent[r] << 23) > 32768.f) {
      const int next = 263 - (__float_as_int(raw[r]) >> 23);  // the largest number becomes 2^9 to 2^10
      rescale[r] = __int_as_float(next << 23) * __int_as_float((254 - rows.exponent[r]) << 23);
      rows.exponent[r] = next;
    }
  }
  return make_float2(rescale[0], rescale[1]);
}

// 32 columns: the FP8 numbers to memory, and both parts as operands of two products of 16 columns each.
DEVICE void convert(const Params& p, const Work& work, const Rows& rows, u32 x_at, u32 gain_at, int column, int t,
                    u32 (&high)[8], u32 (&low)[8]) {
  float gain[8], v[8];
  load8(gain, gain_at);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    load8(v, x_at + r * 8 * PITCH);
    const float scale = __int_as_float(rows.exponent[r] << 23), inverse = rows.inverse[r];
    u32 words[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float* w = v + 4 * i;
      const float* g = gain + 4 * i;
      words[i] = pack_e4m3(w[0] * g[0] * inverse, w[1] * g[1] * inverse) |
                 pack_e4m3(w[2] * g[2] * inverse, w[3] * g[3] * inverse) << 16;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const float a = w[2 * j] * scale, b = w[2 * j + 1] * scale;
        const u32 pair = pack_f16(a, b);
        const float2 back = unpack_f16(pair);
        high[4 * i + r + 2 * j] = pair;
        low[4 * i + r + 2 * j] = pack_f16(a - back.x, b - back.y);
      }
    }
    u8* to = p.numbers + (size_t)(work.token + rows.row + 8 * r) * HIDDEN + column + 8 * t;
    if (rows.real[r]) *(uint2*)to = make_uint2(words[0], words[1]);
  }
}

DEVICE void consume(const Params& p, Shared* s, const Work& work, u32 ring, u32 slots) {
  const int lane = threadIdx.x % 32, t = lane % 4;
  Rows rows;
  rows.row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    rows.real[r] = rows.row + 8 * r < work.tokens;
    rows.exponent[r] = 236;  // 2^109: whatever comes first is too large
    rows.square[r] = 0;
  }
  float sum[SUMS];
#pragma unroll
  for (int i = 0; i < SUMS; i++) sum[i] = 0;
  u32 high[2][8], low[2][8];
  int product = 0;  // of 16 columns, so far
  for (int i = 0; i < work.groups; i++) {
    const int slot = i % X_SLOTS, group = work.group + i;
    mbarrier_wait(shared_address(&s->x_full[slot]), (i / X_SLOTS) & 1);
    const u32 x_at = slots + slot * X_BYTES + rows.row * PITCH + 32 * t;
    const u32 gain_at = slots + slot * X_BYTES + TOKENS * PITCH + 32 * t;
    const float2 rescale = look(p, work, rows, x_at, gain_at, group, t);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      u32(&h)[8] = high[step % 2];
      u32(&l)[8] = low[step % 2];
      const u32 at = step * (STEP * 4);
      convert(p, work, rows, x_at + at, gain_at + at, group * GROUP + step * STEP, t, h, l);
      if (step == STEPS - 1) mbarrier_arrive(shared_address(&s->x_empty[slot]));
#pragma unroll
      for (int k = 0; k < 2; k++, product++) {
        if (step == 0 && k == 0 && __any_sync(~0u, rescale.x != 1.f || rescale.y != 1.f)) {
          wgmma_wait<0>();
          pin(sum);
#pragma unroll
          for (int j = 0; j < SUMS; j++) sum[j] *= j % 4 < 2 ? rescale.x : rescale.y;
          pin(sum);
        }
        if (product > 1) {  // all but the newest product are done
          wgmma_wait<1>();
          mbarrier_arrive(shared_address(&s->part_empty[(product - 2) % PART_SLOTS]));
        }
        mbarrier_wait(shared_address(&s->part_full[product % PART_SLOTS]), (product / PART_SLOTS) & 1);
        const u64 gate = gate_operand(ring + product % PART_SLOTS * PART_BYTES);
        wgmma_begin();
        multiply(sum, l + 4 * k, gate);
        multiply(sum, h + 4 * k, gate);
        multiply(sum, h + 4 * k, gate + LOW_AT / 16);
        wgmma_commit();
        if (k == 1) pin(high[1 - step % 2]), pin(low[1 - step % 2]);
      }
    }
  }
  wgmma_wait<0>();
  pin(sum);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float square = quad_sum(rows.square[r]), inverse = __int_as_float((254 - rows.exponent[r]) << 23);
    if (!rows.real[r]) continue;
    const size_t at = (size_t)work.split * p.num_tokens + work.token + rows.row + 8 * r;
    if (t == 0) p.squares[at] = square;
    float* to = p.logits + at * EXPERTS + 2 * t;
#pragma unroll
    for (int j = 0; j < SUMS / 4; j++)
      if (8 * j < EXPERTS) {
        const float* pair = sum + 4 * j + 2 * r;
        *(float2*)(to + 8 * j) = make_float2(pair[0] * inverse, pair[1] * inverse);
      }
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1) gate_route(const __grid_constant__ Params p) {
  extern __shared__ u8 memory[];
  const u32 ring = (shared_address(memory) + 1023) & ~1023u, slots = ring + PART_SLOTS * PART_BYTES;
  Shared* s = (Shared*)(memory + (slots - shared_address(memory)) + X_SLOTS * X_BYTES);
  if (threadIdx.x == 0) {
    for (int i = 0; i < X_SLOTS; i++) {
      mbarrier_init(shared_address(&s->x_full[i]), 1);
      mbarrier_init(shared_address(&s->x_empty[i]), CONSUMERS);
    }
    for (int i = 0; i < PART_SLOTS; i++) {
      mbarrier_init(shared_address(&s->part_full[i]), 1);
      mbarrier_init(shared_address(&s->part_empty[i]), CONSUMERS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const Work work = work_of(p);
  if (threadIdx.x >= CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
    const int warp = threadIdx.x / 32 - CONSUMERS / 32, lane = threadIdx.x % 32;
    if (warp == 0) load_x(p, s, work, slots, lane);
    if (warp == 1 && lane == 0) load_parts(p, s, work, ring);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
    consume(p, s, work, ring, slots);
    choose_experts(p, s, work);
  }
}
