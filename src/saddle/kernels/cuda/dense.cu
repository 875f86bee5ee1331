// One product of many tokens' FP8 rows and an FP8 weight: the experts' machinery (grouped.cu) with one expert that has
// all rows.
#include "grouped_run.cuh"

constexpr int COLUMNS = SADDLE_COLUMNS;
constexpr int ALL_ROWS = SADDLE_ROWS;
typedef Shape<COLUMNS, ALL_ROWS, 1, 1, PLAIN_BF16> Bf16;
typedef Shape<COLUMNS, ALL_ROWS, 1, 1, PLAIN_F32> F32;
typedef Shape<COLUMNS, ALL_ROWS, 1, 1, ADDED_F32> Added;

KERNEL(dense_bf16, Bf16)
KERNEL(dense_f32, F32)
KERNEL(dense_added, Added)
#ifdef SADDLE_TURNED  // of weights whose first rows are queries
typedef Shape<COLUMNS, ALL_ROWS, 1, 1, TURNED_BF16> Turned;
KERNEL(dense_turned, Turned)
#endif
