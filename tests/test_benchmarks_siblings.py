"""The siblings' table: who stands beside whom, and that the model itself continues the prompts."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from test_benchmarks_vllm import script

pytest.importorskip("carpool_demo", reason="the reference model is an extra")


@pytest.fixture(scope="module")
def siblings() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield script("siblings", monkeypatch)


@pytest.fixture(scope="module")
def drawn(siblings: ModuleType) -> tuple[object, object]:
    reference = siblings.Reference()
    return reference, siblings.draw_samples(reference, Namespace(batches=2, prefill=8, decoded=4, seed=0))


def test_siblings_have_a_prompt_in_common_and_strangers_a_batch(siblings: ModuleType, drawn: tuple) -> None:
    _, samples = drawn
    assert samples.ids_MPST.shape == (2, 16, 16, 13)
    kin = samples.take(2, 16)
    assert kin.ids_ST.shape == (64, 13)
    for family_ST in kin.ids_ST.split(16):
        assert len(family_ST[:, :8].unique(dim=0)) == 1
        assert len(family_ST.unique(dim=0)) > 1
    strangers = samples.take(16, 1)
    assert len(strangers.ids_ST[:, :8].unique(dim=0)) == 32
    assert torch.equal(strangers.ids_ST[::16], kin.ids_ST[::32])  # the first sample of the first prompt of every batch
    with pytest.raises(AssertionError, match="not drawn"):
        samples.take(3, 5)


def test_the_text_is_the_models_own(siblings: ModuleType, drawn: tuple) -> None:
    """Seeded, never the end of a text, and as likely as text at temperature 1 is."""
    reference, samples = drawn
    again = siblings.draw_samples(reference, Namespace(batches=2, prefill=8, decoded=4, seed=0))
    assert torch.equal(samples.ids_MPST, again.ids_MPST)
    ids_ST = samples.take(2, 16).ids_ST
    assert not (ids_ST[:, 8:] == reference.model.config.eos_token_id).any()
    with torch.inference_mode():
        log_STV = reference.model(input_ids=ids_ST[:, :-1]).logits.log_softmax(-1)[:, 7:]
    said_ST = log_STV.gather(-1, ids_ST[:, 8:, None]).squeeze(-1)
    entropy_ST = -(log_STV.exp() * log_STV).sum(-1)
    spread = float(said_ST.std()) / said_ST.numel() ** 0.5
    assert abs(float((said_ST + entropy_ST).mean())) < 5 * spread


def test_a_measurement_counts_steps_apart(siblings: ModuleType, drawn: tuple) -> None:
    reference, samples = drawn
    layout = siblings.Layout(4, 12, 8, siblings.Grouping.parse("prompt"), samples=4)
    stock, shared = siblings.measured(reference, samples.take(2, 4), layout, ["xshare(budget=10)"], {"who": "siblings"})
    assert (stock["batches"], stock["tokens"], stock["changed_rows"]) == (4, 64, 0)
    assert stock["union_by_steps"][0]["value"] == pytest.approx(stock["union"]["value"])
    assert shared["union"]["value"] <= 10 < stock["union"]["value"]
    assert shared["kl"]["value"] > 0
    assert "union_by_steps" not in shared
