"""Makes Triton's interpreter exact, for tests of whole models on a CPU.

Up to Triton 3.9 it loses the carry when rounding a float to a narrower type overflows the mantissa (7.8 becomes 4 in
E4M3), and computes with the bit patterns of bfloat16 numbers instead of their values. Both are done by torch here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

DTYPES = {
    tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn, tl.float8e4b8: torch.float8_e4m3fnuz, tl.float8e5: torch.float8_e5m2,
}  # fmt: skip
ARITHMETIC = (np.add, np.subtract, np.multiply, np.divide)


def repair() -> None:
    """Replace the faulty functions; only in a process with TRITON_INTERPRET=1."""
    original = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source not in DTYPES or target not in DTYPES:
            return original(values, source, target, rounding)
        return _bits(_tensor(values, DTYPES[source]).to(torch.float32).to(DTYPES[target])).reshape(values.shape)

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        wide = [_tensor(one.data, DTYPES[one.dtype.scalar]).to(torch.float32).reshape(one.data.shape) for one in (a, b)]
        product = torch.matmul(*wide).numpy().astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter._convert_float = convert
    original_dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        floats = a.dtype.scalar in DTYPES and b.dtype.scalar in DTYPES
        return dot(self, a, b, d, *rest) if floats else original_dot(self, a, b, d, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot
    original_binary = interpreter.InterpreterBuilder.binary_op

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar != tl.bfloat16 or op not in ARITHMETIC:
            return original_binary(self, lhs, rhs, op)
        wide = [_tensor(one.data, torch.bfloat16).to(torch.float32).reshape(one.data.shape) for one in (lhs, rhs)]
        found = torch.from_numpy(op(wide[0].numpy(), wide[1].numpy())).to(torch.bfloat16)
        return interpreter.TensorHandle(_bits(found).reshape(found.shape), tl.bfloat16)

    interpreter.InterpreterBuilder.binary_op = binary_op


def _tensor(values: Any, dtype: torch.dtype) -> torch.Tensor:
    """A numpy array of values or of bit patterns as a tensor of the dtype."""
    raw = torch.from_numpy(np.ascontiguousarray(values).reshape(-1).view(np.uint8).copy())
    return raw.view(dtype)


def _bits(values: torch.Tensor) -> Any:
    """Bit patterns as unsigned integers, the form that the interpreter keeps narrow floats in."""
    raw = values.contiguous().view(torch.uint8).numpy()
    return raw.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[values.element_size()])
