"""Answers scored in lockstep: equal to decoding them through a KV cache, whoever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lockstep_tools import small_model

from carpool import CarpoolError, parse, share
from carpool.evaluate.answers import Question, deal, score
from carpool.evaluate.check import in_float64
from carpool.hosts.transformers import Known
from carpool.routing.batch import Grouping

MODEL = small_model()
BATCH = Grouping.parse("batch")
PAD = 0


def questions(*lengths: tuple[int, int], seed: int = 0) -> list[Question]:
    drawn = torch.Generator().manual_seed(seed)
    ids = [torch.randint(2, 64, (sum(pair),), generator=drawn).tolist() for pair in lengths]
    return [
        Question(tuple(some[:context]), tuple(some[context:])) for some, (context, _) in zip(ids, lengths, strict=True)
    ]


ASKED = questions((5, 3), (2, 1), (9, 6), (4, 6), (7, 2))


def scored(policy: str, asked: list[Question] = ASKED, group: str = "batch", **given) -> list[tuple[float, bool]]:
    return score(MODEL, parse(policy), asked, Grouping.parse(group), num_layers=2, **given)


def decoded(policy: str, asked: list[Question], group: str) -> list[float]:
    """By real decoding: contexts but for their last tokens as padded prompts, then a token of every request a step."""
    width, steps = max(len(one.context) for one in asked) - 1, max(len(one.answer) for one in asked)
    prompts = torch.full((len(asked), width), PAD)
    mask = torch.zeros(len(asked), width + steps, dtype=torch.int64)
    for row, one in enumerate(asked):
        prompts[row, width + 1 - len(one.context) :] = torch.tensor(one.context[:-1])
        mask[row, width + 1 - len(one.context) :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    totals = [0.0] * len(asked)
    with torch.inference_mode(), share(MODEL, policy, group=group) as run:
        given = {"attention_mask": mask[:, :width], "position_ids": positions[:, :width]}
        cache = MODEL(input_ids=prompts, use_cache=True, **given).past_key_values
        for step in range(steps):
            fed = [(one.context[-1], *one.answer[:-1]) for one in asked]
            ids = torch.tensor([[tokens[step] if step < len(tokens) else PAD] for tokens in fed])
            run.known = Known(finished=torch.tensor([step >= len(tokens) for tokens in fed]))
            place = width + step
            given = {"attention_mask": mask[:, : place + 1], "position_ids": positions[:, place : place + 1]}
            logits = MODEL(input_ids=ids, past_key_values=cache, use_cache=True, **given).logits[:, -1].log_softmax(-1)
            for row, one in enumerate(asked):
                if step < len(one.answer):
                    totals[row] += float(logits[row, one.answer[step]])
    return totals


@pytest.mark.parametrize(
    ("policy", "group"), [("oea(k0=1)", "batch"), ("xshare(budget=3)", "batch"), ("topk(1)", "request")]
)
def test_scoring_is_decoding(policy: str, group: str) -> None:
    with in_float64(MODEL):
        together = [log_likelihood for log_likelihood, _ in scored(policy, group=group)]
        assert together == pytest.approx(decoded(policy, ASKED, group), abs=1e-9)
        native = [log_likelihood for log_likelihood, _ in scored("topk(2)", group=group)]
    assert min(abs(one - other) for one, other in zip(together, native, strict=True)) > 1e-3  # one token is enough


def test_stock_is_the_models_own_likelihood() -> None:
    for (log_likelihood, greedy), one in zip(scored("topk(2)"), ASKED, strict=True):
        with torch.inference_mode():
            logits = (
                MODEL(torch.tensor([one.context + one.answer])).logits[0, len(one.context) - 1 : -1].log_softmax(-1)
            )
        assert log_likelihood == pytest.approx(float(logits[range(len(one.answer)), one.answer].sum()), abs=1e-4)
        assert greedy == (logits.argmax(-1).tolist() == list(one.answer))


def test_greedy_answers_are_recognised() -> None:
    (context,) = (one.context for one in ASKED[:1])
    with torch.inference_mode():
        made = MODEL.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False, pad_token_id=PAD)
    answer = tuple(made[0, len(context) :].tolist())
    assert scored("topk(2)", [Question(context, answer)])[0][1]
    assert not scored("topk(2)", [Question(context, (*answer[:-1], (answer[-1] + 1) % 64))])[0][1]


def test_answers_that_differ_in_their_last_token_are_decoded_once() -> None:
    """All of them from one distribution, in a batch that is not larger for it."""
    seen: list[int] = []
    choices = [Question(ASKED[0].context, (7, last)) for last in (3, 4, 5)]
    found = scored("oea(k0=1)", [*choices, ASKED[1]], observe=lambda _, batch, outcome: seen.append(len(batch.real_N)))
    assert seen == [2 * 6] * 2
    assert found[0] == scored("oea(k0=1)", [choices[0], ASKED[1]])[0]
    assert len({log_likelihood for log_likelihood, _ in found}) == 4


def test_neighbours_matter_by_batch_only() -> None:
    alone = scored("oea(k0=1)", ASKED[:1])[0][0]
    assert scored("oea(k0=1)")[0][0] != pytest.approx(alone, abs=1e-3)
    assert scored("oea(k0=1)", group="request")[0][0] == pytest.approx(alone, abs=1e-4)


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9), st.integers(1, 3)), min_size=1, max_size=30),
    st.integers(1, 8),
    st.integers(0, 3),
)
def test_batches(drawn: list[tuple[int, int, int]], size: int, seed: int) -> None:
    asked = [Question((context,), tuple([first] * length)) for context, first, length in drawn]
    batches = deal(asked, size, seed)
    assert {place for batch in batches for place in batch} == set(range(len(asked)))
    stems = {one.stem for one in asked}
    for batch in batches:
        together = {asked[place].stem for place in batch}
        assert len(together) == min(size, len(stems))
        assert {place for place, one in enumerate(asked) if one.stem in together} == set(batch)
    assert batches == deal(asked, size, seed)


def test_choices_of_one_context_go_apart() -> None:
    asked = [Question((context,), (choice, 1)) for context in range(8) for choice in range(4)]
    for batch in deal(asked, 8):
        assert len({asked[place].context for place in batch}) == 8


def test_refused() -> None:
    with pytest.raises(CarpoolError, match="at least one token each"):
        Question((), (1,))
    for group in ("tenant", "prompt"):
        with pytest.raises(CarpoolError, match=f"group='{group}'.* no tenants and are nobody's samples"):
            scored("oea(k0=1)", group=group)
