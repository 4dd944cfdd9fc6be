"""From batches to metrics on a tiny model, and the refusals that keep an evaluation honest."""

import numpy as np
import pytest
import torch
from lockstep_tools import NumberTokenizer, noise, small_model

from carpool.errors import CarpoolError
from carpool.evaluate import lockstep
from carpool.evaluate.study import Settings, describe, require_possible, sequences_for, study
from carpool.plans.grammar import parse
from carpool.routing.batch import Grouping

MODEL = small_model()
TEXTS = [noise(domain, 50, seed) for seed, domain in enumerate(("a", "b") * 12)]


def settings(*policies, **changes):
    given = {"grouping": Grouping.parse("batch"), "batch_sizes": (4,), "sequence": 9, "prefill": 3, "batches": 4}
    return Settings(tuple(map(parse, policies)), **(given | changes))


def run(chosen):
    return study(MODEL, chosen, sequences_for(chosen, TEXTS, NumberTokenizer()))


def test_metrics_against_single_passes():
    """Stacking batches into one pass changes nothing, and the metrics are what the passes say."""
    chosen = settings("oea(k0=1)", batches=12)
    (sequences,) = sequences_for(chosen, TEXTS, NumberTokenizer())
    stock, oea = study(MODEL, chosen, [sequences])[0]
    (layout,), batches, moe = chosen.layouts(), 12, describe(MODEL)
    kl, union, tokens, nll = 0.0, 0.0, 0, 0.0
    for batch in range(batches):
        ids = sequences.ids_ST[batch * 4 : batch * 4 + 4]
        passes = [
            lockstep.forward(MODEL, plan, ids[:, :-1], layout, num_layers=moe.layers)
            for plan in (moe.stock, *chosen.plans)
        ]
        found = lockstep.compare(passes[0].logits_RV, passes[1].logits_RV, ids[:, layout.prefill + 1 :].flatten())
        kl, nll, tokens = kl + float(found.kl_R.sum()), nll + float(found.nll_R.sum()), tokens + len(found.kl_R)
        union += float(passes[1].layers_LFM[:, 0].sum())
    assert oea.kl.value == pytest.approx(kl / tokens, rel=1e-4)
    assert oea.perplexity.value == pytest.approx(np.exp(nll / tokens), rel=1e-5)
    assert oea.union.value == pytest.approx(union / (batches * layout.steps * moe.layers))
    assert oea.union_share.value == pytest.approx(oea.union.value / stock.union.value)
    assert oea.perplexity_ratio.value == pytest.approx(oea.perplexity.value / stock.perplexity.value)
    assert oea.kl.low <= oea.kl.value <= oea.kl.high
    assert oea.measured.changed_rows > 0
    assert set(oea.domains) == {"a", "b"}
    assert (stock.kl.value, stock.displaced_mass.value, stock.pairs) == (0.0, 0.0, 2.0)
    assert stock.top1_agreement.value == stock.perplexity_ratio.value == 1.0


def test_progress_is_told_all_rows_that_were_announced():
    """Of stock and of every plan, at every batch size."""
    chosen = settings("oea(k0=1)", "xshare(budget=2)", batch_sizes=(2, 4))
    sequences = sequences_for(chosen, TEXTS, NumberTokenizer())
    told = []
    study(MODEL, chosen, sequences, advance=told.append)
    assert sum(told) == chosen.num_rows(sequences) == (2 + 4) * 4 * 9 * 3


def test_identity_settings_are_refused_unless_allowed():
    with pytest.raises(CarpoolError, match=r"oea\(k0=2\) changed no row at batch 4"):
        run(settings("oea(k0=2)"))
    _, same = run(settings("oea(k0=2)", allow_unchanged=True))[0]
    assert (same.kl.value, same.measured.changed_rows) == (0.0, 0)
    # a budget that holds everything need not act
    assert run(settings("xshare(budget=8)"))[0][1].measured.changed_rows == 0


def test_a_policy_that_no_layer_reports_is_found(monkeypatch):
    """Negative control: a hook that observes nothing."""
    monkeypatch.setattr(lockstep.Watch, "__call__", lambda *given: None)
    with pytest.raises(CarpoolError, match="ran in 0 of 2 MoE layers"):
        run(settings("oea(k0=1)"))


def test_an_inert_policy_is_found(monkeypatch):
    """Negative control: the coreset is always everything."""
    monkeypatch.setattr("carpool.policies.oea.OEA.coreset", lambda self, inputs: torch.ones_like(inputs.native_NE[:1]))
    with pytest.raises(CarpoolError, match="changed no row"):
        run(settings("oea(k0=1)", grouping=Grouping.parse("batch")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": ()}, "no batch size"),
        ({"tokens": 0}, "--tokens 0"),
        ({"batches": 0}, "--batches 0"),
        ({"seed": -1}, "--seed -1"),
        ({"sequence": 3}, "nothing to decode"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(CarpoolError, match=message):
        settings("oea(k0=1)", **changes)


@pytest.mark.parametrize(
    ("policy", "changes", "message"),
    [
        ("xshare(budget=9)", {}, "asks for 9 of 8 experts"),
        ("sere(top=1)", {}, "needs the statistic"),
        ("oea(k0=1)", {"sequence": 200}, "exceeds the model's 128 positions"),
    ],
)
def test_impossible_for_the_model(policy, changes, message):
    with pytest.raises(CarpoolError, match=message):
        require_possible(MODEL, settings(policy, **changes), None)


def test_no_policy():
    with pytest.raises(CarpoolError, match="no policy was given"):
        settings()
