"""Runs Triton kernels on the CPU: Triton reads TRITON_INTERPRET when a kernel is defined, so it takes a process of
its own, in which pytest runs the tests of one file that are marked with `in_interpreter`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in a process of its own, see interpreted.py")
outside = pytest.mark.skipif(IS_INTERPRETED, reason="starts the interpreter")


def run_file(path: str) -> None:
    """Run the interpreted tests of a file; fails with what they printed, and if there were none."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", path]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
