// More single instructions, of the persistent kernel. Contract: no state, no decisions. `u32` addresses are in shared memory.
#pragma once
#include "shapes.cuh"

// ---- shared memory
DEVICE uint4 lds128(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}
DEVICE uint2 lds64(u32 at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
  return v;
}
DEVICE u32 lds32(u32 at) {
  u32 v;
  asm volatile("ld.shared.u32 %0,[%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}
DEVICE float lds_f32(u32 at) { return __uint_as_float(lds32(at)); }
DEVICE void sts128(u32 at, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0],{%1,%2,%3,%4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
DEVICE void sts64(u32 at, u32 x, u32 y) { asm volatile("st.shared.v2.u32 [%0],{%1,%2};" ::"r"(at), "r"(x), "r"(y) : "memory"); }
DEVICE void sts32(u32 at, u32 v) { asm volatile("st.shared.u32 [%0],%1;" ::"r"(at), "r"(v) : "memory"); }
DEVICE void sts16(u32 at, u16 v) { asm volatile("st.shared.u16 [%0],%1;" ::"r"(at), "h"(v) : "memory"); }
DEVICE void sts8(u32 at, u32 v) { asm volatile("st.shared.u8 [%0],%1;" ::"r"(at), "r"(v) : "memory"); }
DEVICE void or_shared(u32 at, u32 v) { asm volatile("red.shared.or.b32 [%0],%1;" ::"r"(at), "r"(v) : "memory"); }
// Four 8 x 8 matrices of 16-bit items; lane i gives the address of row i % 8 of matrix i / 8.
DEVICE void ldmatrix(u32 at, u32* r) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
DEVICE void ldmatrix_transposed(u32 at, u32* r) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// Whether a barrier's phase is over, without waiting.
DEVICE bool mbarrier_test(u32 at, u32 parity) {
  u32 done;
  asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p,[%1],%2; selp.u32 %0,1,0,p;}"
               : "=r"(done) : "r"(at), "r"(parity) : "memory");
  return done;
}

// ---- bulk copies
DEVICE u64 evict_first_policy() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0,1.0;" : "=l"(policy));
  return policy;
}
DEVICE u64 evict_last_policy() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0,1.0;" : "=l"(policy));
  return policy;
}
// Weights and KV are read once a step: evict_first keeps the words and the residual in L2 instead.
DEVICE void bulk_copy(u32 to, const void* from, u32 bytes, u32 mbarrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0],[%1],%2,[%3],%4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(mbarrier), "l"(policy)
      : "memory");
}
// The same place in the shared memory of a block of the cluster.
DEVICE u32 address_in_peer(u32 at, u32 rank) {
  u32 r;
  asm("mapa.shared::cluster.u32 %0,%1,%2;" : "=r"(r) : "r"(at), "r"(rank));
  return r;
}
// From this multiprocessor's shared memory to another's of the cluster, where the barrier is too.
DEVICE void copy_to_peer(u32 to, u32 from, u32 bytes, u32 mbarrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];"
               ::"r"(to), "r"(from), "r"(bytes), "r"(mbarrier) : "memory");
}
// What the thread has stored in shared memory is seen by copies that begin behind the next barrier.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Bytes to L2 and no further; nothing says when they are there.
DEVICE void bulk_prefetch(const void* from, u32 bytes, u64 policy) {
  asm volatile("cp.async.bulk.prefetch.L2.global.L2::cache_hint [%0],%1,%2;" ::"l"(from), "r"(bytes), "l"(policy) : "memory");
}
// 16 bytes, past L1; this thread's copies have landed after `async_wait`.
DEVICE void async_copy(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
DEVICE void consumers_sync() { asm volatile("bar.sync 1,%0;" ::"n"(NUM_THREADS) : "memory"); }

// ---- global memory, past L1: other multiprocessors wrote it
DEVICE u32 load_acquire(const u32* p) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0,[%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DEVICE void add_release(u32* p, u32 v) { asm volatile("red.release.gpu.global.add.u32 [%0],%1;" ::"l"(p), "r"(v) : "memory"); }
DEVICE u32 fetch_add_acq_rel(u32* p, u32 v) {
  u32 old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0,[%1],%2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}
DEVICE void or_relaxed(u32* p, u32 v) { asm volatile("red.relaxed.gpu.global.or.b32 [%0],%1;" ::"l"(p), "r"(v) : "memory"); }
DEVICE void add_relaxed(i64* p, i64 v) { asm volatile("red.relaxed.gpu.global.add.u64 [%0],%1;" ::"l"(p), "l"(v) : "memory"); }
DEVICE void load_cg(const i64* p, i64& a, i64& b) {
  asm volatile("ld.global.cg.v2.u64 {%0,%1},[%2];" : "=l"(a), "=l"(b) : "l"(p) : "memory");
}
DEVICE uint4 load_cg128(const void* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
DEVICE u64 load_relaxed(const u64* p) {
  u64 v;
  asm volatile("ld.relaxed.gpu.global.u64 %0,[%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
DEVICE void load_relaxed(const u64* p, u64& a, u64& b) {
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0,%1},[%2];" : "=l"(a), "=l"(b) : "l"(p) : "memory");
}
DEVICE void store_relaxed(u64* p, u64 v) { asm volatile("st.relaxed.gpu.global.u64 [%0],%1;" ::"l"(p), "l"(v) : "memory"); }
DEVICE u32 clock_cycles() {
  u32 t;
  asm volatile("mov.u32 %0,%%clock;" : "=r"(t));
  return t;
}
DEVICE u64 global_nanoseconds() {
  u64 t;
  asm volatile("mov.u64 %0,%%globaltimer;" : "=l"(t));
  return t;
}

// ---- numbers
// Four e4m3 numbers to two pairs of f16; exact.
DEVICE void e4m3_to_f16(u32 four, u32& low, u32& high) {
  asm("{.reg .b16 a,b; mov.b32 {a,b},%2; cvt.rn.f16x2.e4m3x2 %0,a; cvt.rn.f16x2.e4m3x2 %1,b;}"
      : "=r"(low), "=r"(high) : "r"(four));
}
DEVICE u32 permute_bytes(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }
DEVICE float log2_fast(float x) {
  float r;
  asm("lg2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
  return r;
}
DEVICE float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }
DEVICE float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) v += __shfl_xor_sync(~0u, v, offset);
  return v;
}
// The 32-bit finaliser lowbias32 (Chris Wellons, "Prospecting for hash functions").
DEVICE u32 mix(u32 x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// ---- tensor cores: d[16][8] += a[16][16] b[16][8]. Lane 4 g + t holds of d rows g (0, 1) and g + 8 (2, 3), columns
// 2 t and 2 t + 1; of a row g (a0, a2) and g + 8 (a1, a3), k 2 t.. (a0, a1) and 2 t + 8.. (a2, a3); of b the same k
// (b0, b1) of column g.
DEVICE void mma_f16(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void mma_bf16(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
