// Types, and single instructions under their names that every kernel here needs: barriers in shared memory, packing,
// the exponential. Contract: no state, no decisions. `u32` addresses are in shared memory.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE __device__ __forceinline__

DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// ---- barriers
DEVICE void mbarrier_init(u32 at, u32 count) { asm volatile("mbarrier.init.shared.b64 [%0],%1;" ::"r"(at), "r"(count)); }
DEVICE void mbarrier_arrive(u32 at) { asm volatile("mbarrier.arrive.shared.b64 _,[%0];" ::"r"(at) : "memory"); }
DEVICE void mbarrier_expect(u32 at, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _,[%0],%1;" ::"r"(at), "r"(bytes) : "memory");
}
DEVICE bool mbarrier_try(u32 at, u32 parity) {
  u32 done;
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p,[%1],%2; selp.u32 %0,1,0,p;}"
               : "=r"(done) : "r"(at), "r"(parity) : "memory");
  return done;
}

// ---- numbers
DEVICE u32 pack_f16(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE u32 pack_bf16(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE u32 pack_e4m3(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0,%1,%2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
  return r;
}
