// Single instructions of sm_90 under their names, for kernels whose warpgroups multiply with wgmma while another one
// loads. Contract: no state, no decisions. `u32` addresses are in shared memory.
#pragma once
#include "common.cuh"

struct alignas(64) TensorMap {
  u64 words[16];
};

// ---- barriers
DEVICE void mbarrier_wait(u32 at, u32 parity) {
  while (!mbarrier_try(at, parity)) {
  }
}
DEVICE void barrier_sync(int id, int threads) { asm volatile("bar.sync %0,%1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0,%1;" ::"r"(id), "r"(threads) : "memory"); }
// What this thread wrote into shared memory, and what it knows of, becomes visible to the copy engine and to wgmma.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- numbers
// Two E4M3 numbers (the low 16 bits) in float16.
DEVICE u32 widen_e4m3(u32 pair) {
  u32 r;
  asm("cvt.rn.f16x2.e4m3x2 %0,%1;" : "=r"(r) : "h"((u16)pair));
  return r;
}
DEVICE float2 unpack_f16(u32 pair) {
  float2 r;
  asm("{.reg .f16 a,b; mov.b32 {a,b},%2; cvt.f32.f16 %0,a; cvt.f32.f16 %1,b;}" : "=f"(r.x), "=f"(r.y) : "r"(pair));
  return r;
}
DEVICE uint4 load_shared(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}
DEVICE void store_shared(u32 at, const uint4& v) {
  asm volatile("st.shared.v4.b32 [%0],{%1,%2,%3,%4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
DEVICE float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
  return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}
DEVICE float quad_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}
// Of four words each in the four lanes of a quad: lane t gets the words t of lanes 0 to 3.
DEVICE void quad_transpose(u32 (&w)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  u32 a = __shfl_xor_sync(~0u, odd ? w[0] : w[1], 1), b = __shfl_xor_sync(~0u, odd ? w[2] : w[3], 1);
  if (odd) w[0] = a, w[2] = b;
  else w[1] = a, w[3] = b;
  a = __shfl_xor_sync(~0u, high ? w[0] : w[2], 2), b = __shfl_xor_sync(~0u, high ? w[1] : w[3], 2);
  if (high) w[0] = a, w[1] = b;
  else w[2] = a, w[3] = b;
}

// ---- matrix units
DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the newest PENDING groups are done. `pin` what they wrote or read behind it.
template <int PENDING> DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// No use of these registers moves across this place.
template <int N> DEVICE void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N> DEVICE void pin(u32 (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(d[i])::"memory");
}
// An operand in shared memory with the copy engine's swizzle of 128 bytes (16-byte chunk c of row r at c ^ r % 8), its
// groups of 8 rows 1,024 bytes apart. ACROSS: bytes from 64 numbers of a row to the next 64, where the rows are k (the
// operand is transposed); of no meaning where k lies along the rows.
template <int ACROSS = 16> DEVICE u64 operand(u32 at) {
  return (1ull << 62) | ((u64)(1024 >> 4) << 32) | ((u64)(ACROSS >> 4) << 16) | ((at & 0x3FFFF) >> 4);
}
