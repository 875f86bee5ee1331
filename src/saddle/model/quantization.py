"""`quantization_config`: which projection weights of a checkpoint are quantised, and how. No torch.

    fp8     quant_method "fp8": E4M3 with one float32 scale a block of 128 x 128, as MiniMax publishes the model
    nvfp4   quant_method "modelopt", quant_algo "NVFP4": E2M1, an E4M3 scale per 16 columns, a float32 factor
    nvfp4-packed, int4-packed   quant_method "compressed-tensors", format "nvfp4-pack-quantized" (the same numbers,
            the factor stored as its reciprocal) or "pack-quantized" (integers, a bf16 scale per 32 or 128 columns)
    fp8-packed   the same, format "float-quantized" in blocks: attention beside 4-bit experts ("mixed-precision")
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import translate
from functools import lru_cache
from typing import Any

KEY = "quantization_config"
Require = Callable[[bool, str, str, object], None]  # holds, key, what would be right, what there is
NVFP4_GROUP = 16
INT4_GROUPS = (32, 128)
# Of a number and of a scale.
BYTES = {"fp8": (1.0, 4), "fp8-packed": (1.0, 4), "nvfp4": (0.5, 1), "nvfp4-packed": (0.5, 1), "int4-packed": (0.5, 2)}
KINDS = {"nvfp4-pack-quantized": "nvfp4-packed", "pack-quantized": "int4-packed", "float-quantized": "fp8-packed"}


@dataclass(frozen=True, slots=True)
class Quantization:
    """How projections are stored, and which are.

    block   rows x columns of weight that share one scale
    ignored   modules that stay unquantised: parts of dotted names, globs ("*") or regular expressions ("re:")
    kind    "fp8", "fp8-packed", "nvfp4", "nvfp4-packed" or "int4-packed"
    targets   the same patterns, of modules that are quantised; empty: all projections
    others    further groups of modules, stored in other ways
    """

    block: tuple[int, int]
    ignored: tuple[str, ...] = ()
    kind: str = "fp8"
    targets: tuple[str, ...] = ()
    others: tuple[Quantization, ...] = ()

    def of(self, module: str) -> Quantization | None:
        """How the weight of a projection (dotted name, without `.weight`) is quantised; None: it is not."""
        if _matches(self.ignored, module):
            return None
        groups = (self, *self.others)
        return next((group for group in groups if not group.targets or _matches(group.targets, module)), None)

    def covers(self, module: str) -> bool:
        """Whether the weight of a projection is quantised."""
        return self.of(module) is not None

    @property
    def unit(self) -> int:
        """What the widths of quantised weights must be multiples of: tiles of 4-bit numbers are 128 columns wide."""
        groups = (self, *self.others)
        return max(max(group.block) if group.kind.startswith("fp8") else 128 for group in groups)

    def bytes_of(self, num_weights: int) -> float:
        """Bytes that so many quantised weights take with their scales."""
        rows, columns = self.block
        number, scale = BYTES[self.kind]
        return num_weights * (number + scale / (rows * columns))


def _matches(patterns: tuple[str, ...], module: str) -> bool:
    # Some tools call the experts' module by the name that another engine gives it.
    names = {module, module.replace("block_sparse_moe", "mlp")}
    return any(pattern.match(name) for pattern in _compiled(patterns) for name in names)


@lru_cache
def _compiled(patterns: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    """Names and globs as one expression (there may be hundreds, and 48,000 modules to match), and the others."""
    found = [re.compile(pattern[3:]) for pattern in patterns if pattern.startswith("re:")]
    plain = [translate(pattern) if "*" in pattern else rf"(?:.*\.)?{re.escape(pattern)}(?:\..*)?$"
             for pattern in patterns if not pattern.startswith("re:")]  # fmt: skip
    return (*found, re.compile("|".join(plain))) if plain else tuple(found)


def _patterns(found: object, name: str, require: Require) -> tuple[str, ...]:
    """Names of modules from the section."""
    holds = found is None or (isinstance(found, (list, tuple)) and all(isinstance(one, str) for one in found))
    require(holds, f"{KEY}.{name}", "a list of module names, globs or regular expressions", found)
    patterns = tuple(found or ())  # type: ignore[arg-type, var-annotated]
    for pattern in patterns:
        try:
            _compiled((pattern,))
        except re.error as error:
            require(False, f"{KEY}.{name}", f"made of expressions that compile ({error})", pattern)
    return patterns


def parse(raw: Mapping[str, Any], require: Require) -> Quantization:
    """Read the section.

    Args:
        require: raises, naming the key, what would be right and what there is, where its first argument is false.
    """
    if isinstance(raw.get("quantization"), Mapping):  # as in ModelOpt's own file
        raw = {**raw, **raw["quantization"]}
    method = raw.get("quant_method") or ("modelopt" if "quant_algo" in raw else None)
    known = '"fp8", "modelopt" (NVFP4) or "compressed-tensors" (4-bit), or quantization_config absent'
    require(method in ("fp8", "modelopt", "compressed-tensors"), f"{KEY}.quant_method", known, method)
    if method == "modelopt":
        algorithm = raw.get("quant_algo")
        require(algorithm == "NVFP4", f"{KEY}.quant_algo", '"NVFP4"', algorithm)
        group = raw.get("group_size")
        require(group in (None, NVFP4_GROUP), f"{KEY}.group_size", str(NVFP4_GROUP), group)
        name = "ignore" if raw.get("ignore") else "exclude_modules"
        return Quantization((1, NVFP4_GROUP), _patterns(raw.get(name), name, require), "nvfp4")
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
    name = "modules_to_not_convert" if raw.get("modules_to_not_convert") else "ignored_layers"
    return Quantization((rows, columns), _patterns(raw.get(name), name, require))


def _packed(raw: Mapping[str, Any], require: Require) -> Quantization:
    """compressed-tensors: groups of modules, four bits a weight in one of them at least."""
    groups = raw.get("config_groups")
    holds = isinstance(groups, Mapping) and bool(groups) and all(isinstance(one, Mapping) for one in groups.values())
    require(holds, f"{KEY}.config_groups", "an object of at least one group of modules", groups)
    ignored = _patterns(raw.get("ignore"), "ignore", require)
    found = [_group(raw, name, group, ignored, require) for name, group in dict(groups or {}).items()]
    # What names its modules goes before what takes all that is left.
    found.sort(key=lambda group: not group.targets)
    everything = sum(not group.targets for group in found)
    require(everything <= 1, f"{KEY}.config_groups", 'one group with the target "Linear" at most', everything)
    four = any(group.kind != "fp8-packed" for group in found)
    require(four, f"{KEY}.config_groups", "4-bit weights in one group at least", "FP8 alone")
    return replace(found[0], others=tuple(found[1:]))


def _group(
    raw: Mapping[str, Any], name: str, group: Mapping[str, Any], ignored: tuple[str, ...], require: Require
) -> Quantization:
    """One group of modules."""
    weights = group.get("weights") or {}
    targets = _patterns(group.get("targets") or ["Linear"], f"config_groups {name} targets", require)
    fmt = group.get("format") or raw.get("format")
    require(fmt in KINDS, f"{KEY}.format", " or ".join(f'"{known}"' for known in KINDS), fmt)
    kind = KINDS[str(fmt)]
    group_size = {"nvfp4-packed": (NVFP4_GROUP,), "int4-packed": INT4_GROUPS, "fp8-packed": (None, 128)}[kind]
    for key, allowed in (
        ("num_bits", (8,) if kind == "fp8-packed" else (4,)),
        ("type", ("int",) if kind == "int4-packed" else ("float",)),
        ("symmetric", (True, None)),
        ("actorder", (None, False, "weight", "static")),  # these do not reorder what is stored
        ("group_size", group_size),
    ):
        right = " or ".join("absent" if value is None else str(value) for value in allowed)
        require(weights.get(key) in allowed, f"{KEY}.config_groups {name} weights {key}", right, weights.get(key))
    block = (1, int(weights.get("group_size") or 0))
    if kind == "fp8-packed":
        structure = weights.get("block_structure")
        require(structure in ([128, 128], "128x128"), f"{KEY}.config_groups {name} weights block_structure",
                "[128, 128]", structure)  # fmt: skip
        block = (128, 128)
    return Quantization(block, ignored, kind, () if "Linear" in targets else targets)
