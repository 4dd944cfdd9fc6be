"""Records a trace in lockstep: batches of sequences, first their prompts in one step, then a position of each a step.

`B` sequences of a batch, `T` positions of which `P` are prompt, `S` sequences in all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carpool.artefacts.origin import now, version
from carpool.artefacts.trace import Trace
from carpool.artefacts.trace_facts import TraceFacts
from carpool.artefacts.trace_writer import TraceWriter
from carpool.calibrate.capture import calm
from carpool.errors import CarpoolError
from carpool.evaluate.layout import Layout
from carpool.evaluate.sequences import Sequences
from carpool.routing.batch import Grouping

PASS_TOKENS = 4096  # of one forward


def record(
    model: Any,
    sequences: Sequences,
    path: Path,
    *,
    batch_size: int,
    prefill: int,
    data: tuple[tuple[str, str], ...] = (),
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> int:
    """Record the native routing of sequences that decode in batches, and write it as a trace while it is recorded.

    Native routing of a token does not depend on its neighbours, so that a forward over whole sequences chooses what
    decoding step by step does.

    Args:
        sequences: whose last token each is left out.
        path: of the file to write.
        batch_size, prefill: `B` and `P`.
        data, seed: for the record (see `TraceFacts`).
        progress: told the tokens of every forward.

    Returns:
        Rows that were written.

    Raises:
        CarpoolError: numbers that do not fit, a model whose routing cannot be seen, a file that cannot be written.
    """
    from carpool.hosts.transformers import find_layers
    from carpool.hosts.transformers.tracing import watching

    ids_ST = sequences.ids_ST[:, :-1]
    layout = Layout(batch_size, ids_ST.shape[1], prefill, Grouping.parse("batch"))
    if len(ids_ST) < batch_size or len(ids_ST) % batch_size:
        raise CarpoolError(f"{len(ids_ST)} sequences do not make batches of {batch_size}")
    layers = find_layers(model)
    facts = facts_of(model, [sequences.domains[one] for one in sequences.domain_S.tolist()], data, seed)
    each = max(1, PASS_TOKENS // layout.positions)  # sequences of a forward
    with torch.inference_mode(), calm(model), watching(layers) as choices, TraceWriter(path) as writer:
        for number, ids_BT in enumerate(ids_ST.split(batch_size)):
            found = []
            for ids_XT in ids_BT.split(each):
                model.base_model(input_ids=ids_XT.to(layers[0].weight_EH.device), use_cache=False)
                found.append(choices.take(ids_XT.numel()))
                progress(ids_XT.numel())
            experts_NLK, weights_NLK = (torch.cat(part) for part in zip(*found, strict=True))
            writer.add(_in_steps(experts_NLK, weights_NLK, layout, number, facts))
        return writer.rows


def facts_of(model: Any, domains: list[str], data: tuple[tuple[str, str], ...], seed: int) -> TraceFacts:
    """What a trace of a transformers model says of itself."""
    import transformers

    from carpool.hosts.transformers import find_layers, fingerprint
    from carpool.hosts.transformers.as_stored import shares_stored

    layers = find_layers(model)
    sizes = [2 * sum(one.numel() for one in layer.experts.parameters()) / layer.num_experts for layer in layers]
    stored = [size * share for size, share in zip(sizes, shares_stored(model, layers), strict=True)]
    return TraceFacts(
        num_experts=layers[0].num_experts,
        layers=tuple(layer.index for layer in layers),
        hidden_size=layers[0].weight_EH.shape[1],
        expert_bytes=round(sum(stored) / len(stored)),
        fingerprint=fingerprint(model),
        architecture=type(model).__name__,
        created=now(),
        versions=(
            ("carpool", version()), ("torch", torch.__version__), ("transformers", transformers.__version__),
        ),
        data=data, domains=tuple(domains), seed=seed,
    )  # fmt: skip


def _in_steps(experts_NLK: Tensor, weights_NLK: Tensor, layout: Layout, number: int, facts: TraceFacts) -> Trace:
    """The rows of one batch, which come sequence by sequence, in the order of steps."""
    batch, positions, prefill = layout.batch_size, layout.positions, layout.prefill
    place_BT = torch.arange(batch * positions).view(batch, positions)
    order_N = torch.cat([place_BT[:, :prefill].flatten(), place_BT[:, prefill:].T.flatten()])
    position_N = order_N % positions
    decode_N = position_N >= prefill
    step_N = torch.where(decode_N, position_N - prefill + 1, 0) + number * (layout.decoded + 1)
    request_N = order_N // positions + number * batch
    return Trace.of(
        experts_NLK[order_N], facts, weights_TLK=weights_NLK[order_N], step_T=step_N, request_T=request_N,
        position_T=position_N, decode_T=decode_N,
    )  # fmt: skip
