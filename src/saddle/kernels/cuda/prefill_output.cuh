// From results to memory: bf16, E4M3 with a scale per token and head, or float32 of split keys (added up by
// `_combine_kernel` of kernels/paged_prefill.py).
#pragma once
#include "prefill_softmax.cuh"

// 128 numbers of a line, spread over a quad of lanes, in bf16. All lanes take part, those of real lines write.
DEVICE void store_bf16(u16* to, const float (&result)[64], int r, float factor, bool real, int lane) {
#pragma unroll
  for (int q = 0; q < 4; q++) {
    u32 w[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float* v = result + 16 * q + 4 * j + 2 * r;
      w[j] = pack_bf16(v[0] * factor, v[1] * factor);
    }
    quad_transpose(w, lane);
    if (real) *(uint4*)(to + q * 32 + lane % 4 * 8) = make_uint4(w[0], w[1], w[2], w[3]);
  }
}

DEVICE void store_e4m3(u8* to, float* scale_to, const float (&result)[64], int r, float factor, bool real, int lane) {
  float largest = 0;
#pragma unroll
  for (int j = 0; j < 16; j++) largest = fmaxf(largest, fmaxf(fabsf(result[4 * j + 2 * r]), fabsf(result[4 * j + 2 * r + 1])));
  const float scale = fmaxf(quad_max(largest) * factor, 1e-10f) / 448.f;
  if (real && lane % 4 == 0) *scale_to = scale;
  factor /= scale;
#pragma unroll
  for (int q = 0; q < 2; q++) {
    u32 w[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float* v = result + 32 * q + 8 * j + 2 * r;
      w[j] = pack_e4m3(v[0] * factor, v[1] * factor) | pack_e4m3(v[4] * factor, v[5] * factor) << 16;
    }
    quad_transpose(w, lane);
    const uint4 all = make_uint4(__byte_perm(w[0], w[1], 0x5410), __byte_perm(w[2], w[3], 0x5410),
                                 __byte_perm(w[0], w[1], 0x7632), __byte_perm(w[2], w[3], 0x7632));
    if (real) *(uint4*)(to + q * 64 + lane % 4 * 16) = all;
  }
}

DEVICE void store_part(const Params& p, const Tile& tile, int line, int lane, const float (&result)[64], int r,
                       const Softmax& now, float total) {
  float* to = p.partial + ((size_t)tile.part * LINES + line) * HEAD_DIM + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < 16; j++) {
    const float scale = FP8 ? p.v_scale : 1.f;
    *(float2*)(to + 8 * j) = make_float2(result[4 * j + 2 * r] * scale, result[4 * j + 2 * r + 1] * scale);
  }
  if (lane % 4) return;
  p.stats[(size_t)tile.part * 2 * LINES + line] = now.best[r];
  p.stats[(size_t)tile.part * 2 * LINES + LINES + line] = total;
}

DEVICE void store(const Params& p, const Tile& tile, int first_line, int lane, const float (&result)[64],
                  const Softmax& now) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int line = first_line + 8 * r, token = line / GROUP;
    const bool real = line < TOKENS * GROUP && token < tile.count;
    const float total = quad_sum(now.total[r]), factor = (FP8 ? p.v_scale : 1.f) / total;
    const size_t place = (size_t)(tile.token + (real ? token : 0)) * HEADS + tile.head * GROUP + line % GROUP;
    if (p.num_splits > 1) store_part(p, tile, line, lane, result, r, now, total);
    else if (p.output_scales == nullptr)
      store_bf16((u16*)p.output + place * HEAD_DIM, result, r, factor, real, lane);
    else store_e4m3((u8*)p.output + place * HEAD_DIM, p.output_scales + place, result, r, factor, real, lane);
  }
}
