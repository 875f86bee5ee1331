"""A launch of a Triton kernel that costs the host a third of Triton's own.

That one looks for the compiled kernel anew each time: it classifies every argument, constants included, and makes a
key of it all, which takes longer than many kernels run. Here constants count by their values, and other arguments by
classes at least as fine as Triton's (dtype, alignment, special integers). What was launched before goes to its
compiled kernel directly; a combination that is new goes through Triton, which finds or compiles the kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from saddle.kernels import ahead

# A product and the sum behind it in one rounding, as all kernels were measured. From Triton 3.10 on it is off where
# nobody asks for it.
if hasattr(triton.knobs.language, "default_fp_fusion"):
    triton.knobs.language.default_fp_fusion = True

ALIGNMENT = 16  # Triton compiles other kernels for pointers and for integers that are no multiples of it
I32_LIMIT = 1 << 31

_Compiled = tuple[Any, Any, Any, tuple[Any, ...]]  # how it is run, its handle, what goes with it, its constants
_compiled: dict[tuple[Any, ...], _Compiled] = {}
_num_inputs: dict[int, int] = {}  # by id of a kernel: these live as long as their modules


def enqueue(kernel: Any, grid: tuple[int, int, int], *args: Any, **constants: Any) -> None:
    """Launch on the current stream of the tensors' device, which is the current one.

    Args:
        kernel: a `triton.jit` function whose constants come last.
        args: in order, the first a tensor; constants may follow the others.
        constants: further ones by name, and options (`num_warps`, `launch_pdl`, ..).
    """
    device = args[0].get_device()
    if device < 0 and not ahead.only_compiles():  # interpreted, or compiled without a GPU
        kernel[grid](*args, **constants)
        return
    num_inputs = _num_inputs.get(id(kernel)) or _count(kernel)
    inputs, kinds = _classify(args[:num_inputs])
    key = (id(kernel), device, *kinds, *args[num_inputs:], *constants, *constants.values())
    if ahead.only_compiles():
        ahead.ask(key, lambda: kernel.warmup(*args, grid=grid, **constants), device)
        return
    found = _compiled.get(key)
    if found is not None and not triton.knobs.runtime.launch_enter_hook.calls:  # such hooks are told by Triton alone
        run, function, metadata, tail = found
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(*grid, stream, function, metadata, None, None, None, *inputs, *tail)
        return
    compiled = kernel[grid](*args, **constants)
    tail = (*args[num_inputs:], *(constants[name] for name in kernel.arg_names[len(args) :]))
    _compiled[key] = compiled.run, compiled.function, compiled.packed_metadata, tail


def _classify(args: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """Arguments with addresses instead of tensors, and the class of each."""
    inputs: list[Any] = []
    kinds: list[Any] = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            pointer = arg.data_ptr()
            inputs.append(pointer)
            kinds.append((arg.dtype, pointer % ALIGNMENT) if pointer % ALIGNMENT else arg.dtype)
        else:
            inputs.append(arg)
            kinds.append(_class_of(arg) if type(arg) is int else type(arg))
    return inputs, kinds


def _class_of(number: int) -> int:
    """1, a multiple of 16 or any other integer; of 32 bits or more."""
    known = 1 if number == 1 else 0 if number % ALIGNMENT else ALIGNMENT
    return known if -I32_LIMIT <= number < I32_LIMIT else known + 2


def _count(kernel: Any) -> int:
    """Arguments of a kernel that are no constants.

    Raises:
        ValueError: one of them comes behind a constant.
    """
    constant = [param.is_constexpr for param in kernel.params]
    count = constant.index(True) if True in constant else len(constant)
    if not all(constant[count:]):
        raise ValueError(f"{kernel.__name__} has other arguments behind its constants.")
    _num_inputs[id(kernel)] = count
    return count
