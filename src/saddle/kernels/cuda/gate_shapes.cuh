// Sizes of the router's product over many tokens (gate.cu), and its one instruction. Compile-time: one binary a shape.
//
// Contract: the host defines SADDLE_* (kernels/gate.py checks them); nothing else reads them.
#pragma once
#include "hopper.cuh"

constexpr int HIDDEN = SADDLE_HIDDEN;
constexpr int EXPERTS = SADDLE_NUM_EXPERTS;
constexpr int EXPERTS_PADDED = 256;  // columns of a product

constexpr int TOKENS = 128;  // of a block
constexpr int GROUP = 128;   // columns that share an FP8 scale
constexpr int GROUPS = HIDDEN / GROUP;
constexpr int STEP = 32;     // columns that are made operands at once: of two products
constexpr int STEPS = GROUP / STEP;
constexpr int SUMS = EXPERTS_PADDED / 2;  // of a thread: 64 tokens x 256 experts over 128 threads
static_assert(HIDDEN % GROUP == 0 && EXPERTS <= EXPERTS_PADDED && EXPERTS % 8 == 0, "see gate.py");

// ---- threads: two warpgroups multiply, two warps load
constexpr int CONSUMERS = 256;
constexpr int BLOCK_THREADS = CONSUMERS + 128;
// 256 x 232 + 128 x 40 = 64,512 registers.
#define CONSUMER_REGISTERS 232
#define PRODUCER_REGISTERS 40

// ---- shared memory: a ring of the gate's parts, and slots of x: rows 16 bytes apart from the next power of two, so
// that the eight lanes of a load find eight different groups of banks; the last row is the gain
constexpr int LOW_AT = EXPERTS_PADDED * 16 * 2;  // a slot: the gate's 16 columns of a product, high parts, low parts
constexpr int PART_BYTES = 2 * LOW_AT;
constexpr int PART_SLOTS = 5;
constexpr int PITCH = GROUP * 4 + 16;
constexpr int X_BYTES = (TOKENS + 1) * PITCH;
constexpr int X_SLOTS = 2;

// The second operand: k along rows of 32 bytes, 16-byte chunks XORed as the swizzle of 32 bytes has them.
DEVICE u64 gate_operand(u32 at) {
  return (3ull << 62) | ((u64)(8 * 32 >> 4) << 32) | (1ull << 16) | ((at & 0x3FFFF) >> 4);
}

// sum [64][256] += a [64][16] b [256][16]^T in float16. Lane 4 g + t of warp w holds of rows 16 w + g (sum[4 j],
// sum[4 j + 1]) and 16 w + g + 8 (sum[4 j + 2], sum[4 j + 3]) the columns 8 j + 2 t and 8 j + 2 t + 1; of a, in rows
// 16 w + g (a[0], a[2]) and 16 w + g + 8 (a[1], a[3]), k from 2 t (a[0], a[1]) and from 8 + 2 t on.
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D8(i) D4(i), D4(i + 4)
DEVICE void multiply(float (&d)[128], const u32* a, u64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," 
      "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43," 
      "%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65," 
      "%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87," 
      "%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109," 
      "%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}"
      ",{%128,%129,%130,%131},%132,1,1,1,0;"
      : D8(0), D8(8), D8(16), D8(24),
      D8(32), D8(40), D8(48), D8(56),
      D8(64), D8(72), D8(80), D8(88),
      D8(96), D8(104), D8(112), D8(120)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef D8
#undef D4
