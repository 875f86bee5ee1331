"""Two workers with two threads of torch each wait for one another on two cores: one thread a process.

A comparison of 0.5 s took 60 s that way. Set before anything loads torch; processes that tests start inherit it.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
