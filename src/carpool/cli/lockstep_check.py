"""`carpool evaluate --check-lockstep`: is decoding in lockstep what decoding step by step is?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from carpool.artefacts.files import write_text
from carpool.cli.common import progress

if TYPE_CHECKING:
    from carpool.cli.evaluate_options import Prepared
    from carpool.evaluate.check import Agreement
    from carpool.evaluate.study import Settings


def report_check(console: Console, ready: Prepared, settings: Settings, json_path: Path | None) -> None:
    """Compare on the first batch of every size, in the model's type and in float64; print and write what differs."""
    from carpool.evaluate.check import check_lockstep, in_float64
    from carpool.evaluate.results import provenance

    found: list[Agreement] = []
    runs = [
        (layout, plan, own.ids_ST[: layout.batch_size, :-1].to(ready.model.device))
        for layout, own in zip(settings.layouts(), ready.sequences, strict=True)
        for plan in settings.plans
    ]
    with progress("decoding", 2 * len(runs)) as advance:

        def compare() -> None:
            for layout, plan, ids_BT in runs:
                found.append(check_lockstep(ready.model, plan, ids_BT, layout, stats=ready.statistics))
                advance(1)

        compare()
        with in_float64(ready.model):
            compare()
    for one in found:
        console.print(
            f"{one.policy} at batch {one.batch}, {one.dtype}: logits differ from real decoding by {one.max_error:.1e} "
            f"at most, KL {one.mean_kl:.1e} nats; {one.flips} of {one.pairs} (token, layer) pairs use other experts",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    if json_path is not None:
        write_text(json_path, json.dumps({**provenance(), "checks": [asdict(one) for one in found]}, indent=1) + "\n")
        console.print(f"wrote {json_path}", highlight=False, markup=False, soft_wrap=True)
