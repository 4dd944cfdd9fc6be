"""Scores of one row from its logits, as `RouteSpec.scores` defines them: in doubles, rounded once."""

from __future__ import annotations

import triton
import triton.language as tl

from carpool.kernels.packed import rounded


@triton.jit
def scores_of(logits, inside, bias_E, experts, SCORING: tl.constexpr, SCORES: tl.constexpr):
    """What a row ranks by and what it mixes by, float32 over experts.

    Args:
        logits: finite, float32. bias_E: added to the choice, or None.
        SCORING: of the model's rule. SCORES: dtype in which the model scores.
    """
    exact = logits.to(tl.float64)
    if SCORING == "sigmoid":
        weights = rounded((1.0 / (1.0 + tl.exp(-exact))).to(tl.float32), SCORES)
    elif SCORING == "sqrtsoftplus":
        power = tl.exp(tl.minimum(exact, 20.0))
        above = 1.0 + power  # the logarithm of this keeps all digits only with the correction of what was rounded away
        softplus = tl.where(above == 1.0, power, tl.log(above) * power / tl.where(above == 1.0, 1.0, above - 1.0))
        softplus = rounded(tl.where(exact > 20.0, exact, softplus).to(tl.float32), SCORES)
        weights = rounded(tl.sqrt(softplus.to(tl.float64)).to(tl.float32), SCORES)
    elif SCORING == "probabilities":
        weights = logits
    else:
        largest = tl.max(tl.where(inside, exact, -float("inf")))
        power = tl.where(inside, tl.exp(exact - largest), 0.0)
        weights = rounded((power / tl.sum(power)).to(tl.float32), SCORES)
    choice = logits if SCORING == "softmax_after_topk" else weights
    if bias_E is not None:
        choice = choice + tl.load(bias_E + experts, mask=inside, other=0.0).to(tl.float32)
    return choice, weights
