"""compute-sanitizer's racecheck on the persistent kernel, on the demo's shape: it finds nothing.

The tool counts an mbarrier arrival for the arriving thread's own accesses alone, although a release is cumulative: a
ring whose warps send lane 0 is right, and a race to the tool. So every thread of the kernel arrives for itself
(kernels/cuda/ring.cuh). Small kernels show that this is what the tool does, and that it sees a missing wait.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saddle.kernels import nvrtc, target

ROOT = Path(__file__).resolve().parents[2]
TOOL = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
NOT_HERE = (
    "NO GPU" if not torch.cuda.is_available()
    else "no compute-sanitizer" if TOOL is None
    else None if target.detect().has_persistent_path else "the GPU is not of sm_90"
)  # fmt: skip
pytestmark = pytest.mark.skipif(NOT_HERE is not None, reason=f"NOT TESTED: {NOT_HERE}")

# A ring of two slots between one producer thread and 12 warps, as ring.cuh.
RING = r"""
#define DEVICE __device__ __forceinline__
typedef unsigned int u32;
typedef unsigned long long u64;
DEVICE u32 at(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void init(u64* b, u32 n) { asm volatile("mbarrier.init.shared.b64 [%0],%1;" ::"r"(at(b)), "r"(n) : "memory"); }
DEVICE void arrive(u64* b) { asm volatile("mbarrier.arrive.shared.b64 _,[%0];" ::"r"(at(b)) : "memory"); }
// A producer that does not wait may be two rounds ahead, where a parity says nothing: who waits for it then gives up.
DEVICE void wait(u64* b, u32 parity) {
  u32 done;
  int tries = 0;
  do asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p,[%1],%2; selp.u32 %0,1,0,p;}"
                  : "=r"(done) : "r"(at(b)), "r"(parity) : "memory");
  while (!done && (WAITS || ++tries < 1000));
}
__shared__ u64 full[2], empty[2];
__shared__ int code[2];
extern "C" __global__ void ring(int* out, int turns) {
  const int thread = threadIdx.x, lane = thread & 31;
  if (thread == 0) {
    for (int i = 0; i < 2; i++) init(&full[i], 1), init(&empty[i], EVERY_THREAD ? 384 : 12);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  int total = 0;
  for (int i = 0; i < turns; i++) {
    const int slot = i & 1, parity = (i >> 1) & 1;
    if (thread == 384) {
      if (WAITS) wait(&empty[slot], parity ^ 1);
      code[slot] = i;
      arrive(&full[slot]);
    } else if (thread < 384) {
      wait(&full[slot], parity);
      total += code[slot];
      __syncwarp();
      if (EVERY_THREAD || lane == 0) arrive(&empty[slot]);
    }
  }
  if (thread < 384) out[thread] = total;
}
"""


class RingParams(ctypes.Structure):
    _fields_ = [("out", ctypes.c_void_p), ("turns", ctypes.c_int)]


def run_ring(every_thread: bool, waits: bool) -> None:
    """In the checked process."""
    defines = [f"-DEVERY_THREAD={int(every_thread)}", f"-DWAITS={int(waits)}"]
    cubin = nvrtc.compile_cubin("ring.cu", {"ring.cu": RING}, ["--gpu-architecture=sm_90a", "--std=c++17", *defines])
    out, module, function = torch.zeros(384, dtype=torch.int32, device="cuda"), ctypes.c_void_p(), ctypes.c_void_p()
    driver = nvrtc.driver()
    assert driver.cuModuleLoadData(ctypes.byref(module), cubin) == 0
    assert driver.cuModuleGetFunction(ctypes.byref(function), module, b"ring") == 0
    parts = (ctypes.c_void_p(out.data_ptr()), ctypes.c_int(9))
    pointers = (ctypes.c_void_p * 2)(*(ctypes.addressof(part) for part in parts))
    assert driver.cuLaunchKernel(function, 1, 1, 1, 416, 1, 1, 0, None, pointers, None) == 0
    torch.cuda.synchronize()
    assert not waits or out.tolist() == [36] * 384


def run_kernel(kv_format: int, rows: list[int]) -> None:
    """In the checked process: steps of the persistent kernel, compared with the reference."""
    from saddle.kernels import persistent
    from tests.gpu import test_persistent as tests

    options = persistent.compile_options
    persistent.compile_options = lambda *args: [*options(*args), "-lineinfo"]
    kernel, model, kv = tests.demo_kernel(100, kv_format)
    for count in rows:
        tests.check_demo(kernel, model, kv, count, tests.LIMITS["fp8" if kv_format else "bf16"])


def run_prompts(kind: str) -> None:
    """In the checked process: attention of prompts, compared with the reference; blocks of threads with many tiles."""
    from saddle.kernels import paged_kv, prompt_attention, quant
    from tests.support import paged_attention as support

    case = support.make_case([300, 40, 200], [170, 40, 1], heads=12, kv_heads=2, kind=kind, device="cuda")
    expected = support.reference(case)
    q, k, v = support.split(case)
    paged_kv.write_tokens(case.kv, case.slots, k, v)
    q = (q * (paged_kv.HEAD_DIM**-0.5 * 1.4426950408889634)).flatten(1).bfloat16()  # to base 2
    out = quant.allocate(case.num_tokens, 12 * 128, torch.bfloat16, "cuda")
    kernel = prompt_attention.PromptAttention(case.kv, 12, target.detect())
    kernel.num_blocks = 3
    for _ in range(2):
        out.data.fill_(float("nan"))
        kernel.attend(q, case.kv, case.block_tables, case.row_ids, case.query_starts, case.context_lens, 0, 3, out)
        assert support.relative_error(out.data, expected) < (0.05 if kind == "fp8" else 5e-3)


def run_products(kind: str) -> None:
    """In the checked process: products of many tokens, compared with the reference; blocks with many tiles."""
    sys.path.insert(0, str(Path(__file__).parent))
    import expert_support
    import packed_support

    from saddle.kernels import experts, grouped, quant, tiles

    torch.manual_seed(9)
    chip, (num_experts, top_k, width, inner) = target.detect(), expert_support.SHAPES["demo"]
    # 540 tokens: an expert has about 135 pairs, some less than a tile, some a few more, some a second one.
    size, columns = (300, 1024) if kind == "dense" else (540, width)
    h = packed_support.activation(torch.randn(size, columns, device="cuda"), chip)
    if kind == "dense":
        w = packed_support.fp8_weight(512, 1024)
        linear = grouped.GroupedLinear(w, chip)
        linear.kernels.num_blocks = 3
        out = packed_support.poisoned(size, 512)
        for _ in range(2):
            linear(h, w, out)
        wanted = quant.dequantise(h) @ tiles.dequantise(w).T
    else:
        w13 = packed_support.fp8_weight(num_experts, 2 * inner, width, interleaved=True)
        w2 = packed_support.fp8_weight(num_experts, width, inner)
        work = expert_support.routed(size, num_experts, top_k, width)
        kernels = grouped.GroupedExperts(w13, w2, top_k, chip)
        kernels.kernels.num_blocks = 3
        act = quant.allocate(size * top_k, inner, h.data.dtype, "cuda")
        out = packed_support.poisoned(size * top_k, width, dtype=torch.bfloat16)
        for _ in range(2):
            experts.experts(h, w13, w2, work, act, out, chip, 0, kernels)
        values = tiles.dequantise(w13), tiles.dequantise(w2)
        wanted = expert_support.wanted_rows(quant.dequantise(h), work, *values, chip)
    assert packed_support.error(out, wanted) < expert_support.ERROR["demo"]


def hazards(call: str, kernel: str, tool: str = "racecheck") -> tuple[int, str]:
    """Number of hazards (memcheck: errors) that the tool displays for a call of this module, and all that it prints."""
    code = f"from tests.gpu import test_racecheck; test_racecheck.{call}; print('RAN')"
    options = ["--racecheck-report", "analysis"] if tool == "racecheck" else []
    command = [str(TOOL), "--tool", tool, *options, "--print-limit", "200",
               "--show-backtrace", "no", "--kernel-name", f"kns={kernel}", sys.executable, "-c", code]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    text = done.stdout + done.stderr
    summary = text.partition("RACECHECK SUMMARY: " if tool == "racecheck" else "ERROR SUMMARY: ")[2].split()
    assert "RAN" in done.stdout and summary, text[-3000:]
    return int(summary[0]), text


@pytest.mark.parametrize(
    ("every_thread", "waits", "found"),
    [(True, True, False), (False, True, True), (True, False, True)],
    ids=["right", "right_but_lane_0_arrives", "missing_wait"],
)
def test_what_the_tool_sees_in_a_ring(every_thread: bool, waits: bool, found: bool) -> None:
    count, text = hazards(f"run_ring({every_thread}, {waits})", "ring")
    assert (count > 0) == found, text


@pytest.mark.parametrize(
    ("kv_format", "rows"), [(0, [1, 2, 3, 8]), (0, [11, 16]), (2, [3, 12])], ids=["bf16", "bf16_many", "fp8_dynamic"]
)
def test_no_hazards(kv_format: int, rows: list[int]) -> None:
    count, text = hazards(f"run_kernel({kv_format}, {rows})", "persistent")
    print(text[-2000:])
    assert count == 0, text[:6000]


@pytest.mark.parametrize("tool", ["racecheck", "memcheck"])
@pytest.mark.parametrize("kind", ["grouped", "dense"])
def test_products_of_many_tokens(kind: str, tool: str) -> None:
    count, text = hazards(f"run_products({kind!r})", kind, tool)
    assert count == 0, text[:6000]


@pytest.mark.parametrize("tool", ["racecheck", "memcheck"])
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_attention_of_prompts(kind: str, tool: str) -> None:
    count, text = hazards(f"run_prompts({kind!r})", "prefill", tool)
    assert count == 0, text[:6000]
