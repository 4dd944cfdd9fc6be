"""The search of `carpool tune`: the target is kept on unseen text, nothing cheaper on the grid keeps it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lockstep_tools import NumberTokenizer, noise, small_model
from rich.console import Console

from carpool.cli import tune as tune_command
from carpool.cli import tune_view
from carpool.errors import CarpoolError
from carpool.evaluate import loop
from carpool.evaluate.layout import Layout
from carpool.evaluate.sequences import draw
from carpool.evaluate.study import Settings, describe, study
from carpool.routing.batch import Grouping
from carpool.tune import DEFAULT, Failed, Point, Target, Trials, Tuned, bounded, family, measurable, tune
from carpool.tune import search as search_module
from carpool.tune import trials as trials_module

MODEL = small_model()
LAYOUT = Layout(4, 9, 3, Grouping.parse("batch"))
SMALL = ["--batch", "4", "--tokens", "240", "--sequence", "9", "--prefill", "3", "-p", "xshare", "--also-batch", ""]


def sequences(seed, batches=10):
    documents = [noise("a", 60, 100 * seed + number) for number in range(batches)]
    return draw(documents, NumberTokenizer(), count=4 * batches, length=9, seed=seed, batches=batches)


def trials(seed, **given):
    return Trials(MODEL, describe(MODEL), sequences(seed), LAYOUT, **given)


def test_points_are_what_an_evaluation_measures():
    """Interval, perplexity ratio (above 1 where text is predicted worse) and bytes."""
    plans = [family("xshare").at(3), family("topk").at(1), family("xshare").at(6)]
    settings = Settings(tuple(plans), LAYOUT.grouping, (4,), sequence=9, prefill=3, batches=10)
    ((_, *found),) = study(MODEL, settings, [sequences(0)])
    points = trials(0).measure(plans)
    for point, one in zip(points, found, strict=True):
        assert (point.kl, point.kl_low, point.kl_high) == pytest.approx((one.kl.value, one.kl.low, one.kl.high))
        assert point.kl_low < point.kl < point.kl_high
        assert point.perplexity_ratio == pytest.approx(one.perplexity_ratio.value)
        assert point.share == pytest.approx(one.bytes_share.value)
    assert max(point.perplexity_ratio for point in points) > 1.001


def test_few_batches_are_no_evidence():
    with pytest.raises(CarpoolError, match=r"9 batches do not show how sure .* on 10 or more \(--tokens\)"):
        Trials(MODEL, describe(MODEL), sequences(0, batches=9), LAYOUT)


def test_bisection_finds_what_a_full_scan_finds():
    chosen = family("xshare")
    for target in (Target(max_kl=0.2), Target(max_perplexity_ratio=1.02), Target(bytes=0.7)):
        search = trials(0)
        _, value = search_module.edge([chosen], target, search)
        scanned = [search.measure([chosen.at(value)])[0] for value in range(1, 9)]
        good = [one for one in scanned if target.met(one.kl, one.perplexity_ratio, one.share)]
        assert search.measure([chosen.at(value)]) == [good[0 if target.bounds_quality else -1]], target


def test_families_that_cannot_win_are_left_early():
    """The winner is that of a full scan of all families, and the losers were not searched to their ends."""
    names = ("xshare(budget=1, utility='squared')", "des_vote", "lynx", "xshare", "topk", "random")
    families = [family(one) for one in names]
    left = 0
    for target in (Target(max_kl=0.1), Target(bytes=0.7)):
        search, scan = trials(0), trials(0)
        winner, value = search_module.edge(families, target, search)
        edges = []
        for one in families:
            points = scan.measure([one.at(value) for value in one.values(8, 2)])
            good = [point for point in points if target.met(point.kl, point.perplexity_ratio, point.share)]
            edges += good[:1] if target.bounds_quality else good[-1:]
        costs = [point.share if target.bounds_quality else point.kl for point in edges]
        (best,) = search.measure([winner.at(value)])
        assert (best.share if target.bounds_quality else best.kl) == min(costs), target
        alone = trials(0)
        for one in families:
            search_module._bisect(one, one.values(8, 2), target, alone, None)
        left += len(alone.points) - len(search.points)
    assert left >= 2


def test_stock_runs_once(monkeypatch):
    real, seen = loop.forward, []
    monkeypatch.setattr(
        loop, "forward", lambda model, plan, *given, **named: seen.append(str(plan))
        or real(model, plan, *given, **named),
    )  # fmt: skip
    search, chosen = trials(0), family("xshare")
    kept = [search.measure([chosen.at(value)])[0] for value in (3, 4)]
    assert sorted(seen) == ["topk(k=2)", "xshare(budget=3)", "xshare(budget=4)"]
    monkeypatch.setattr(trials_module, "KEPT", 0)
    anew = trials(0)
    assert [anew.measure([chosen.at(value)])[0] for value in (3, 4)] == kept
    assert seen.count("topk(k=2)") == 3


@pytest.mark.parametrize(("high", "met"), [(0.15, True), (0.25, True), (0.25, False)])
def test_what_is_printed_is_what_was_verified(high, met, capsys):
    target, seen = Target(max_kl=0.2), Point("xshare(budget=3)", 0.1, 0.07, high, 1.05, 0.4)
    found = Tuned(family("xshare").at(3), replace(seen, kl=0.01), seen, met)
    options, files = tune_command.Options(model="some/model", batch=4), tune_view.Files(Path("mine.json"))
    tune_command.show(Console(width=400), options, target, found, 12, files, [])
    said = capsys.readouterr().out
    assert (
        """vllm serve some/model --additional-config '{"carpool": {"file": "mine.json", "isolation": "batch"}}'"""
        in said
    )
    assert f"reads 40.0% of what stock reads, at KL 0.1000 (0.0700 to {high:.4f}, 12 batches)" in said
    assert ("its interval reaches beyond the target" in said) == (met and high > 0.2)
    assert ("misses the target" in said) == (not met)


CHEAP, KEPT = Point("xshare(budget=3)", 0.19, 0.1, 0.2, 1.04, 0.589), Point("xshare(budget=4)", 0.1, 0, 0.2, 1.0, 0.623)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (Target(max_kl=0.2), "KL 0.2600 > 0.2"),
        (Target(max_perplexity_ratio=1.05), "perplexity x 1.0700 > 1.05"),
        (Target(bytes=0.6), "reads 61.0% > 60.0%"),
    ],
)
def test_why_cheaper_plans_failed(target, said):
    failed = Failed(CHEAP, replace(CHEAP, kl=0.26, perplexity_ratio=1.07, share=0.61))
    found = Tuned(family("xshare").at(4), KEPT, KEPT, True, (failed,))
    assert tune_view.why_not(found, target) == [
        f"xshare(budget=3) (58.9% on the searched text) failed verification: {said}"
    ]


def test_what_failed_verification_is_kept(monkeypatch):
    """The edge of the search is missed on the other text: the answer is the next value, and says why."""
    search, verify, chosen = trials(0), trials(1), family("xshare")
    (edge,) = search.measure([chosen.at(search_module.edge([chosen], Target(max_kl=0.1), search)[1])])
    real = verify.measure
    monkeypatch.setattr(
        verify,
        "measure",
        lambda plans: [replace(one, kl=0.5) if one.policy == edge.policy else one for one in real(plans)],
    )
    found = tune([chosen], Target(max_kl=0.1), search, verify)
    assert found.met
    assert [(one.searched, one.verified.kl) for one in found.failed] == [(edge, 0.5)]
    assert found.plan != edge.policy


def test_families():
    assert str(family("xshare | floor(0.3)").at(5)) == "xshare(budget=5) | floor(0.3)"
    assert str(family("oea").at(2)) == "oea(k0=2)"
    assert family("xshare | floor(0.3)").name == "xshare | floor(0.3)"
    assert family("xshare(budget=1, utility='squared')").name == "xshare(utility='squared')"
    assert family("oea").values(8, 2) == [1, 2]
    with pytest.raises(CarpoolError, match="no number to tune"):
        family("top_p(p=0.5)")


def test_bytes_are_searched_in_hundredths_up_to_the_deepest_depth():
    depth = family("depth | floor(0.3)")
    assert depth.values(64, 8) == [], "without statistics nobody knows how deep the experts are stored"
    stored = {"depth_bytes": torch.tensor([0.14, 0.27]), "depth_use": torch.zeros(3, 2, 64)}
    stored["depth_use"][0, :, :8] = 0.1  # a lone row uses eight experts
    (known,) = bounded([depth], stored)
    assert known.values(64, 8) == list(range(8, 28))
    (whole,) = bounded([family("depth(bytes=0.25, levels=[2, 3])")], stored)
    assert whole.values(64, 8) == list(range(15, 28)), "no expert that is read takes less"
    stored["depth_use"][0, :, 1:] = 0.0  # or one, which is read with 14 % at the least
    (lone,) = bounded([depth], stored)
    assert lone.values(64, 1) == list(range(15, 28))
    assert str(known.at(22)) == "depth(bytes=0.22) | floor(0.3)"
    assert bounded([family("xshare")], {}) == [family("xshare")]


def test_families_without_their_statistics_are_left_out():
    families = [family(one) for one in DEFAULT]
    assert [one.plan.policy.name for one in families[:2]] == ["depth", "surrogate"]
    names = {one.plan.policy.name for one in measurable(families, {"coverage"})}
    assert names == {"xshare", "des_vote", "lynx"}
    assert measurable(families, [name for one in families for name in one.required_stats]) == families
