"""Routing and experts of M2.

    s = sigmoid(h Wg^T) in float32;  E = top-k(s + bias);  w = s[E] / sum(s[E])
    y = sum over e in E of w_e * W2_e (silu(W1_e h) * (W3_e h))

The bias only selects. Three ways to the experts, by how many tokens there are: all of them compute the same sums, in
an order that is fixed for a token whatever else is in the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Up to this many experts and tokens, two products over all experts beat a loop over the chosen ones.
DENSE_MAX_EXPERTS = 32
DENSE_MAX_TOKENS = 96


def route(h: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts.

    Args:
        h: [T, H]; gate: [E, H] float32; bias: [E] float32.

    Returns:
        expert ids [T, top_k] int64 and their weights [T, top_k] float32, which sum to one.
    """
    scores = torch.sigmoid(F.linear(h.to(torch.float32), gate))
    chosen = torch.topk(scores + bias, top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, chosen)
    return chosen, weights / weights.sum(-1, keepdim=True)


def experts(
    h: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of the chosen experts.

    Args:
        h: [T, H]; chosen: [T, k] int64; weights: [T, k] float32.
        w13: [E, 2 I, H], rows of w1 then of w3; w2: [E, H, I].

    Returns:
        [T, H] in the dtype of h.
    """
    num_experts, num_tokens = w13.shape[0], h.shape[0]
    if num_tokens == 1:
        return _one_token(h, chosen, weights, w13, w2)
    if num_experts <= DENSE_MAX_EXPERTS and num_tokens <= DENSE_MAX_TOKENS:
        return _dense(h, chosen, weights, w13, w2)
    return _by_expert(h, chosen, weights, w13, w2)


def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _one_token(
    h: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros_like(h)
    for slot, expert in enumerate(chosen[0].tolist()):
        hidden = _swiglu(F.linear(h, w13[expert])) * weights[0, slot].to(h.dtype)
        out += F.linear(hidden, w2[expert])
    return out


def _dense(
    h: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    num_experts, hidden, width = w2.shape
    gate_up = torch.matmul(h, w13.transpose(1, 2))  # [E, T, 2 I]
    spread = torch.zeros(h.shape[0], num_experts, dtype=h.dtype, device=h.device)
    spread.scatter_(1, chosen, weights.to(h.dtype))
    active = _swiglu(gate_up) * spread.t().unsqueeze(-1)
    return torch.bmm(active, w2.transpose(1, 2)).sum(0)


def _by_expert(
    h: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    num_tokens, top_k = chosen.shape
    order = torch.argsort(chosen.flatten(), stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=w13.shape[0]).tolist()
    tokens = order // top_k
    gathered = h.index_select(0, tokens)
    scaled = weights.flatten().index_select(0, order).to(h.dtype).unsqueeze(-1)
    parts, start = torch.empty_like(gathered), 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            parts[rows] = F.linear(_swiglu(F.linear(gathered[rows], w13[expert])) * scaled[rows], w2[expert])
            start += count
    # Back to the order (token, slot): the sum of a token does not depend on the other tokens.
    back = torch.empty_like(parts)
    back[order] = parts
    return back.view(num_tokens, top_k, -1).sum(1)
