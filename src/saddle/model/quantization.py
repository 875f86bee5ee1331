"""`quantization_config`: which projection weights of a checkpoint are quantised, and how. No torch.

    fp8     quant_method "fp8": E4M3 with one float32 scale a block of 128 x 128, as MiniMax publishes the model
    nvfp4   quant_method "modelopt", quant_algo "NVFP4": E2M1, an E4M3 scale per 16 columns, a float32 factor
    nvfp4-packed, int4-packed   quant_method "compressed-tensors", format "nvfp4-pack-quantized" (the same numbers,
            the factor stored as its reciprocal) or "pack-quantized" (integers, a bf16 scale per 32 or 128 columns)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

KEY = "quantization_config"
Require = Callable[[bool, str, str, object], None]  # holds, key, what would be right, what there is
NVFP4_GROUP = 16
INT4_GROUPS = (32, 128)


@dataclass(frozen=True, slots=True)
class Quantization:
    """How projections are stored, and which are.

    block   rows x columns of weight that share one scale
    ignored   modules that stay unquantised: parts of dotted names, globs ("*") or regular expressions ("re:")
    kind    "fp8", "nvfp4", "nvfp4-packed" or "int4-packed"
    targets   the same patterns, of modules that are quantised; empty: all projections
    """

    block: tuple[int, int]
    ignored: tuple[str, ...] = ()
    kind: str = "fp8"
    targets: tuple[str, ...] = ()

    def covers(self, module: str) -> bool:
        """Whether the weight of a projection (dotted name, without `.weight`) is quantised."""
        wanted = not self.targets or any(_matches(pattern, module) for pattern in self.targets)
        return wanted and not any(_matches(pattern, module) for pattern in self.ignored)

    def bytes_of(self, num_weights: int) -> float:
        """Bytes that so many quantised weights take with their scales."""
        rows, columns = self.block
        number, scale = {"fp8": (1.0, 4), "int4-packed": (0.5, 2)}.get(self.kind, (0.5, 1))
        return num_weights * (number + scale / (rows * columns))


def _matches(pattern: str, module: str) -> bool:
    # Some tools call the experts' module by the name that another engine gives it.
    for name in (module, module.replace("block_sparse_moe", "mlp")):
        if pattern.startswith("re:"):
            if re.match(pattern[3:], name):
                return True
        elif "*" in pattern:
            if fnmatchcase(name, pattern):
                return True
        elif f".{pattern}." in f".{name}.":
            return True
    return False


def parse(raw: Mapping[str, Any], require: Require) -> Quantization:
    """Read the section.

    Args:
        require: raises, naming the key, what would be right and what there is, where its first argument is false.
    """
    method = raw.get("quant_method")
    known = '"fp8", "modelopt" (NVFP4) or "compressed-tensors" (4-bit), or quantization_config absent'
    require(method in ("fp8", "modelopt", "compressed-tensors"), f"{KEY}.quant_method", known, method)
    if method == "modelopt":
        algorithm = raw.get("quant_algo")
        require(algorithm == "NVFP4", f"{KEY}.quant_algo", '"NVFP4"', algorithm)
        return Quantization((1, NVFP4_GROUP), tuple(raw.get("ignore") or raw.get("exclude_modules") or ()), "nvfp4")
    return _fp8(raw, require) if method == "fp8" else _packed(raw, require)


def _fp8(raw: Mapping[str, Any], require: Require) -> Quantization:
    fmt, scheme = raw.get("fmt", "float8_e4m3fn"), raw.get("activation_scheme", "dynamic")
    require(fmt in ("float8_e4m3fn", "e4m3"), f"{KEY}.fmt", '"float8_e4m3fn"', fmt)
    require(scheme == "dynamic", f"{KEY}.activation_scheme", '"dynamic"', scheme)
    block = raw.get("weight_block_size")
    right = "two positive integers, such as [128, 128]"
    holds = isinstance(block, (list, tuple)) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    require(holds, f"{KEY}.weight_block_size", right, block)
    rows, columns = block or (0, 0)
    return Quantization((rows, columns), tuple(raw.get("modules_to_not_convert") or raw.get("ignored_layers") or ()))


def _packed(raw: Mapping[str, Any], require: Require) -> Quantization:
    """compressed-tensors: one group of weights, of four bits."""
    groups = list((raw.get("config_groups") or {}).values())
    require(len(groups) == 1, f"{KEY}.config_groups", "one group: all quantised weights alike", len(groups))
    weights, targets = groups[0].get("weights") or {}, groups[0].get("targets") or ["Linear"]
    fmt = groups[0].get("format") or raw.get("format")
    right = '"nvfp4-pack-quantized" or "pack-quantized"'
    require(fmt in ("nvfp4-pack-quantized", "pack-quantized"), f"{KEY}.format", right, fmt)
    integers = fmt == "pack-quantized"
    at = f"{KEY}.config_groups weights"
    for name, allowed in (
        ("num_bits", (4,)),
        ("type", ("int",) if integers else ("float",)),
        ("symmetric", (True, None)),
        ("group_size", INT4_GROUPS if integers else (NVFP4_GROUP,)),
    ):
        require(weights.get(name) in allowed, f"{at} {name}", " or ".join(map(str, allowed)), weights.get(name))
    patterns = () if "Linear" in targets else tuple(targets)
    kind = "int4-packed" if integers else "nvfp4-packed"
    return Quantization((1, weights["group_size"]), tuple(raw.get("ignore") or ()), kind, patterns)
