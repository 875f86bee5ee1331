// The experts' two products over many tokens: every block takes tiles of one expert until none is left.
//
//   grouped_work.cuh      which tiles there are
//   grouped_producer.cuh  weights and gathered rows into the ring
//   grouped_product.cuh   wgmma, scales
//   grouped_epilogue.cuh  SwiGLU and FP8 (up), the routing's weights (down)
//   grouped_run.cuh       a block's life
//
// Sizes and their reasons: grouped_shapes.cuh. What was measured: docs/LOG.md.
#include "grouped_run.cuh"

constexpr int HIDDEN = SADDLE_HIDDEN;
constexpr int INTERMEDIATE = SADDLE_INTERMEDIATE;
constexpr int NUM_EXPERTS = SADDLE_NUM_EXPERTS;
constexpr int TOP_K = SADDLE_TOP_K;
typedef Shape<HIDDEN, 2 * INTERMEDIATE, NUM_EXPERTS, TOP_K, SWIGLU_FP8> Up;
typedef Shape<INTERMEDIATE, HIDDEN, NUM_EXPERTS, 1, SHARES_BF16> Down;

KERNEL(grouped_up, Up)
KERNEL(grouped_down, Down)
