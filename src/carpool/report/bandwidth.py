"""The least time of a decoding step: what was read, at the sizes and the bandwidth that a reader enters."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from carpool.doctor import Diagnosis
from carpool.report.drawing import as_data
from carpool.report.layout import section
from carpool.report.load import Evaluation


@dataclass(frozen=True)
class Sizes:
    """What the section begins with.

    Attributes:
        whose: model they belong to, as a sentence says it.
        expert: bytes of one expert. layers: MoE layers. other: bytes that a step reads beside experts.
    """

    whose: str
    expert: float
    layers: int
    other: float


WIDER = {"float32": 0.5, "float64": 0.25}  # what 16 bits take of a number
QWEN3_30B = Sizes("Qwen3-30B-A3B in bf16", 9.44e6, 48, 2e9)


def sizes_of(evaluation: Evaluation, like: Diagnosis | None) -> Sizes:
    """Those of the model that was asked for, else the evaluated model's own, else Qwen3-30B-A3B's.

    A model that was evaluated in more bits than 16 counts with 16: so bytes are counted everywhere.
    """
    if like is not None:
        return Sizes(f"{like.architecture} ({like.weights}), as asked for", like.expert_bytes, like.moe_layers, 2e9)
    model = evaluation.facts.get("model", {})
    if "expert_bytes" not in model:
        said = f"{QWEN3_30B.whose}, because the results do not say those of {model.get('name', 'their model')}"
        return Sizes(said, QWEN3_30B.expert, QWEN3_30B.layers, QWEN3_30B.other)
    dtype = model.get("dtype", "its own number format")
    scale = WIDER.get(dtype, 1.0)
    counted = f"in {dtype}" if scale == 1 else f"counted in 16 bits (it was evaluated in {dtype})"
    whose = f"the evaluated {model.get('name', 'model')} itself, {counted}"
    return Sizes(whose, scale * model["expert_bytes"], model["layers"], scale * model["other_bytes"])


def bandwidth_section(evaluation: Evaluation, like: Diagnosis | None, bandwidth: float, batch: int) -> str:
    """A form, and a table that the page's script fills."""
    sizes = sizes_of(evaluation, like)
    options = "".join(f"<option>{size}</option>" for size in evaluation.batches)
    note = (
        "A decoding step takes at least the time to read its weights. This is that time from what was read here: a "
        "bound, not a measurement. Shown are the settings that no other one beats in both bytes and KL. "
        f"<strong>The sizes are those of {escape(sizes.whose)}</strong>; enter yours."
    )
    form = (
        f'<form class="bandwidth"><label>batch <select name="batch">{options}</select></label>'
        '<label>one expert <input name="megabytes" type="number" min="0" step="any"> MB</label>'
        '<label>MoE layers <input name="layers" type="number" min="1" step="1"></label>'
        '<label>read beside them a step <input name="other" type="number" min="0" step="any"> GB</label>'
        '<label>bandwidth <input name="bandwidth" type="number" min="1" step="any"> GB/s</label>'
        '<label><input name="all" type="checkbox"> all settings</label>'
        f"{as_data(_data(evaluation, sizes, bandwidth, batch))}</form>"
        '<div class="scroll"><table class="steps"></table></div>'
    )
    return section("At your batch and bandwidth", note, form)


def _data(evaluation: Evaluation, sizes: Sizes, bandwidth: float, batch: int) -> dict[str, Any]:
    stock = {size: evaluation.stock(size).value("union") for size in evaluation.batches}
    rows = [
        {"batch": row.batch, "policy": row.policy, "control": row.control, "kl": row.value("kl"),
         "union": row.value("bytes_share") * stock[row.batch]}
        for row in evaluation.rows
    ]  # fmt: skip
    return {
        "rows": rows, "megabytes": sizes.expert / 1e6, "layers": sizes.layers, "other": sizes.other / 1e9,
        "bandwidth": bandwidth, "batch": batch,
    }  # fmt: skip
