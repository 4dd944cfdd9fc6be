"""What a search measures is what an evaluation of the same batches says, and statistics come from the searched text."""

import pytest
from lockstep_tools import NumberTokenizer, noise
from test_tune_command import LAYOUT, MODEL, command  # noqa: F401  # a fixture

from carpool.artefacts.texts import load_texts
from carpool.errors import CarpoolError
from carpool.evaluate.study import Settings, describe, sequences_for, study
from carpool.plans.grammar import parse
from carpool.tune import Trials
from carpool.tune.split import split


def test_points_are_what_an_evaluation_measures():
    """KL, perplexity over stock's and bytes over stock's; at a tight budget all differ from what stock gives."""
    plans = (parse("xshare(budget=2)"), parse("oea(k0=1)"))
    settings = Settings(plans, LAYOUT.grouping, (4,), sequence=9, prefill=3, batches=10)
    (sequences,) = sequences_for(settings, [noise("a", 50, seed) for seed in range(20)], NumberTokenizer())
    _, *expected = study(MODEL, settings, [sequences])[0]
    trials = Trials(MODEL, describe(MODEL), sequences, LAYOUT)
    for point, result in zip(trials.measure(plans), expected, strict=True):
        assert point.policy == result.measured.name
        assert point.kl == pytest.approx(result.kl.value)
        assert point.perplexity_ratio == pytest.approx(result.perplexity_ratio.value)
        assert abs(point.perplexity_ratio - 1) > 1e-4
        assert point.share == pytest.approx(result.bytes_share.value)
        assert point.share < 1


def test_statistics_are_calibrated_on_the_searched_text(command, tmp_path, monkeypatch):  # noqa: F811
    """Nothing of the text that verifies is seen before."""
    calibrated = []

    def spy(documents, *given):
        calibrated.extend(one.text for one in documents)
        raise CarpoolError("seen")

    monkeypatch.setattr("carpool.calibrate.token_sequences", spy)
    done, _ = command("--max-kl", 0.2, "-p", "surrogate")
    assert "seen" in done.output
    halves = split(load_texts([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]))
    assert calibrated == [one.text for one in halves.search]
    assert not {one.text for one in halves.verify} & set(calibrated)
