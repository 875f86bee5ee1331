"""Routing and experts of M2.

    s = sigmoid(h Wg^T) in float32;  E = top-k(s + bias);  w = s[E] / sum(s[E])
    y = sum over e in E of w_e * W2_e (silu(W1_e h) * (W3_e h))

The bias only selects. Several ways to the experts, chosen by how many tokens there are. All compute the same sums;
which experts other tokens chose changes a token's result by rounding at most.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# On other devices a loop over experts waits for the router: up to this many pairs copy their experts' weights instead.
MAX_COPIED_PAIRS = 64


def route(h: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts.

    Args:
        h: [T, H]; gate: [H, E] float32; bias: [E] float32.

    Returns:
        expert ids [T, top_k] int64 and their weights [T, top_k] float32, which sum to one.
    """
    scores = torch.mm(h.to(torch.float32), gate).sigmoid_()
    chosen = torch.topk(scores + bias, top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, chosen)
    return chosen, weights.div_(weights.sum(-1, keepdim=True))


def experts(
    h: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of the chosen experts.

    Args:
        h: [T, H]; chosen: [T, k] int64; weights: [T, k] float32.
        w13: [E, H, 2 I], columns of w1 then of w3; w2: [E, I, H].

    Returns:
        [T, H] in the dtype of h.
    """
    num_tokens, top_k = chosen.shape
    if h.device.type != "cpu" and num_tokens * top_k <= MAX_COPIED_PAIRS:
        return _copied_experts(h, chosen, weights, w13, w2)
    if num_tokens == 1:
        return _one_token(h, chosen, weights, w13, w2)
    return _by_expert(h, chosen, weights, w13, w2)


def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    width = gate_up.shape[-1] // 2
    return F.silu(gate_up[..., :width]).mul_(gate_up[..., width:])


def _one_token(
    h: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros_like(h)
    for expert, weight in zip(chosen[0].tolist(), weights[0].tolist(), strict=True):
        out.addmm_(_swiglu(torch.mm(h, w13[expert])), w2[expert], alpha=weight)
    return out


def _copied_experts(
    h: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    num_tokens, top_k = chosen.shape
    pairs = chosen.flatten()
    active = _swiglu(torch.bmm(h.repeat_interleave(top_k, dim=0).unsqueeze(1), w13.index_select(0, pairs)))
    found = torch.bmm(active, w2.index_select(0, pairs)).view(num_tokens, top_k, -1)
    return torch.bmm(weights.to(h.dtype).unsqueeze(1), found).squeeze(1)


def _by_expert(
    h: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    num_tokens, top_k = chosen.shape
    pairs = chosen.flatten()
    order = torch.argsort(pairs, stable=True)
    counts = torch.bincount(pairs, minlength=w13.shape[0]).tolist()
    work = [(expert, count) for expert, count in enumerate(counts) if count]
    sizes = [count for _, count in work]
    found = h.index_select(0, torch.div(order, top_k, rounding_mode="floor"))
    gate_up = found.new_empty(len(pairs), w13.shape[2])
    for (expert, _), rows, into in zip(work, torch.split(found, sizes), torch.split(gate_up, sizes), strict=True):
        torch.mm(rows, w13[expert], out=into)
    active = _swiglu(gate_up)
    for (expert, _), rows, into in zip(work, torch.split(active, sizes), torch.split(found, sizes), strict=True):
        torch.mm(rows, w2[expert], out=into)
    # Back to the order (token, slot), so that a token's sum is taken in the same order whatever the other tokens.
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(pairs), device=h.device))
    found = found.index_select(0, back).view(num_tokens, top_k, -1)
    return torch.bmm(weights.to(h.dtype).unsqueeze(1), found).squeeze(1)
