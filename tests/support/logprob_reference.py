"""What the log-probability kernels must give: torch in float64, equal logits in the order of their ids."""

from __future__ import annotations

import torch

# Exponentials are float32 with an error of 2 units in the last place; their sum is float64.
ABSOLUTE = 2e-6


def reference(logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> torch.Tensor:
    """[N, 3 + 2 k] float64 in the layout of `runner.sampler.score`.

    Args:
        logits: [N, V] float32, valid ids alone; tokens: [N] int64.
    """
    wide = logits.double()
    logprobs = wide.log_softmax(-1)
    own = logits.gather(1, tokens[:, None])
    rank = (logits >= own).sum(-1, keepdim=True)
    _, ids = torch.sort(wide, dim=-1, descending=True, stable=True)
    ids = ids[:, :num_top]
    parts = (tokens[:, None], logprobs.gather(1, tokens[:, None]), rank, logprobs.gather(1, ids), ids)
    return torch.cat([part.double() for part in parts], dim=1)


def assert_equal(found: torch.Tensor, logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> None:
    wanted = reference(logits, tokens, num_top).to(found.device)
    exact = [0, 2, *range(3 + num_top, 3 + 2 * num_top)]  # ids and ranks
    assert torch.equal(found[:, exact], wanted[:, exact])
    torch.testing.assert_close(found, wanted, rtol=2e-7, atol=ABSOLUTE)
