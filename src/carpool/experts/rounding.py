"""Quantisers whose codes nest: the first bits of a weight's code are its code at every smaller depth.

`nested_round` rounds to the nearest. `nested_feedback` also moves what rounding leaves of one input's weights to the
inputs that are not rounded yet, as GPTQ does (arXiv 2210.17323), at every offered depth at once: each depth has its own
remainders, all have one code, and of the codes that are best for one of them that is taken which loses least over all.
(Feedback at one depth, with deeper bits for what it leaves, is 1.5 to 4 times worse at the other depths.)

In both the scale of a group is searched over clips, and at the end every depth gets the scales that lose least: by
least squares on the weights, or on the outputs where the inputs' second moments are known.

Shapes: `E` experts, `R` rows (outputs), `I` inputs, `G` groups of inputs, `L` offered depths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.experts.planes import GROUP, MIDDLE, Planes, centred, nearest

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)  # shares of a group's largest weight
DAMPING = 0.01  # of the mean second moment, added to the diagonal
TINY = 1e-30
GAIN = 4.0  # what one more bit divides the lost energy by: errors are counted in units of their depth
WORK = 1 << 24  # numbers of a matrix that are worked on at once


def nested_round(weight_ERI: Tensor, depths: tuple[int, ...], group: int = GROUP, centre: float = MIDDLE) -> Planes:
    """Every weight rounded to the nearest code.

    Args:
        weight_ERI: one matrix of every expert.
        depths: the offered ones, ascending; one alone where the centre is not the middle.
        group: inputs that share a scale.
        centre: of a cell, from its lower end (see `Planes`).
    """
    weight_ERI = weight_ERI.float()
    codes_ERI, scale_LERG = _search(weight_ERI, None, depths, group, centre)
    return Planes.of(codes_ERI, scale_LERG, depths, group, centre)


def nested_feedback(
    weight_ERI: Tensor, moment_EII: Tensor, depths: tuple[int, ...], group: int = GROUP, centre: float = MIDDLE
) -> Planes:
    """Rounded with error feedback.

    Args:
        weight_ERI: one matrix of every expert.
        moment_EII: sums of `x x'` over the inputs that an expert saw, weighted as one likes (MoEQuant, arXiv
            2505.03804: by the gate's weight squared). An expert that saw none is rounded to the nearest.
        depths, group, centre: see `nested_round`.
    """
    some = max(1, WORK // (weight_ERI[0].numel() * len(depths)))
    parts = [
        _fed_back(weight_XRI.float(), damped(moment_XII.float()), depths, group, centre)
        for weight_XRI, moment_XII in zip(weight_ERI.split(some), moment_EII.split(some), strict=True)
    ]
    codes, scales = zip(*parts, strict=True)
    return Planes.of(torch.cat(codes), torch.cat(scales, 1), depths, group, centre)


def damped(moment_EII: Tensor) -> Tensor:
    """Second moments with a share of their mean on the diagonal; the identity for experts without any."""
    mean_E = moment_EII.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye_II = torch.eye(moment_EII.shape[-1], device=moment_EII.device)
    seen_E11 = (mean_E > 0)[:, None, None]
    return torch.where(seen_E11, moment_EII + DAMPING * mean_E[:, None, None] * eye_II, eye_II)


def refit(weight_ERI: Tensor, steps_ERI: Tensor, group: int, moment_EII: Tensor, scale_ERG: Tensor) -> Tensor:
    """The scales `[E, R, G]` that lose least of the outputs' energy, all groups of an output together; where they
    would be degenerate, the given ones. `steps_ERI` are the weights in units of their scales."""
    steps_ERGX = _grouped(steps_ERI, group)
    E, R, G, X = steps_ERGX.shape
    size = weight_ERI.shape[-1]
    spread_ERGI = torch.zeros(E, R, G, G * X, device=weight_ERI.device)
    places = torch.arange(G * X, device=weight_ERI.device).view(G, X)
    spread_ERGI.scatter_(-1, places.expand(E, R, G, X), steps_ERGX)
    spread_ERGI = spread_ERGI[..., :size]
    seen_ERGI = spread_ERGI @ moment_EII.unsqueeze(1)
    left_ERGG = seen_ERGI @ spread_ERGI.transpose(-1, -2)
    right_ERG = (seen_ERGI @ weight_ERI.unsqueeze(-1)).squeeze(-1)
    ridge = 1e-6 * left_ERGG.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(TINY)
    left_ERGG = left_ERGG + ridge[..., None, None] * torch.eye(G, device=weight_ERI.device)
    solved_ERG = torch.linalg.solve(left_ERGG, right_ERG)
    good_ERG = solved_ERG.isfinite() & (solved_ERG > 0) & (solved_ERG < 4 * scale_ERG + TINY)
    return torch.where(good_ERG, solved_ERG, scale_ERG)


def _grouped(values_ERI: Tensor, group: int) -> Tensor:
    """`[E, R, G, group]`, the last group filled up with zeros."""
    return torch.nn.functional.pad(values_ERI, (0, -values_ERI.shape[-1] % group)).unflatten(-1, (-1, group))


def _search(
    weight_ERI: Tensor, importance_EI: Tensor | None, depths: tuple[int, ...], group: int, centre: float
) -> tuple[Tensor, Tensor]:
    """Codes `[E, R, I]` of the deepest depth and scales `[L, E, R, G]`, by the clip that does best over all depths,
    each depth's error counted in its own cells."""
    size = weight_ERI.shape[-1]
    if importance_EI is None:
        importance_EI = torch.ones(len(weight_ERI), size, device=weight_ERI.device)
    weight_ERGX = _grouped(weight_ERI, group)
    importance_E1GX = _grouped(importance_EI.unsqueeze(1), group)
    largest_ERG1 = weight_ERGX.abs().amax(-1, keepdim=True).clamp_min(TINY)
    D = depths[-1]
    best_ERG = torch.full(weight_ERGX.shape[:-1], torch.inf, device=weight_ERI.device)
    codes = torch.zeros(weight_ERGX.shape, dtype=torch.int32, device=weight_ERI.device)
    scales = torch.zeros((len(depths), *weight_ERGX.shape[:-1]), device=weight_ERI.device)
    for clip in CLIPS:
        step_ERG1 = 2 * clip * largest_ERG1 / 2**D
        tried = nearest(weight_ERGX / step_ERG1, D, centre).clamp(0, 2**D - 1).int()
        lost_ERG, fitted = torch.zeros_like(best_ERG), []
        for depth in depths:
            steps = centred(tried >> (D - depth), depth, centre)
            plain_ERG = step_ERG1.squeeze(-1) * 2 ** (D - depth)
            scale_ERG = (importance_E1GX * weight_ERGX * steps).sum(-1)
            scale_ERG = scale_ERG / (importance_E1GX * steps.square()).sum(-1).clamp_min(TINY)
            scale_ERG = torch.where((scale_ERG > 0) & (scale_ERG < 4 * plain_ERG), scale_ERG, plain_ERG)
            fitted.append(scale_ERG)
            error = weight_ERGX - steps * scale_ERG.unsqueeze(-1)
            lost_ERG += (importance_E1GX * error.square()).sum(-1) * 4.0**depth
        better_ERG = lost_ERG < best_ERG
        best_ERG = torch.where(better_ERG, lost_ERG, best_ERG)
        codes = torch.where(better_ERG.unsqueeze(-1), tried, codes)
        scales = torch.where(better_ERG, torch.stack(fitted), scales)
    return codes.flatten(-2)[..., :size], scales


def _inverse_factor(moment_EII: Tensor) -> Tensor:
    """The upper factor of the inverse: `H^-1 = U' U`."""
    inverse_EII = torch.cholesky_inverse(torch.linalg.cholesky(moment_EII.double()))
    return torch.linalg.cholesky(inverse_EII, upper=True).float()


def _fed_back(
    weight_ERI: Tensor, moment_EII: Tensor, depths: tuple[int, ...], group: int, centre: float
) -> tuple[Tensor, Tensor]:
    """Codes `[E, R, I]` and scales `[L, E, R, G]`."""
    _, scale_LERG = _search(weight_ERI, moment_EII.diagonal(dim1=-2, dim2=-1), depths, group, centre)
    factor_EII = _inverse_factor(moment_EII)
    left_LERI = weight_ERI.expand(len(depths), *weight_ERI.shape).clone()
    columns = []
    for start in range(0, weight_ERI.shape[-1], group):
        some = slice(start, start + group)
        scale_LER = scale_LERG[..., start // group].clamp_min(TINY)
        block_LERX, factor_EXX = left_LERI[..., some].clone(), factor_EII[:, some, some]
        errors = []
        for column in range(block_LERX.shape[-1]):
            code_ER, error_LER = _choose(block_LERX[..., column], scale_LER, depths, centre)
            error_LER = error_LER / factor_EXX[:, column, column].unsqueeze(-1)
            block_LERX[..., column + 1 :] -= error_LER.unsqueeze(-1) * factor_EXX[:, None, column, column + 1 :]
            columns.append(code_ER)
            errors.append(error_LER)
        left_LERI[..., some.stop :] -= torch.stack(errors, -1) @ factor_EII[:, some, some.stop :]
    codes_ERI = torch.stack(columns, -1)
    scales = [
        refit(
            weight_ERI, centred(codes_ERI >> (depths[-1] - depth), depth, centre), group, moment_EII, scale_LERG[place]
        )
        for place, depth in enumerate(depths)
    ]
    return codes_ERI, torch.stack(scales)


def _choose(value_LER: Tensor, scale_LER: Tensor, depths: tuple[int, ...], centre: float) -> tuple[Tensor, Tensor]:
    """The code of one input's weights, int32 `[E, R]`, and what it leaves at every depth.

    Tried are, for every depth, the code that is nearest there, with the nearest bits of the deeper ones below it.
    """
    wanted = [nearest(value_LER[place] / scale_LER[place], d, centre) for place, d in enumerate(depths)]
    best: tuple[Tensor, Tensor, Tensor] | None = None  # lost energy, codes, remainders
    for anchor, depth in enumerate(depths):
        tried_ER = wanted[anchor].clamp(0, 2**depth - 1)
        for place in range(anchor + 1, len(depths)):
            first_ER = tried_ER * 2 ** (depths[place] - depths[place - 1])
            last_ER = first_ER + 2 ** (depths[place] - depths[place - 1]) - 1
            tried_ER = torch.minimum(torch.maximum(wanted[place], first_ER), last_ER)
        code_ER = tried_ER.int()
        steps_LER = torch.stack([centred(code_ER >> (depths[-1] - one), one, centre) for one in depths])
        left_LER = value_LER - steps_LER * scale_LER
        lost_ER = torch.stack([left_LER[place].square() * GAIN**one for place, one in enumerate(depths)]).sum(0)
        if best is not None:
            better_ER = lost_ER < best[0]
            code_ER = torch.where(better_ER, code_ER, best[1])
            left_LER = torch.where(better_ER, left_LER, best[2])
            lost_ER = torch.minimum(lost_ER, best[0])
        best = lost_ER, code_ER, left_LER
    assert best is not None
    return best[1], best[2]
