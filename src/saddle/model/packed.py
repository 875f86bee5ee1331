"""The weights of the fused model: one resident layout for every kernel, filled from a checkpoint or at random.

A checkpoint in FP8 blocks or in 4 bits keeps its numbers and scales; they are cut into tiles (`kernels/tiles.py`) as
they are, so nothing is rounded. Projections that a checkpoint stores in BF16 stay BF16, in bf16 tiles: they are not
quantised. F32 ones are rounded to bf16. Norms, router and correction bias are float32, the embedding is bf16, lm_head
bf16 tiles.

Loading uses the table of `weights.py`: each strip of rows goes to the device and is packed there, so the peak is the
loaded model plus one strip per reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from saddle.errors import StartupError
from saddle.kernels import nibbles, tiles
from saddle.kernels.tiles import Bf16Tiles, Fp8Tiles, NibbleTiles, PackedMatrix, TileFormat
from saddle.model import weights as loading
from saddle.model.config import ModelConfig
from saddle.model.files import TensorFiles
from saddle.model.formats import Fp8Block, Fp8Slice, Int4, NibbleSlice, Nvfp4, format_of
from saddle.model.weights import Layer, Place, Report, Stored
from saddle.parallel.layout import ParallelLayout, Slice, scale_granularity

MATRICES = ("qkv", "o", "w1 and w3", "w2")
# Random FP8 numbers have this part of the largest one as their standard deviation: nothing is clipped but 7 sigmas.
DUMMY_SHARE = 1 / 7
DUMMY_NUMBERS = 1 << 26  # made at once: 256 MB of float32


@dataclass(frozen=True, slots=True)
class Rows:
    """Where rows of one projection go within a packed matrix (a `weights.Sink`).

    row      first row, within the half of an interleaved matrix
    half     0 (w1) or 1 (w3) of an interleaved matrix
    expert   of a matrix with a leading dimension
    """

    matrix: PackedMatrix
    row: int = 0
    half: int | None = None
    expert: int | None = None

    def put(self, row: int, value: Stored) -> None:
        """Pack rows as stored: FP8 or 4-bit numbers with their scales, plain numbers into bf16 tiles."""
        device = self.matrix.data.device
        if isinstance(value, NibbleSlice):
            numbers, scale = value.numbers.to(device), value.scale.to(device)
            nibbles.pack_into(self.matrix, numbers, scale, value.factor, self.row + row, self.half, self.expert)
        elif isinstance(value, Fp8Slice):
            weight, scale = value.weight.to(device), value.scale.to(device)
            tiles.pack_into(self.matrix, weight, scale, self.row + row, self.half, self.expert)
        else:
            weight = value.to(device).to(torch.bfloat16)
            tiles.pack_into(self.matrix, weight, None, self.row + row, self.half, self.expert)


@dataclass(slots=True)
class PackedLayer:
    """One layer of one rank, H hidden, D head_dim, E experts, I expert width; matrices are [out, in].

    input_norm, post_norm  [H] float32
    q_norm, k_norm  [heads * D], [kv_heads * D] float32
    qkv      [(heads + 2 kv_heads) * D, H]   rows of q, k, v one after the other
    o        [H, heads * D]
    gate     [H, E] float32
    gate_bias  [E] float32
    w13      [E, 2 I, H]    interleaved: 8 rows of w1 (gate), the same 8 of w3 (up)
    w2       [E, H, I]
    kv_scales   of keys and of values in FP8 KV memory with static scales: the checkpoint's, else 1
    """

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    qkv: PackedMatrix
    o: PackedMatrix
    gate: torch.Tensor
    gate_bias: torch.Tensor
    w13: PackedMatrix
    w2: PackedMatrix
    kv_scales: tuple[float, float] = (1.0, 1.0)

    def places(self, q: int, kv: int) -> dict[str, Place]:
        """As `LayerWeights.places`."""
        found: dict[str, Place] = {"gate": self.gate.t(), "o": Rows(self.o)}
        found |= {"q": Rows(self.qkv), "k": Rows(self.qkv, q), "v": Rows(self.qkv, q + kv)}
        for name in ("input_norm", "post_norm", "q_norm", "k_norm", "gate_bias"):
            found[name] = getattr(self, name)
        return found

    def expert_places(self, expert: int) -> tuple[Place, Place, Place]:
        """As `LayerWeights.expert_places`."""
        w1, w3 = (Rows(self.w13, half=half, expert=expert) for half in (0, 1))
        return w1, Rows(self.w2, expert=expert), w3


@dataclass(slots=True)
class PackedModel:
    """All weights of one rank; embed [V, H] bf16, norm [H] float32, lm_head [V, H] in bf16 tiles."""

    embed: torch.Tensor
    layers: list[PackedLayer]
    norm: torch.Tensor
    lm_head: PackedMatrix

    def layer_places(self) -> Sequence[Layer]:
        return self.layers

    def places(self) -> dict[str, Place]:
        return {"embed": self.embed, "norm": self.norm, "lm_head": Rows(self.lm_head)}

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every resident tensor, packed or plain."""
        yield from (self.embed, self.norm, self.lm_head.data)
        for layer in self.layers:
            for entry in fields(PackedLayer):
                value = getattr(layer, entry.name)
                if isinstance(value, PackedMatrix):
                    yield value.data
                elif isinstance(value, torch.Tensor):
                    yield value

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


@dataclass(frozen=True, slots=True)
class Formats:
    """Tile formats of one layer's matrices, and lines for the start that say why."""

    qkv: TileFormat
    o: TileFormat
    w13: TileFormat
    w2: TileFormat
    lines: tuple[str, ...]


def formats(config: ModelConfig, layout: ParallelLayout, fnuz: bool = False) -> Formats:
    """How each matrix of a layer is kept.

    Raises:
        StartupError: parts of one packed matrix are stored in different formats.
    """
    prefix = "model.layers.0."
    hidden = Slice(0, config.hidden_size)
    width = layout.expert_width(config.intermediate_size)
    q = layout.query_heads(config.num_heads).scaled(config.head_dim)

    def one(columns: Slice, *modules: str) -> TileFormat:
        stored = {format_of(config, prefix + module) for module in modules}
        if len(stored) > 1:
            names = ", ".join(modules)
            raise StartupError(f"{names} are one matrix on a GPU and must be stored alike, all quantised or none.")
        [kind] = stored
        if isinstance(kind, (Nvfp4, Int4)):
            return kind.tiles
        if isinstance(kind, Fp8Block):
            return Fp8Tiles(min(scale_granularity(columns, kind.block[1]), 128), fnuz)
        return Bf16Tiles()

    expert = "block_sparse_moe.experts.0."
    found = (
        one(hidden, *(f"self_attn.{name}_proj" for name in "qkv")),
        one(q, "self_attn.o_proj"),
        one(hidden, expert + "w1", expert + "w3"),
        one(width, expert + "w2"),
    )
    lines = []
    for kind, text in ((Fp8Tiles, "FP8, the checkpoint's own bytes and scales"),
                       (NibbleTiles, "4 bits, the checkpoint's own numbers and scales, multiplied as bf16 (W4A16)"),
                       (Bf16Tiles, "bf16, these are not quantised")):  # fmt: skip
        names = [name for name, one_kind in zip(MATRICES, found, strict=True) if isinstance(one_kind, kind)]
        if names:
            lines.append(f"weight tiles: {text} ({', '.join(names)}{', lm_head' if kind is Bf16Tiles else ''})")
    return Formats(*found, tuple(lines))


def unlike(config: ModelConfig) -> str | None:
    """Which layer or expert is stored in another way than the first one, as a reason; None: they are alike."""
    expert = "block_sparse_moe.experts.{}."
    names = [f"self_attn.{name}_proj" for name in "qkvo"] + [expert + name for name in ("w1", "w2", "w3")]
    for name in names:
        first = "model.layers.0." + name.format(0)
        experts = config.num_experts if name.startswith(expert) else 1
        places = [(layer, 0) for layer in range(config.num_layers)] + [(0, number) for number in range(experts)]
        for layer, number in places:
            module = f"model.layers.{layer}." + name.format(number)
            if format_of(config, module) != format_of(config, first):
                return f"{module} is not stored as {first} is, and the GPU kernels need layers and experts alike"
    return None


def allocate(
    config: ModelConfig, layout: ParallelLayout, device: torch.device, fnuz: bool = False
) -> PackedModel:
    """Unfilled weights of one rank.

    Args:
        fnuz: the device's FP8 is E4M3FNUZ.

    Raises:
        StartupError: a width of the checkpoint does not divide into tiles.
    """
    kinds = formats(config, layout, fnuz)
    hidden, dim = config.hidden_size, config.head_dim
    q = layout.query_heads(config.num_heads).size * dim
    kv = layout.kv_heads(config.num_kv_heads).size * dim
    experts = layout.experts(config.num_experts).size
    width = layout.expert_width(config.intermediate_size).size
    vocab = layout.vocabulary(config.vocab_size).size

    def plain(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def layer() -> PackedLayer:
        return PackedLayer(
            input_norm=plain(hidden),
            post_norm=plain(hidden),
            q_norm=plain(q),
            k_norm=plain(kv),
            qkv=tiles.allocate(q + 2 * kv, hidden, kinds.qkv, device),
            o=tiles.allocate(hidden, q, kinds.o, device),
            gate=plain(hidden, config.num_experts),
            gate_bias=plain(config.num_experts),
            w13=tiles.allocate(2 * width, hidden, kinds.w13, device, (experts,), interleaved=True),
            w2=tiles.allocate(hidden, width, kinds.w2, device, (experts,)),
        )

    try:
        layers = [layer() for _ in range(config.num_layers)]
        lm_head = tiles.allocate(vocab, hidden, Bf16Tiles(), device)
    except ValueError as error:
        raise StartupError(f"The widths of this checkpoint do not fit the GPU kernels: {error}") from None
    return PackedModel(plain(vocab, hidden, dtype=torch.bfloat16), layers, plain(hidden), lm_head)


def load(
    folder: Path,
    config: ModelConfig,
    layout: ParallelLayout,
    model: PackedModel,
    report: Report,
    num_readers: int = loading.NUM_READERS,
) -> str:
    """Fill `model` from a checkpoint folder. Returns a line with size, time and rate.

    Raises:
        CheckpointError: naming the tensor or file at fault.
    """
    line = loading.load(folder, config, layout, model, report, num_readers)
    with TensorFiles(folder) as files:
        names = set(files.names)
        for number, layer in enumerate(model.layers):
            found = []
            for name in ("k", "v"):
                full = f"model.layers.{number}.self_attn.{name}_proj.{name}_scale"
                scale = files.read(full, [Slice(0, size) for size in files.shape(full)]) if full in names else None
                found.append(1.0 if scale is None else float(scale.float().max()))
            layer.kv_scales = found[0], found[1]
    return line


# ---------------------------------------------------------------------------------------------------------------
# random weights


def dummy(model: PackedModel, seed: int) -> None:
    """Random weights (`--load-format dummy`) made on the device: norms near one, matrices with standard deviation
    1 / sqrt(columns), so that activations keep their size through all layers; FP8 scales differ from block to block."""
    generator = torch.Generator(model.embed.device).manual_seed(seed)

    def normal(tensor: torch.Tensor, std: float, mean: float = 0.0) -> None:
        tensor.normal_(mean, std, generator=generator)

    normal(model.embed, 1.0)
    normal(model.norm, 0.1, 1.0)
    _fill(model.lm_head, 3.0, generator)
    for layer in model.layers:
        for norm in (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm):
            normal(norm, 0.1, 1.0)
        for matrix in (layer.qkv, layer.o, layer.w13, layer.w2):
            _fill(matrix, 1.0, generator)
        normal(layer.gate, layer.gate.shape[0] ** -0.5)
        normal(layer.gate_bias, 0.05)


def _fill(matrix: PackedMatrix, size: float, generator: torch.Generator) -> None:
    """Random values with standard deviation size / sqrt(columns). The order of tiles does not matter to them."""
    if isinstance(matrix.format, NibbleTiles):
        _fill_nibbles(matrix, size, generator)
        return
    values = matrix.values.view(-1)
    wanted = size * matrix.num_cols**-0.5
    fp8 = isinstance(matrix.format, Fp8Tiles)
    largest = float(torch.finfo(matrix.format.dtype).max)
    std = largest * DUMMY_SHARE if fp8 else wanted
    scratch = torch.empty(min(DUMMY_NUMBERS, values.numel()), dtype=torch.float32, device=values.device)
    for start in range(0, values.numel(), DUMMY_NUMBERS):
        part = values[start : start + DUMMY_NUMBERS]
        numbers = scratch[: part.numel()].normal_(0.0, std, generator=generator)
        part.copy_(numbers.clamp_(-largest, largest))  # without it the conversion to FP8 would make NaN
    if not fp8:
        return
    # One scale for each block of 128 rows, as checkpoints have them: kernels may rely on it.
    scales = tiles.scale_view(matrix)  # [.., N / 16, slots, columns, 2]
    *lead, num_tiles, slots, columns, halves = scales.shape
    rows_a_tile = tiles.TILE_ROWS // (2 if matrix.interleaved else 1)
    blocks = -(-num_tiles * rows_a_tile // 128)
    shape = (*lead, blocks, slots, columns, halves if matrix.interleaved else 1)
    drawn = torch.empty(shape, device=scales.device).normal_(0.0, 0.25, generator=generator).exp_()
    tile_block = torch.arange(num_tiles, device=scales.device) * rows_a_tile // 128
    # The mean square of exp(0.25 n) is exp(2 * 0.25^2).
    scales.copy_(drawn.index_select(len(lead), tile_block) * (wanted / std * 2.718281828459045**-0.0625))


def _fill_nibbles(matrix: PackedMatrix, size: float, generator: torch.Generator) -> None:
    """As `_fill`: every 4-bit number is as likely as the others, and scales are around one. Integers get 0 for -8: a
    mean of half a step in all rows is one direction that outgrows the others from layer to layer."""
    integers = nibbles.nibble_format(matrix).numbers == "int4"
    words = matrix.data.view(torch.int32).view(-1)
    for start in range(0, words.numel(), DUMMY_NUMBERS):
        part = words[start : start + DUMMY_NUMBERS]
        part.random_(-(1 << 31), 1 << 31, generator=generator)
        if integers:
            some = part | part >> 1
            some |= some >> 2  # the lowest of each four bits: any of them
            part |= some.bitwise_not_().bitwise_and_(0x11111111) << 3
    numbers = torch.arange(16, dtype=torch.uint8)
    if integers:
        numbers[0] = 8
    std = float(nibbles.values(numbers, nibbles.nibble_format(matrix)).square().mean().sqrt())
    scales = nibbles.scale_view(matrix)
    drawn = torch.empty(scales.shape, device=scales.device).normal_(0.0, 0.25, generator=generator).exp_()
    factor = size * matrix.num_cols**-0.5 / std * 2.718281828459045**-0.0625
    # Integers have no factor of their own: it goes into their scales.
    scales.copy_(drawn * factor if integers else drawn)
    nibbles.factor_view(matrix).fill_(1.0 if integers else factor)
