// The products of a turn. d [64 lines][N]: lane 4 g + t of warp w holds of lines 16 w + g (d[4 j], d[4 j + 1]) and
// 16 w + g + 8 (d[4 j + 2], d[4 j + 3]) the columns 8 j + 2 t and 8 j + 2 t + 1. As operand of the next product the same
// numbers, in pairs, lie where it wants them: weights never leave the registers.
#pragma once
#include "prefill_fp8.cuh"

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D64                                                                                                    \
  D4(0), D4(4), D4(8), D4(12), D4(16), D4(20), D4(24), D4(28), D4(32), D4(36), D4(40), D4(44), D4(48), D4(52), \
      D4(56), D4(60)
#define NAMES64                                                                                 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
  "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43," \
  "%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
// d [64][keys] (+)= queries [64][16] keys [keys][16]^T
DEVICE void multiply_queries(float (&d)[64], u64 a, u64 b, int add) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p,%66,0;"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      NAMES64 ",%64,%65,p,1,1,0,0;}"
      : D64
      : "l"(a), "l"(b), "r"(add));
}
// The same of 32 columns in E4M3.
DEVICE void multiply_parts(float (&d)[64], u64 a, u64 b, int add) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p,%66,0;"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
      NAMES64 ",%64,%65,p,1,1;}"
      : D64
      : "l"(a), "l"(b), "r"(add));
}
// d [64][128] += weights [64][16] (registers) values [16][128], in bf16, or in float16 for FP8 memory
#define MULTIPLY_VALUES(type)                                       \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type  \
               " " NAMES64 ",{%64,%65,%66,%67},%68,1,1,1,1;"        \
               : D64                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
DEVICE void multiply_values(float (&d)[64], const u32* a, u64 b) {
  if (FP8) MULTIPLY_VALUES("f16.f16");
  else MULTIPLY_VALUES("bf16.bf16");
}
#undef MULTIPLY_VALUES
#undef NAMES64
#undef D64
#undef D4

// scores = queries keys^T, issued. FP8: of both parts of the queries.
DEVICE void issue_scores(float (&scores)[KEYS / 2], u32 queries, u32 keys) {
  const u64 a = operand(queries), b = operand(keys);
  if (FP8) {
#pragma unroll
    for (int k = 0; k < 8; k++)
      multiply_parts(scores, a + (k / 4 * PART_BYTES + k % 4 * 32) / 16, b + k % 4 * 32 / 16, k != 0);
    wgmma_commit();
    return;
  }
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 16; k++)  // addresses count 16 bytes
    multiply_queries(scores, a + (k / 4 * QUERY_HALF + k % 4 * 32) / 16, b + (k / 4 * KEY_HALF + k % 4 * 32) / 16, k != 0);
  wgmma_commit();
}

// result += weights values, issued.
DEVICE void issue_result(float (&result)[64], const u32 (&weights)[KEYS / 4], u32 values) {
  const u64 b = operand<KEY_HALF>(values);
#pragma unroll
  for (int k = 0; k < KEYS / 16; k++) multiply_values(result, weights + 4 * k, b + k * (16 * LINE_BYTES / 16));
  wgmma_commit();
}
