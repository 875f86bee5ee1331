"""Batched generation with the training model, for scoring on a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from demo.model import Layer, Model


@torch.no_grad()
def generate(
    model: Model, prompts: list[list[int]], eos: int, most: int, temperature: float, dtype: torch.dtype, seed: int = 0
) -> list[list[int]]:
    """Up to `most` ids for each prompt, without the end token. Prompts are padded on the left.

    Sampling as the shipped generation config: top_k 40, then top_p 0.95.
    """
    device = model.embed.device
    longest = max(map(len, prompts))
    rows = len(prompts)
    ids = torch.zeros(rows, longest, dtype=torch.long)
    pad = torch.tensor([longest - len(p) for p in prompts])
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
    ids, pad = ids.to(device), pad.to(device)
    generator = torch.Generator(device).manual_seed(seed)
    s = model.shape
    shape = (s.layers, 2, rows, s.kv_heads, longest + most, s.head_dim)
    cache = torch.zeros(shape, dtype=dtype, device=device)
    slots = torch.arange(longest + most, device=device)
    found: list[list[int]] = [[] for _ in prompts]
    live = torch.ones(rows, dtype=torch.bool, device=device)
    drawn = []
    start, block = 0, ids
    for _ in range(most):
        stop = start + block.shape[1]
        positions = (slots[start:stop] - pad[:, None]).clamp_min(0)
        visible = (slots[:stop] <= slots[start:stop, None]) & (slots[:stop] >= pad[:, None, None])
        # A padded query sees itself alone, so that no softmax is empty.
        visible |= slots[:stop] == slots[start:stop, None]
        logits = _step(model, block, positions, visible[:, None], cache, start, dtype)
        following = _draw(logits.float(), temperature, generator)
        live &= following != eos
        drawn.append(torch.where(live, following, -1))
        if not bool(live.any()):
            break
        start, block = stop, following[:, None]
    for row, line in enumerate(torch.stack(drawn, 1).tolist()):
        found[row] = line[: line.index(-1)] if -1 in line else line
    return found


def _step(model: Model, ids: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor, cache: torch.Tensor,
          start: int, dtype: torch.dtype) -> torch.Tensor:  # fmt: skip
    x = F.embedding(ids, model.embed.to(dtype))
    cos, sin = model.cos[positions][:, None].to(dtype), model.sin[positions][:, None].to(dtype)
    stop = start + ids.shape[1]
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        q, k, v = layer.project(x, cos, sin)
        cache[number, 0, :, :, start:stop], cache[number, 1, :, :, start:stop] = k, v
        keys, values = cache[number, 0, :, :, :stop], cache[number, 1, :, :, :stop]
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, enable_gqa=True)
        x = x + F.linear(y.transpose(1, 2).flatten(2), layer.o.to(dtype))
        x = x + layer.experts(x)[0]
    x = F.rms_norm(x[:, -1], (model.shape.hidden,), model.norm.to(dtype), 1e-6)
    return F.linear(x, model.head.to(dtype))


def _draw(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    top, ids = torch.topk(logits / temperature, 40, dim=-1)
    probs = torch.softmax(top, -1)
    probs = probs * (probs.cumsum(-1) - probs < 0.95)
    return ids.gather(1, torch.multinomial(probs, 1, generator=generator)).squeeze(1)
