// The instructions that these products need beside those of hopper.cuh. Contract as there.
#pragma once
#include "grouped_shapes.cuh"

DEVICE void consumers_sync() { asm volatile("bar.sync 1,%0;" ::"n"(CONSUMERS) : "memory"); }

// ---- copies into shared memory
DEVICE void tensor_copy(u32 to, const TensorMap* map, int tile_k, int slot, int row_tile, u32 mbarrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1,{%2,%3,%4,%5,%6}],[%7];" ::"r"(to),
      "l"(map), "r"(0), "r"(0), "r"(tile_k), "r"(slot), "r"(row_tile), "r"(mbarrier)
      : "memory");
}
DEVICE void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0],[%1],16;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void copy4(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0],[%1],4;" ::"r"(to), "l"(from) : "memory");
}
// Arrives when all copies of this thread so far have landed.
DEVICE void copies_arrive(u32 mbarrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(mbarrier) : "memory");
}

// ---- matrix units. A second operand of wgmma, its k along rows of 64 bytes, 16-byte chunks XORed with the row as the
// copy engine's swizzle of 64 bytes does.
DEVICE u64 weights_operand(u32 at) {
  return (2ull << 62) | ((u64)(8 * TILE_K >> 4) << 32) | (1ull << 16) | ((at & 0x3FFFF) >> 4);
}
// Waits for all but the last PENDING groups, one of which, done by then, wrote d.
template <int PENDING> DEVICE void wgmma_wait(float (&d)[32]) {
  wgmma_wait<PENDING>();
  pin(d);
}
// d[64][64] (+)= a[64][32] b[64][32]^T, E4M3. Lane 4 g + t of warp w holds of rows 16 w + g (d[4 j], d[4 j + 1]) and
// 16 w + g + 8 (d[4 j + 2], d[4 j + 3]) the columns 8 j + 2 t and 8 j + 2 t + 1; of a, in rows 16 w + g (a[0], a[2])
// and 16 w + g + 8 (a[1], a[3]), k from 4 t (a[0], a[1]) and from 16 + 4 t on: what ldmatrix gives.
DEVICE void wgmma(float (&d)[32], const u32* a, u64 b, int add) {
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p,%37,0;"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},"
      "{%32,%33,%34,%35},%36,p,1,1;}"
      : D8(0), D8(8), D8(16), D8(24)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#undef D8
}
// Four 8 x 8 matrices of 16-bit items; lane i gives the address of row i % 8 of matrix i / 8.
DEVICE void ldmatrix(u32 at, u32* r) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
