"""Metrics of sums that are known."""

import numpy as np
import pytest
from synthetic_sums import READ, measured

from carpool.evaluate.metrics import results
from carpool.evaluate.results import write_rows


def test_every_metric_is_its_sum_over_what_it_is_of():
    """A run reads other experts than stock, so what its own rows would natively read is no measure of what it saves."""
    policy = measured(
        "xshare(budget=2)", 0.5, 0.03, 0.02,
        natural_union=6.0, union=3.0, coreset=2.0, pairs=7.0, displaced=1.2, expected_loss=0.8,
        overflow=0.25, surrogates=1.5,
    )  # fmt: skip
    stock, found = results([measured(), policy])
    assert found.union.value == pytest.approx(3)
    assert found.union_share.value == pytest.approx(3 / READ)
    assert found.bytes.value == pytest.approx(0.5 * READ)
    assert found.bytes_share.value == pytest.approx(0.5), "over stock's bytes"
    assert found.natural_union == pytest.approx(6)
    assert found.coreset == pytest.approx(2), "one group a step"
    assert found.pairs == pytest.approx(7 / 4), "four rows a step"
    assert found.displaced_mass.value == pytest.approx(0.3)
    assert found.expected_loss.value == pytest.approx(0.2)
    assert found.overflow == pytest.approx(0.25)
    assert found.surrogates == pytest.approx(1.5)
    assert found.kl.value == pytest.approx(0.03)
    assert found.top1_agreement.value == pytest.approx(0.75)
    assert found.perplexity.value == pytest.approx(np.exp(2.02))
    assert found.perplexity_ratio.value == pytest.approx(np.exp(0.02))
    assert found.domains["all"] == (found.perplexity, found.perplexity_ratio)
    assert found.union_by_layer == pytest.approx([1.5, 4.5])
    assert found.stock_union_by_layer == pytest.approx([0.5 * READ, 1.5 * READ])
    assert found.kl.low < found.kl.value < found.kl.high
    assert stock.coreset is None
    assert (stock.bytes_share.value, stock.perplexity_ratio.value, stock.kl.value) == (1.0, 1.0, 0.0)


def test_token_local_policies_have_no_coreset():
    _, found = results([measured(), measured("topk(k=1)", 0.9, 0.1, coreset=8.0)])
    assert found.coreset is None


def test_a_domain_that_no_sequence_is_of_is_left_out():
    one, stock = measured("oea(k0=1)", 0.5, 0.1), measured()
    for each in (one, stock):
        object.__setattr__(each, "domains", ("none", "all"))
        for name in ("nll_MD", "tokens_MD"):
            object.__setattr__(each, name, np.hstack([np.zeros((len(each.kl_M), 1)), getattr(each, name)]))
    assert set(results([stock, one])[1].domains) == {"all"}


@pytest.mark.parametrize("given", [{"rows": [{"kl": float("nan")}]}, {"rows": [], "seconds": float("inf")}])
def test_a_results_file_holds_numbers_alone(tmp_path, given):
    """NaN and infinity are no JSON: other programs could not read the file."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_rows(tmp_path / "results.json", given.pop("rows"), kind="test", **given)
    assert not list(tmp_path.iterdir())
