"""What `carpool tune` writes: the policy file with all that was measured, and the statistics beside it."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carpool.artefacts.files import atomic_path
from carpool.cli.tune_options import Options, Prepared
from carpool.cli.tune_view import Files

if TYPE_CHECKING:
    from carpool.tune import AtBatch, Target, Trials, Tuned


def write(
    options: Options,
    ready: Prepared,
    target: Target,
    found: Tuned,
    search: Trials,
    verify: Trials,
    others: list[AtBatch],
) -> Files:
    """The policy file, with everything that was measured."""
    from carpool.plans.policy_file import PolicyFile

    made_for = {
        "fingerprint": ready.identity.fingerprint, "num_layers": ready.moe.layers, "num_experts": ready.moe.experts,
        "top_k": ready.moe.top_k,
    }  # fmt: skip
    part = ready.statistics == ready.planes  # of the model, which brings it
    statistics = None if part or not found.plan.required_stats() else _beside(options.output, ready.statistics)
    PolicyFile(
        found.plan,
        {},
        made_for,
        statistics,
        (
            {"target": target.given, **measured_on(ready, options), "texts": ready.data},
            *({"text": "search", **asdict(point)} for point in search.points.values()),
            *(
                {
                    "text": "unseen, at other batch sizes",
                    "batch": one.batch,
                    "uniform": one.uniform,
                    **asdict(one.point),
                }
                for one in others
                if one.point is not None and one.batch != options.batch
            ),
            *({"text": "unseen", **asdict(point)} for point in verify.points.values()),
        ),
    ).save(options.output)
    return Files(options.output, statistics, ready.made if statistics is None else None)


def measured_on(ready: Prepared, options: Options) -> dict[str, Any]:
    return {
        "batch": options.batch, "group": options.group, "sequence": options.sequence, "prefill": options.prefill,
        "tokens": ready.search.batches * ready.layout.batch_size * ready.layout.decoded, "seed": options.seed,
    }  # fmt: skip


def _beside(output: Path, source: Path | None) -> Path | None:
    """The statistics in the folder of the policy file, copied there if need be."""
    if source is None or source.resolve().parent == output.resolve().parent:
        return source
    path = output.with_suffix(".safetensors")
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)
    return path
