"""Train the demo checkpoint on one GPU: `python -m demo.train OUT --seconds 1000`; `--init FOLDER` goes on from one.

The schedule follows the clock, so that a run always ends in time: warm-up, constant rate, linear decay over the last
third. In the last fifth the forward pass sees weights rounded to FP8 (straight-through: rounded before each step,
restored before the update), so that the exported checkpoint computes what was trained.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from demo.data import ROW_TOKENS, ROWS_PER_PART, work
from demo.export import read
from demo.model import Model, dequantise, quantise

PARTS_A_STEP = 4
PEAK_RATE, WARM_UP_STEPS, DECAY_SHARE, FP8_SHARE, LAST_RATE = 3e-3, 200, 0.35, 0.2, 0.01
BIAS_STEP = 1e-3
SEED = 1


def rate(step: int, share: float, peak: float) -> float:
    """Learning rate at a step and a share of the time."""
    decay = min(1.0, max(LAST_RATE, (1 - share) / DECAY_SHARE))
    return peak * min(1.0, (step + 1) / WARM_UP_STEPS) * decay


class Rounded:
    """Weights rounded to FP8 inside the block, the masters outside."""

    def __init__(self, model: Model, on: bool) -> None:
        self._weights = model.quantised() if on else []

    @torch.no_grad()
    def __enter__(self) -> None:
        self._masters = [w.detach().clone() for w in self._weights]
        for weight in self._weights:
            weight.copy_(dequantise(*quantise(weight)))

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for weight, master in zip(self._weights, self._masters, strict=True):
            weight.copy_(master)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--tokenizer", type=Path, default=Path("src/saddle/demo_model/tokenizer.json"))
    parser.add_argument("--init", type=Path, help="folder of an exported checkpoint to go on from")
    parser.add_argument("--peak", type=float, default=PEAK_RATE, help="highest learning rate")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--parts", type=int, default=PARTS_A_STEP)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("spawn")
    queue: mp.Queue = context.Queue(64)  # type: ignore[type-arg]
    for number in range(args.workers):
        context.Process(target=work, args=(1000 + number, args.tokenizer, queue), daemon=True).start()

    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = (read(args.init) if args.init else Model()).to(device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.peak, betas=(0.9, 0.95), fused=device == "cuda")

    def loss_of(ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, loads = model(ids[:, :-1], torch.bfloat16)
        each = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        return (each * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum(), loads

    compiled = torch.compile(loss_of) if device == "cuda" else loss_of
    began, step, tokens, saved, losses = time.time(), 0, 0, 0.0, []
    log = (args.out / "train.log").open("w")
    while (share := (time.time() - began) / args.seconds) < 1:
        drawn = [queue.get() for _ in range(args.parts)]
        ids = torch.from_numpy(np.concatenate([d[0] for d in drawn]).astype(np.int64)).to(device, non_blocking=True)
        weights = torch.from_numpy(np.concatenate([d[1] for d in drawn])).to(device, non_blocking=True).float()
        for group in optimizer.param_groups:
            group["lr"] = rate(step, share, args.peak)
        with Rounded(model, share > 1 - FP8_SHARE):
            loss, loads = compiled(ids, weights)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if share < 1 - DECAY_SHARE:  # balance the experts; afterwards the bias stands still
            for layer, load in zip(model.layers, loads, strict=True):
                layer.bias += BIAS_STEP * torch.sign(load.mean() - load)
        step, tokens = step + 1, tokens + args.parts * ROWS_PER_PART * ROW_TOKENS
        if step % 200 == 0 or step == 10:
            losses.append(loss.item())
            seconds = time.time() - began
            uneven = (loads.max(-1).values / loads.mean(-1)).max().item()
            line = (f"step {step} loss {losses[-1]:.4f} {tokens / seconds / 1e6:.3f} M tokens/s queue {queue.qsize()} "
                    f"at {seconds:.0f} s, busiest expert {uneven:.2f}")  # fmt: skip
            print(line, file=log, flush=True)
            if time.time() - saved > 240:
                torch.save(model.state_dict(), args.out / "model.pt")
                saved = time.time()
    torch.save(model.state_dict(), args.out / "model.pt")
    half = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    torch.save(half, args.out / "model-bf16.pt")
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    summary = {"card": card, "init": str(args.init) if args.init else None, "peak_rate": args.peak, "seconds": round(time.time() - began), "steps": step, "tokens": tokens,
               "parameters": sum(p.numel() for p in model.parameters()), "loss": losses[-1:]}  # fmt: skip
    (args.out / "train.json").write_text(json.dumps(summary) + "\n")
    print(json.dumps(summary), file=log, flush=True)


if __name__ == "__main__":
    main()
