"""What a GPU can do, decided once before anything is compiled: tiles and paths are chosen from a `Target` alone.

Every field is a fact of the device or of its family; the decisions derived from them say their reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

# Shared memory that one block may use, bytes (CUDA programming guide, table of compute capabilities; AMD ISA guides).
SHARED_BYTES = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_87": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_103": 227 * 1024,
    "sm_110": 227 * 1024,
    "sm_120": 99 * 1024,
    "sm_121": 99 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}
# Multiprocessors of a typical card, for compilation without one.
TYPICAL_SMS = {
    "sm_80": 108,
    "sm_86": 84,
    "sm_89": 128,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
    "gfx942": 304,
    "gfx950": 256,
}
# The persistent kernel keeps a whole step's traffic in flight from this many multiprocessors on.
PERSISTENT_SMS = 128


@dataclass(frozen=True, slots=True)
class Target:
    """One GPU.

    name            of the card
    arch            "sm_90", "gfx942", ...
    num_sms         multiprocessors (compute units)
    shared_bytes    shared memory that one block may use
    blocks          measured tiles by `tile_dot.block_key`, where this card was tuned (`tuning`)
    """

    name: str
    arch: str
    num_sms: int
    shared_bytes: int
    blocks: Mapping[str, tuple[int, int, int, int, int]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_cuda(self) -> bool:
        return self.arch.startswith("sm_")

    @property
    def capability(self) -> int:
        """90 for sm_90; 0 where there is no such number."""
        return int(self.arch.removeprefix("sm_")) if self.is_cuda else 0

    @property
    def has_triton_path(self) -> bool:
        """Whether the Triton kernels run here; below sm_80 there is no bf16."""
        return self.capability >= 80 or self.arch in ("gfx942", "gfx950")

    @property
    def has_fp8_dot(self) -> bool:
        """Whether the matrix units take FP8 (W8A8); otherwise weights become bf16 in registers (W8A16)."""
        return self.capability >= 89 or self.arch in ("gfx942", "gfx950")

    @property
    def is_fnuz(self) -> bool:
        """Whether the matrix units' FP8 is E4M3FNUZ."""
        return self.arch == "gfx942"

    @property
    def has_pdl(self) -> bool:
        """Programmatic dependent launch."""
        return self.capability >= 90

    @property
    def has_persistent_path(self) -> bool:
        return self.capability == 90 and self.num_sms >= PERSISTENT_SMS

    @property
    def fp8_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fnuz if self.is_fnuz else torch.float8_e4m3fn

    def decisions(self) -> list[str]:
        """One line for each decision, with its reason."""
        if not self.has_triton_path:
            return [f"{self.name} ({self.arch}): plain torch, because the kernels need sm_80 or newer (bf16)."]
        fp8 = "FP8 activations on FP8 matrix units (W8A8)"
        if self.is_fnuz:
            fp8 += ", numbers as E4M3FNUZ, which this chip computes in"
        if not self.has_fp8_dot:
            fp8 = "FP8 weights become bf16 in registers (W8A16), because the matrix units have no FP8"
        persistent = "persistent kernel available for few rows"
        if not self.has_persistent_path:
            why = f"{self.num_sms} multiprocessors, {PERSISTENT_SMS} needed" if self.capability == 90 else "needs sm_90"
            persistent = f"no persistent kernel ({why})"
        shared = f"{self.shared_bytes // 1024} KiB of shared memory a block"
        return [f"{self.name} ({self.arch}, {self.num_sms} SMs, {shared}): {fp8}.", f"Decoding: {persistent}."]


def of_arch(arch: str, num_sms: int | None = None) -> Target:
    """A typical card of a family, for compilation without one.

    Raises:
        ValueError: unknown family.
    """
    if arch not in SHARED_BYTES:
        raise ValueError(f"Unknown GPU family {arch!r}; known are {', '.join(SHARED_BYTES)}.")
    return Target(arch, arch, num_sms or TYPICAL_SMS.get(arch, 128), SHARED_BYTES[arch])


def detect(device: torch.device | str | int = 0) -> Target:
    """The GPU that torch sees."""
    properties = torch.cuda.get_device_properties(device)
    amd = getattr(properties, "gcnArchName", "").split(":")[0] if torch.version.hip else ""
    arch = amd or f"sm_{properties.major}{properties.minor}"
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or SHARED_BYTES.get(arch, 48 * 1024)
    return Target(properties.name, arch, properties.multi_processor_count, int(shared))
