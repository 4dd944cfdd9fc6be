"""The text form: what is read, what is refused, and in what words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policies_under_test import ROWS, Row

from carpool import CarpoolError, Grouping, Plan, parse
from carpool.plans.guards import DecodeOnly, Floor, MinBatch, Protect, ShortCircuit
from carpool.policies import OEA, XShare


@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_round_trip(row: Row) -> None:
    for text in row.texts(64, 8) + row.identity(64, 8):
        plan = parse(text + " | protect([3, 7]) | min_batch(2) | floor(0.3)")
        assert parse(str(plan)) == plan
        assert str(parse(str(plan))) == str(plan)


def test_reads_left_to_right_and_the_floor_acts_last() -> None:
    plan = parse(" xshare( budget = 32, warmup=0 ) | floor(0.3) | decode_only | protect((3, 7)) | short_circuit() ")
    assert plan.policy == XShare(budget=32, warmup=0)
    assert plan.guards == (DecodeOnly(), Protect((3, 7)), ShortCircuit(), Floor(0.3))
    assert str(plan) == "xshare(budget=32, warmup=0) | decode_only() | protect([3, 7]) | short_circuit() | floor(0.3)"
    assert parse(plan) is plan
    assert parse(OEA(4)) == Plan(OEA(4))


def test_serving_adds_what_is_missing() -> None:
    plan = parse("oea(4) | floor(0.2) | min_batch(5)").for_serving()
    assert plan.guards == (DecodeOnly(), ShortCircuit(), MinBatch(5), Floor(0.2))
    assert plan.for_serving() == plan


REFUSED = {
    "": "a policy is a text",
    "   ": "a policy is a text",
    "xshare(budget=32": "cannot read the policy text",
    "nope(3)": "unknown policy or guard 'nope'",
    "XShare(3)": "unknown policy or guard 'XShare'",
    "xshare": "xshare needs 'budget'",
    "xshare(1, 2, 'mass', 4)": "xshare takes budget",
    "xshare(32, budget=32)": "xshare takes budget",
    "xshare(budget=32, wormup=1)": "no parameter 'wormup'",
    "xshare(budget=32, budget=33)": "cannot read",
    "xshare(**{'budget': 3})": "each parameter once",
    "xshare(*[3])": "not a literal",
    "xshare(budget=n)": "'n' is not a literal",
    "xshare(budget=2 ** 9)": "not a literal",
    "xshare(budget=[i for i in range(3)])": "not a literal",
    "xshare(budget=f'{3}')": "not a literal",
    "xshare(budget={[]: 1})": "not a literal",
    "xshare(budget={[1]})": "not a literal",
    "xshare(budget=(lambda: 3)())": "not a literal",
    "xshare(budget=__import__('os').system('true'))": "not a literal",
    "xshare.__class__(3)": "cannot read",
    "xshare(3)(4)": "cannot read",
    "().__class__.__bases__[0].__subclasses__()": "cannot read",
    "xshare(3) or oea(4)": "cannot read",
    "xshare(3) + floor(0.3)": "cannot read",
    "xshare(3); oea(4)": "cannot read the policy text",
    "x = xshare(3)": "cannot read the policy text",
    "import os": "cannot read the policy text",
    "xshare(3) |": "cannot read the policy text",
    "| xshare(3)": "cannot read the policy text",
    "xshare(3) | oea(4)": "is a second policy",
    "floor(0.3) | xshare(3)": "is a guard",
    "floor(0.3)": "is a guard",
    "3": "cannot read '3'",
    "'xshare(3)'": "cannot read",
    "xshare(3)\0": "cannot read the policy text",
    "xshare(budget='\ud800')\0": "cannot read the policy text",
    "xshare(3) # " + "x" * 10_000: "10000 is the limit",
    "(" * 9_000: "cannot read the policy text",
    "[" * 3_000 + "]" * 3_000: "cannot read",
    "oea(" + "-" * 9_000 + "1)": "cannot read|not a literal",
    "o(" + "|".join("a" * 4_900) + ")": "cannot read|not a literal",
    "|".join("a" * 4_900): "cannot read the policy text",
    "oea(" + "9" * 9_000 + ")": "cannot read the policy text",
    "oea(0x" + "f" * 9_000 + ")": "beyond",
    "sere(2, threshold=1e999)": "beyond",
    "random(4, seed=99999999999999999999)": "beyond",
    "oea(0)": "k0=0",
    "oea(k0=2.0)": "k0=2.0",
    "oea(True)": "k0=True",
    "oea('4')": "k0='4'",
    "topk(0)": "k=0",
    "topk(k=None)": "k=None",
    "xshare(4, warmup=-1)": "warmup=-1",
    "xshare(4, utility='max')": "utility='max'",
    "des_vote()": "either beta",
    "des_vote(beta=0.5, size=8)": "either beta",
    "des_vote(beta=1.5)": "beta=1.5",
    "des_vote(size=0.5)": "size=0.5",
    "sere(0)": "top=0",
    "sere(2, threshold=-0.1)": "threshold=-0.1",
    "sere(2, threshold='high')": "threshold='high'",
    "sere(2, metric='l2')": "metric='l2'",
    "random(4, seed=1.5)": "seed=1.5",
    "oea(4) | min_batch(0)": "min_batch",
    "oea(4) | min_batch(2.5)": "min_batch",
    "oea(4) | min_batch()": "min_batch needs 'voters'",
    "oea(4) | protect()": "protect needs 'experts'",
    "oea(4) | protect([])": "protect",
    "oea(4) | protect(3)": "protect",
    "oea(4) | protect([-1])": "protect",
    "oea(4) | protect(['3'])": "protect",
    "oea(4) | floor(1.5)": "floor",
    "oea(4) | floor(-0.1)": "floor",
    "oea(4) | floor('0.3')": "floor",
    "oea(4) | floor(True)": "floor",
    "oea(4) | regret(1.5)": "regret",
    "oea(4) | regret(True)": "regret",
    "oea(4) | regret()": "regret needs 'tau'",
    "oea(4) | decode_only(3)": "decode_only takes no parameters",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: repr(text)[:40])
def test_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(CarpoolError, match=REFUSED[text]) as caught:
        parse(text)
    assert "\n" not in str(caught.value).strip()
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("thing", [None, 3, b"oea(4)", ["oea(4)"], OEA])
def test_only_texts_policies_and_plans(thing: object) -> None:
    with pytest.raises(CarpoolError, match="a policy is a text"):
        parse(thing)


@given(st.text(max_size=60) | st.text("xoeaker(){}[]|=,.'\"0123456789-_ \n", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        plan = parse(text)
    except CarpoolError:
        return
    assert parse(str(plan)) == plan


IMPOSSIBLE = {
    "xshare(budget=0)": "budget=0 asks for 0",
    "xshare(budget=65)": "asks for 65 of 64",
    "xshare(budget=-1)": "budget=-1",
    "xshare(budget=0.001)": "asks for 0 of 64",
    "xshare(budget=1.5)": "must be in",
    "xshare(budget=0.0)": "must be in",
    "xshare(budget=True)": "budget=True",
    "xshare(budget='32')": "budget='32'",
    "xshare(budget=[32])": r"budget=\[32\]",
    "xshare(budget=None)": "budget=None",
    "xshare(budget=1j)": "budget=1j",
    "xshare(budget=8, warmup=9)": "exceeds the model's 8",
    "oea(9)": "exceeds the model's 8",
    "des_seq(9)": "exceeds the model's 8",
    "topk(9)": "exceeds the model's 8",
    "sere(9)": "exceeds the model's 8",
    "des_vote(size=7)": "fewer than the model's 8",
    "des_vote(beta=0.1)": "fewer than the model's 8",
    "des_vote(size=65)": "of 64 experts",
    "random(0)": "asks for 0",
    "oea(4) | protect([64])": "expert 64 of a layer with 64",
}


@pytest.mark.parametrize("text", IMPOSSIBLE)
def test_what_a_layer_cannot_do_is_refused(text: str) -> None:
    plan = parse(text)
    with pytest.raises(CarpoolError, match=IMPOSSIBLE[text]):
        plan.check(64, 8)


@pytest.mark.parametrize("text", ["batch", "tenant", "prompt", "request", "position", "block:1", "block:32"])
def test_grouping_round_trip(text: str) -> None:
    assert str(Grouping.parse(text)) == text
    assert Grouping.parse(Grouping.parse(text)) == Grouping.parse(text)


@pytest.mark.parametrize(
    "text", ["", "Batch", "block", "block:", "block:0", "block:-1", "block:x", "batch ", "block:٣"]
)
def test_grouping_refused(text: str) -> None:
    with pytest.raises(CarpoolError, match="unknown grouping"):
        Grouping.parse(text)
