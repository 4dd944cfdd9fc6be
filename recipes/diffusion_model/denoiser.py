"""What block diffusion trains on: noisy copies of a text, and one forward pass through all of its blocks at once.

The model that comes out decodes as SDAR does (arXiv 2510.06303): attention is causal between blocks and goes both ways
inside one, and a masked token is predicted at its own position. The blocks before the current one are clean. Training
sees all blocks of a text in one pass (block diffusion, arXiv 2503.09573): the clean text runs beside its noisy copies,
and a noisy block attends to itself and to the clean blocks before it.

Shapes: `B` rows of text, `C` noisy copies of each, `R = 1 + C` (the clean row first), `S` positions, `M` masked tokens
of all copies, `H` hidden size, `D` head size, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from kernels import head_norm_rotary, rms_norm
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

SPAN = 64  # queries of one attention call, so that it need not look at keys far ahead; block sizes must divide it
HEAD_ROWS = 512


@dataclass(frozen=True)
class Noised:
    """`weight_BCS` is 1 / t at masked positions, t being the masked share of the block, and 0 elsewhere."""

    clean_BS: Tensor
    noisy_BCS: Tensor
    masked_BCS: Tensor
    weight_BCS: Tensor
    block_B: list[int]


def noised(clean_BS: Tensor, sizes: list[int], copies: int, mask_id: int, rng: np.random.Generator) -> Noised:
    """Mask every block of every copy to a level of its own.

    The number of masked tokens of a block is uniform over 1 .. its size, spread evenly over the blocks of a row; which
    ones is uniform. With the weight 1 / t the mean loss is an upper bound of a block's negative log likelihood,
    exactly that of filling it in random order (arXiv 2110.02037, equation 3).
    """
    rows, length = clean_BS.shape
    block_B = rng.permutation(np.resize(sizes, rows)).tolist()
    masked_BCS = np.empty((rows, copies, length), dtype=bool)
    weight_BCS = np.empty((rows, copies, length), dtype=np.float32)
    for row, size in enumerate(block_B):
        blocks = copies * length // size
        spread = (rng.permutation(blocks) + rng.random(blocks)) / blocks
        level_N = np.floor(spread * size).astype(int) + 1
        masked_NL = random_masks(level_N, size, rng)
        masked_BCS[row] = masked_NL.reshape(copies, length)
        weight_BCS[row] = (masked_NL * (size / level_N)[:, None]).reshape(copies, length)
    return _masked(clean_BS, masked_BCS, weight_BCS, block_B, mask_id)


def noised_to(clean_BS: Tensor, size: int, shares: list[float], mask_id: int, rng: np.random.Generator) -> Noised:
    """One copy for each share of masked tokens, which every block of it has (rounded to whole tokens); all weigh 1."""
    rows, length = clean_BS.shape
    level_BCN = np.broadcast_to(np.rint(np.array(shares) * size)[:, None], (rows, len(shares), length // size))
    masked_BCS = random_masks(level_BCN.reshape(-1), size, rng).reshape(rows, len(shares), length)
    return _masked(clean_BS, masked_BCS, masked_BCS.astype(np.float32), [size] * rows, mask_id)


def random_masks(level_N: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Bool `[N, size]` with `level_N` positions of each row set, any of them as likely as another."""
    return rng.random((len(level_N), size)).argsort(1).argsort(1) < level_N[:, None]


def _masked(clean_BS: Tensor, masked: np.ndarray, weight: np.ndarray, block_B: list[int], mask_id: int) -> Noised:
    masked_BCS = torch.from_numpy(masked)
    noisy_BCS = clean_BS[:, None].expand_as(masked_BCS).masked_fill(masked_BCS, mask_id)
    return Noised(clean_BS, noisy_BCS, masked_BCS, torch.from_numpy(weight), block_B)


@dataclass(frozen=True)
class Masks:
    """Additive, for one span of queries: `clean` over the clean keys up to its end, `noisy` over those and its own."""

    clean: Tensor
    noisy: Tensor


def attention_masks(start: int, block_B: list[int], copies: int, groups: int, dtype: torch.dtype) -> Masks:
    """For the queries `start .. start + SPAN`, repeated for the `groups` query heads that share keys."""
    query_S1 = torch.arange(start, start + SPAN)[:, None]
    past_K, own_K = torch.arange(start + SPAN), torch.arange(start, start + SPAN)
    clean, noisy = [], []
    for size in block_B:
        block_S1 = query_S1 // size
        clean.append(past_K // size <= block_S1)
        noisy.append(torch.cat([past_K // size < block_S1, own_K // size == block_S1], dim=-1))

    def additive(allowed: list[Tensor], times: int) -> Tensor:
        bias_SK = [torch.zeros(a.shape, dtype=dtype).masked_fill(~a, -torch.inf).repeat(groups, 1) for a in allowed]
        return torch.stack(bias_SK).repeat_interleave(times, dim=0)[:, None]

    return Masks(additive(clean, 1), additive(noisy, copies))


def attend(attention: nn.Module, normed_BRSH: Tensor, rotary: tuple, masks: list[Masks], last: bool) -> Tensor:
    """Attention of all rows before the output projection; of the noisy ones alone if `last`."""
    head, groups = attention.head_dim, attention.num_key_value_groups
    copies = normed_BRSH.shape[1] - 1
    asking = normed_BRSH[:, 1:] if last else normed_BRSH  # nobody reads what the clean row becomes in the last layer
    q = head_norm_rotary(attention.q_norm, attention.q_proj(asking).unflatten(-1, (-1, head)), rotary)
    k = head_norm_rotary(attention.k_norm, attention.k_proj(normed_BRSH).unflatten(-1, (-1, head)), rotary)
    v = attention.v_proj(normed_BRSH).unflatten(-1, (-1, head)).transpose(2, 3)  # [B, R, heads, S, D]

    def call(q_BXQSD: Tensor, k_BXTKD: Tensor, v_BXTKD: Tensor, mask: Tensor) -> Tensor:
        keys, values = k_BXTKD.flatten(0, 1), v_BXTKD.flatten(0, 1)
        folded = q_BXQSD.reshape(len(keys), -1, groups * SPAN, head)  # query heads that share keys, one below another
        out = scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=attention.scaling)
        out = out.reshape(len(keys), -1, SPAN, head).transpose(1, 2).flatten(2)
        return out.unflatten(0, q_BXQSD.shape[:2])  # [B, X, SPAN, heads * D]

    # splits, not slices: the gradient of a slice is as large as what it was cut from
    clean_k, noisy_k, clean_v, noisy_v = (
        part.split(SPAN, dim=3) for x in (k, v) for part in x.split([1, copies], dim=1)
    )
    *clean_q, noisy_q = (part.split(SPAN, dim=3) for part in q.split([copies] if last else [1, copies], dim=1))
    spans = []
    for index, mask in enumerate(masks):
        past_k, past_v = torch.cat(clean_k[: index + 1], dim=3), torch.cat(clean_v[: index + 1], dim=3)
        keys, values = (
            torch.cat([past.expand(-1, copies, -1, -1, -1), own[index]], dim=3)
            for past, own in ((past_k, noisy_k), (past_v, noisy_v))
        )
        parts = [call(clean_q[0][index], past_k, past_v, mask.clean)] if clean_q else []
        spans.append(torch.cat([*parts, call(noisy_q[index], keys, values, mask.noisy)], dim=1))
    return torch.cat(spans, dim=2)


def masked_states(model: PreTrainedModel, batch: Noised) -> Tensor:
    """Final hidden states `[M, H]` of the masked tokens, in the order of `batch.masked_BCS`.

    In the last layer only masked tokens pass the output projection and the experts: nothing reads the others.
    """
    inner = model.model
    tokens_BRS = torch.cat([batch.clean_BS[:, None], batch.noisy_BCS], dim=1)
    hidden = inner.embed_tokens(tokens_BRS)
    length, copies = tokens_BRS.shape[2], batch.noisy_BCS.shape[1]
    cos_1SD, sin_1SD = inner.rotary_emb(hidden, torch.arange(length)[None])
    groups = inner.layers[0].self_attn.num_key_value_groups
    masks = [attention_masks(start, batch.block_B, copies, groups, hidden.dtype) for start in range(0, length, SPAN)]
    for layer in inner.layers:
        last = layer is inner.layers[-1]
        normed = rms_norm(layer.input_layernorm, hidden)
        mixed = attend(layer.self_attn, normed, (cos_1SD[0], sin_1SD[0]), masks, last)
        if last:
            hidden, mixed = hidden[:, 1:][batch.masked_BCS], mixed[batch.masked_BCS]
        hidden = hidden + layer.self_attn.o_proj(mixed)
        normed = rms_norm(layer.post_attention_layernorm, hidden)
        hidden = hidden + layer.mlp(normed.reshape(1, -1, normed.shape[-1])).view_as(hidden)
    return rms_norm(inner.norm, hidden)


def head_gradients(weight_VH: Tensor, states_MH: Tensor, targets_M: Tensor, scale_M: Tensor) -> tuple:
    """Loss of each masked token, and the gradients of `sum(scale * loss)`: the logits of a batch never exist at once.

    Returns:
        loss_M in nats, gradient of the states, gradient of the output head
    """
    loss_M, dstates_MH, dweight_VH = torch.empty_like(scale_M), torch.empty_like(states_MH), torch.zeros_like(weight_VH)
    for start in range(0, len(states_MH), HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        states, targets = states_MH[rows], targets_M[rows, None]
        probability = torch.softmax(states @ weight_VH.T, dim=-1)
        chosen = probability.gather(1, targets)
        loss_M[rows] = -chosen.clamp(min=1e-30).log()[:, 0]
        probability.scatter_(1, targets, chosen - 1).mul_(scale_M[rows, None])
        torch.mm(probability, weight_VH, out=dstates_MH[rows])
        dweight_VH.addmm_(probability.T, states)
    return loss_M, dstates_MH, dweight_VH
