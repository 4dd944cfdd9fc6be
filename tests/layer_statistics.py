"""Per-layer statistics as `carpool calibrate` writes them, made up: from the number of experts and a generator."""

from __future__ import annotations

import torch
from torch import Tensor


def no_stats(num_experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {}


def similarities(num_experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Every metric; `frobenius` with many ties, `routed` asymmetric."""

    def matrix() -> Tensor:
        return torch.rand(num_experts, num_experts, generator=generator)

    raw = {name: matrix() for name in ("frobenius", "cosine", "cka", "routed")}
    symmetric = {name: (value + value.T) / 2 for name, value in raw.items()}
    symmetric["frobenius"] = (symmetric["frobenius"] * 8).round() / 8
    symmetric["routed"] = raw["routed"]
    ones = torch.eye(num_experts, dtype=torch.bool)
    return {f"similarity_{name}": value.masked_fill(ones, 1.0) for name, value in symmetric.items()}


def norm_predictor(num_experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    """For the harness's hidden states."""
    return {
        "norm_weight": torch.randn(num_experts, 4, generator=generator) / 4,
        "norm_bias": torch.randn(num_experts, generator=generator) / 2,
        "norm_scale": torch.tensor(1.0),
    }


def sensitivity(num_experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"sensitivity": torch.tensor(0.25)}


def together(num_experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Tokens that choose two experts, with ties."""
    counts_EE = torch.randint(0, 5, (num_experts, num_experts), generator=generator)
    return {"coactivation": counts_EE + counts_EE.T}


def allow_lists(num_experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Scores with ties, over all domains and of one."""
    scores_3E = (torch.rand(3, num_experts, generator=generator) * 8).round() / 8
    return {"easy_ep": scores_3E[0], "easy_ep/code": scores_3E[1], "reap": scores_3E[2]}


def unexplained(num_experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Energies that differ by orders of magnitude; a few experts without a surrogate."""
    share_E = torch.rand(num_experts, generator=generator) * 1.2
    return {
        "surrogate_energy": torch.randn(num_experts, generator=generator).exp(),
        "surrogate_unexplained": share_E.clamp_max(1.0),
    }


def planes(num_experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Experts that are stored at 2, 3 and 4 bits, with energies that differ; batches of 1, 2 and 4 voters sampled."""
    share_LE = torch.tensor([0.1, 0.03, 0.008]).unsqueeze(-1) * (0.5 + torch.rand(num_experts, generator=generator))
    return {
        "planes_shape": torch.tensor([32, 4, 4, 2, 3, 4]),
        "depth_bytes": torch.tensor([0.15625, 0.21875, 0.28125]),
        "depth_energy": torch.randn(num_experts, generator=generator).exp(),
        "depth_error": share_LE,
        "depth_use": torch.rand(3, 8, num_experts, generator=generator).square(),
        "depth_gate": torch.rand(num_experts, generator=generator),
        "coverage": torch.randint(0, 99, (num_experts,), generator=generator),
    }


def usual_tokens(num_experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Quantiles that ratios and norms of the harness's cases fall between, and experts in planes."""
    share_K1 = 0.6 ** torch.arange(16).unsqueeze(-1)
    return {
        "ratio_quantiles": share_K1 * torch.linspace(0.2, 1, 11),
        "l1_quantiles": torch.linspace(0, 24, 101),
        **planes(num_experts, generator),
    }
