"""The loader: every tensor in its place once, on every rank; one error for each thing that can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import model_support as support
import pytest
import torch
from safetensors.torch import save_file

from saddle.errors import CheckpointError
from saddle.model import weights as w
from saddle.model.config import ModelConfig
from saddle.model.m2 import MiniMaxM2
from saddle.parallel.layout import ParallelLayout, Slice
from tests.support.checkpoint import Shape, config_json, random_tensors, save_shards, write_random_checkpoint

# Widths of one and a half scale blocks at tp 2, as M2's experts have at tp 8.
SHAPE = Shape(vocab_size=320, hidden_size=256, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=64,
              num_experts=4, num_experts_per_tok=2, intermediate_size=384)  # fmt: skip
CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=[True, False], ids=["fp8", "bf16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("weights"), SHAPE, fp8=request.param)


def load(folder: Path, layout: ParallelLayout | None = None, dtype: torch.dtype = torch.float32) -> w.ModelWeights:
    layout, config = layout or ParallelLayout(), ModelConfig.load(folder)
    found = w.allocate(config, layout, dtype, CPU)
    for tensor in found.tensors():
        tensor.fill_(float("nan"))  # what is not loaded shows
    w.load(folder, config, layout, found, lambda share, note: None)
    return found


def test_every_tensor_is_in_its_place(folder: Path) -> None:
    flat, found = support.dequantised(support.stored_tensors(folder)), load(folder)
    used = 3
    assert torch.equal(found.embed, flat["model.embed_tokens.weight"])
    assert torch.equal(found.norm, flat["model.norm.weight"])
    assert torch.equal(found.lm_head, flat["lm_head.weight"].t())
    for number, layer in enumerate(found.layers):
        get = {name.removeprefix(f"model.layers.{number}."): tensor for name, tensor in flat.items()}
        assert torch.equal(layer.input_norm, get["input_layernorm.weight"])
        assert torch.equal(layer.post_norm, get["post_attention_layernorm.weight"])
        qkv = torch.cat([get[f"self_attn.{name}_proj.weight"] for name in "qkv"])
        assert torch.equal(layer.qkv, qkv.t())
        assert torch.equal(layer.o, get["self_attn.o_proj.weight"].t())
        assert torch.equal(layer.q_norm, get["self_attn.q_norm.weight"])
        assert torch.equal(layer.k_norm, get["self_attn.k_norm.weight"])
        assert torch.equal(layer.gate, get["block_sparse_moe.gate.weight"].t())
        assert torch.equal(layer.gate_bias, get["block_sparse_moe.e_score_correction_bias"])
        for expert in range(SHAPE.num_experts):
            w1, w2, w3 = (get[f"block_sparse_moe.experts.{expert}.w{i}.weight"] for i in (1, 2, 3))
            assert torch.equal(layer.w13[expert], torch.cat((w1, w3)).t())
            assert torch.equal(layer.w2[expert], w2.t())
        used += 10 + 3 * SHAPE.num_experts
    assert used == len(flat)
    config = ModelConfig.load(folder)
    assert found.num_bytes == config.weight_bytes("float32")
    assert sum(tensor.nbytes for tensor in support.stored_tensors(folder).values()) == config.weight_bytes()


def columns(part: Slice, into: torch.Tensor) -> torch.Tensor:
    return into[..., part.start : part.stop]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranks_hold_the_parts_of_one_process(folder: Path, dtype: torch.dtype) -> None:
    whole = load(folder, dtype=dtype)
    for rank in range(2):
        layout = ParallelLayout(tp=2, rank=rank)
        part = load(folder, layout, dtype)
        vocab = layout.vocabulary(SHAPE.vocab_size)
        assert torch.equal(part.embed, whole.embed[vocab.start : vocab.stop])
        assert torch.equal(part.lm_head, columns(vocab, whole.lm_head))
        q, kv = Slice(rank * 192, rank * 192 + 192), Slice(rank * 64, rank * 64 + 64)
        width = Slice(rank * 192, rank * 192 + 192)
        for mine, all_of_it in zip(part.layers, whole.layers, strict=True):
            q_all, k_all, v_all = torch.split(all_of_it.qkv, [384, 128, 128], dim=-1)
            expected = torch.cat((columns(q, q_all), columns(kv, k_all), columns(kv, v_all)), dim=-1)
            assert torch.equal(mine.qkv, expected)
            assert torch.equal(mine.q_norm, columns(q, all_of_it.q_norm))
            assert torch.equal(mine.k_norm, columns(kv, all_of_it.k_norm))
            assert torch.equal(mine.o, all_of_it.o[q.start : q.stop])
            assert torch.equal(mine.gate, all_of_it.gate)
            w1, w3 = torch.split(all_of_it.w13, [384, 384], dim=-1)
            assert torch.equal(mine.w13, torch.cat((columns(width, w1), columns(width, w3)), dim=-1))
            assert torch.equal(mine.w2, all_of_it.w2[:, width.start : width.stop])


def test_expert_parallel_ranks_hold_whole_experts(folder: Path) -> None:
    whole, part = load(folder), load(folder, ParallelLayout(tp=2, ep=2, rank=1))
    for mine, all_of_it in zip(part.layers, whole.layers, strict=True):
        assert torch.equal(mine.w13, all_of_it.w13[2:])
        assert torch.equal(mine.w2, all_of_it.w2[2:])
        assert mine.qkv.shape[1] == all_of_it.qkv.shape[1] // 2


# ---------------------------------------------------------------------------------------------------------------
# what checkpoints have that they need not have


def write(folder: Path, tensors: Tensors, fp8: bool = True, num_shards: int = 2) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(SHAPE, fp8)))
    if num_shards:
        save_shards(folder, tensors, num_shards)
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def test_variants_load_as_the_same_weights(tmp_path: Path) -> None:
    tensors = random_tensors(SHAPE, fp8=True, seed=0)
    expected = load(write(tmp_path / "plain", tensors))
    single = load(write(tmp_path / "single", tensors, num_shards=0))
    unindexed = write(tmp_path / "unindexed", tensors)
    (unindexed / "model.safetensors.index.json").unlink()
    spare = {
        "model.layers.2.self_attn.q_proj.weight": torch.zeros(3),  # a draft layer
        "model.layers.2.enorm.weight": torch.zeros(3),
        "model.layers.0.self_attn.k_proj.k_scale": torch.ones(()),
        "model.layers.0.self_attn.v_proj.v_scale": torch.ones(()),
        "model.layers.1.block_sparse_moe.experts.0.w1.input_scale": torch.ones(()),
    }
    more = load(write(tmp_path / "more", tensors | spare))
    stray = write(tmp_path / "stray", tensors)
    save_file({"lm_head.weight": torch.zeros(1)}, stray / "model-00009-of-00009.safetensors")  # not in the index
    for found in (single, load(unindexed), more, load(stray)):
        assert all(map(torch.equal, found.tensors(), expected.tensors()))


def test_fewer_layers_than_the_checkpoint_has(folder: Path) -> None:
    config = ModelConfig.load(folder, {"num_hidden_layers": 1})
    found = w.allocate(config, ParallelLayout(), torch.float32, CPU)
    w.load(folder, config, ParallelLayout(), found, lambda share, note: None)
    assert len(found.layers) == 1
    assert torch.equal(found.layers[0].w2, load(folder).layers[0].w2)


def test_bfloat16_routers_are_widened_and_float32_norms_accepted(tmp_path: Path) -> None:
    tensors = random_tensors(SHAPE, fp8=True, seed=0)
    for name, tensor in tensors.items():
        if "gate.weight" in name or name.endswith("bias"):
            tensors[name] = tensor.bfloat16()
        if "norm" in name:
            tensors[name] = tensor.float()
    found = load(write(tmp_path, tensors))
    assert found.layers[0].gate.dtype == torch.float32
    assert torch.equal(found.layers[1].gate.t(), tensors["model.layers.1.block_sparse_moe.gate.weight"].float())
    assert torch.equal(found.norm, tensors["model.norm.weight"])


def test_a_projection_kept_out_of_quantisation(tmp_path: Path) -> None:
    tensors = random_tensors(SHAPE, fp8=True, seed=0)
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = support.dequantised(tensors)[name].bfloat16()
    del tensors[name + "_scale_inv"]
    write(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"missing.*o_proj"):
        load(tmp_path)
    config = config_json(SHAPE, fp8=True)
    config["quantization_config"]["modules_to_not_convert"].append("model.layers.0.self_attn.o_proj")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load(tmp_path).layers[0].o.t(), tensors[name].float())


# ---------------------------------------------------------------------------------------------------------------
# errors

Break = Callable[[Path, Tensors], object]
W1 = "model.layers.1.block_sparse_moe.experts.3.w1.weight"


def truncate(folder: Path, tensors: Tensors) -> None:
    path = folder / "model-00001-of-00007.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def move_in_index(folder: Path, tensors: Tensors) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][W1] = "model-00000-of-00007.safetensors"
    path.write_text(json.dumps(index))


def duplicate(folder: Path, tensors: Tensors) -> None:
    (folder / "model.safetensors.index.json").unlink()
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, folder / "other.safetensors")


def unquantised_config(folder: Path, tensors: Tensors) -> None:
    (folder / "config.json").write_text(json.dumps(config_json(SHAPE, fp8=False)))


def no_weights(folder: Path, tensors: Tensors) -> None:
    for path in folder.glob("model*"):
        path.unlink()


BEFORE: list[tuple[Break, str]] = [
    (lambda _, t: t.pop("model.norm.weight"), "1 tensors are missing.*model.norm.weight"),
    (lambda _, t: t.pop(W1 + "_scale_inv"), f"missing.*{W1}_scale_inv"),
    (lambda _, t: t.update({"model.layers.1.mlp.weight": torch.zeros(1)}), "unknown.*model.layers.1.mlp.weight"),
    (lambda _, t: t.update({W1: t[W1][:-1]}), rf"{W1} must have shape \[384, 256\] by config.json, got \[383, 256\]"),
    (lambda _, t: t.update({W1 + "_scale_inv": torch.ones(3, 1)}), rf"{W1}_scale_inv must have shape \[3, 2\]"),
    (lambda _, t: t.update({W1: t[W1].float()}), f"{W1} must be F8_E4M3, got F32"),
    (lambda _, t: t.update({W1 + "_scale_inv": torch.ones(3, 2, dtype=torch.bfloat16)}), "must be F32, got BF16"),
    (lambda _, t: t.update({"lm_head.weight": t["lm_head.weight"].half()}), "lm_head.weight must be BF16 or F32"),
]
AFTER: list[tuple[Break, str]] = [
    (lambda f, _: (f / "model-00000-of-00007.safetensors").unlink(), "1 files.*missing.*model-00000-of-00007"),
    (lambda f, _: (f / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
    (truncate, "model-00001-of-00007.safetensors is no whole safetensors file"),
    (lambda f, _: (f / "model-00001-of-00007.safetensors").write_text("hello"), "no whole safetensors file"),
    (move_in_index, f"says that {W1} is in model-00000-of-00007.safetensors, but it is not"),
    (duplicate, "lm_head.weight is in .* and in other.safetensors|lm_head.weight is in .* and other.safetensors"),
    (unquantised_config, "unknown.*Is quantization_config missing"),
    (no_weights, "holds no weights"),
]


@pytest.mark.parametrize(("when", "number"), [("before", i) for i in range(len(BEFORE))]
                         + [("after", i) for i in range(len(AFTER))])  # fmt: skip
def test_errors_name_what_is_wrong(when: str, number: int, tmp_path: Path) -> None:
    spoil, message = (BEFORE if when == "before" else AFTER)[number]
    tensors = random_tensors(SHAPE, fp8=True, seed=0)
    if when == "before":
        spoil(tmp_path, tensors)
    write(tmp_path, tensors)
    if when == "after":
        load(tmp_path)
        spoil(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


# ---------------------------------------------------------------------------------------------------------------
# memory, progress, dummy weights

PEAK = """
import sys, threading, time
from pathlib import Path
import torch
from saddle.model import weights as w
from saddle.model.config import ModelConfig
from saddle.model.m2 import MiniMaxM2
from saddle.parallel.layout import ParallelLayout

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
config = ModelConfig.load(Path(sys.argv[1]))
weights = w.allocate(config, ParallelLayout(), torch.bfloat16, torch.device("cpu"))
torch.ones(1000, 1000, dtype=torch.bfloat16).float().mul_(2)  # whatever torch sets up once
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
print(w.load(Path(sys.argv[1]), config, ParallelLayout(), weights, lambda share, note: None))
done = True
watcher.join()
print(peak - before, weights.num_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_is_the_model_and_a_tensor_per_reader(tmp_path: Path) -> None:
    shape = Shape(vocab_size=8192, hidden_size=2048, num_layers=2, num_heads=16, num_kv_heads=4, head_dim=128,
                  num_experts=4, num_experts_per_tok=2, intermediate_size=1024)  # fmt: skip
    write_random_checkpoint(tmp_path, shape, fp8=True)
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    peak, resident = map(int, done.stdout.splitlines()[-1].split())
    largest = max(8192 * 2048 * 2, 2048 * 2048 * 5)  # a tensor as stored, or its bytes and its float32 value
    assert resident > 150e6
    assert 0.9 * resident < peak < resident + w.NUM_READERS * largest


def test_progress_and_rate(folder: Path) -> None:
    shares: list[float] = []
    config = ModelConfig.load(folder)
    weights = w.allocate(config, ParallelLayout(), torch.float32, CPU)
    line = w.load(folder, config, ParallelLayout(), weights, lambda share, note: shares.append(share))
    assert shares == sorted(set(shares))
    assert shares[-1] == 1.0
    assert len(shares) == 3 + SHAPE.num_layers * (10 + 3 * SHAPE.num_experts)
    assert "GB/s" in line
    assert f"{weights.num_bytes / 1e9:.2f} GB resident" in line


def test_dummy_weights_are_seeded_and_not_degenerate(tmp_path: Path) -> None:
    config = ModelConfig.from_dict(config_json(SHAPE, fp8=True))

    def dummy(seed: int) -> w.ModelWeights:
        found = w.allocate(config, ParallelLayout(), torch.float32, CPU)
        w.dummy(found, seed)
        return found

    first, again, other = dummy(1), dummy(1), dummy(2)
    assert all(map(torch.equal, first.tensors(), again.tensors()))
    assert not torch.equal(first.embed, other.embed)
    logits = support.Sequences(MiniMaxM2(config, first, 512)).step(
        {"a": support.prompt(100, SHAPE.vocab_size)}, all_logits=True)  # fmt: skip
    assert 0.5 < float(logits.std()) < 10
    assert len(set(logits.argmax(-1).tolist())) > 30
