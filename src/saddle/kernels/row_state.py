"""What a GPU keeps of each row in one table of int32 numbers, so that a request is admitted by one small copy.

`[num_rows, ROW_WIDTH]` int32; floats are stored as their bits. Kernels read the columns by these names.
"""

from __future__ import annotations

import triton.language as tl

ROW_WIDTH = 16

NUM_COMPUTED = tl.constexpr(0)  # tokens whose KV is written; the only column that kernels write
KEY_FIRST = tl.constexpr(1)  # the two keys of the random numbers, uint32 bits
KEY_SECOND = tl.constexpr(2)
TOP_K = tl.constexpr(3)  # 0: off
TEMPERATURE = tl.constexpr(4)  # float bits; 0: greedy
TOP_P = tl.constexpr(5)  # float bits; 1: off
MIN_P = tl.constexpr(6)  # float bits; 0: off
REPETITION = tl.constexpr(7)  # float bits; 1: off
PRESENCE = tl.constexpr(8)  # float bits; 0: off
FREQUENCY = tl.constexpr(9)  # float bits; 0: off
