"""Profiles and recruiting, by hand and in the long run; what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_pools import answered, asked, pool_of

from carpool import CarpoolError, parse
from carpool.models.profile import Profile, by_cosine
from carpool.models.questions import Question
from carpool.models.recruit import recruit, scores

POOL = pool_of("a", "b", "c")
QUESTIONS = [
    Question("1", "?", answer="yes", skills=("sums",)),
    Question("2", "?", answer="yes", skills=("sums", "units")),
    Question("3", "?", answer="yes", skills=("verse",)),
]
#                      question 1 2 3
RIGHT = {"a": (1, 1, 0), "b": (0, 0, 1), "c": (1, 0, 1)}


def profile() -> Profile:
    return Profile.of(POOL, QUESTIONS, answered(POOL, QUESTIONS, RIGHT))


def test_a_profile_by_hand() -> None:
    made = profile()
    assert made.skills == ("sums", "units", "verse")
    assert made.balance_ES == ((2, 1, -1), (-2, -1, 1), (0, -1, 1))
    assert made.right_E == pytest.approx((2 / 3, 1 / 3, 2 / 3))
    assert made.best == 0
    # sums of balances 2, -2, 0: not all above 0, so the shares of right answers
    assert made.gamma_E.tolist() == pytest.approx([0.4, 0.2, 0.4])
    w_NE, empty_N = scores(
        made, [Question("4", "?", skills=("sums", "verse")), Question("5", "?", skills=("cooking",))]
    )
    assert w_NE[0].tolist() == pytest.approx([0.4 * 1, 0.2 * -1, 0.4 * 1])
    assert empty_N.tolist() == [False, True]
    assert w_NE[1].tolist() == pytest.approx([0.4 * 2, 0.2 * -2, 0.0])


def test_gamma_is_a_share_where_it_can_be() -> None:
    right = {"a": (1, 1, 1), "b": (1, 1, 0), "c": (0, 1, 1)}
    made = Profile.of(POOL, QUESTIONS, answered(POOL, QUESTIONS, right))
    assert made.gamma_E.tolist() == pytest.approx([4 / 8, 2 / 8, 2 / 8])


def test_the_nearest_skill_is_found_and_may_be_too_far() -> None:
    where = {"sums": [1.0, 0], "units": [0, 1.0], "verse": [-1.0, 0], "adding": [0.9, 0.1], "odd": [0.0, -1.0]}
    embed = by_cosine(lambda texts: torch.tensor([where[text] for text in texts]), least=0.5)
    strength_NE, empty_N = profile().strength(
        [Question("4", "?", skills=("adding",)), Question("5", "?", skills=("odd",))], embed
    )
    assert strength_NE[0].tolist() == [2, -2, 0]
    assert empty_N.tolist() == [False, True]


def many(count: int = 3000) -> list[Question]:
    return [Question(str(number), "?", skills=("verse",)) for number in range(count)]


def test_draws_of_the_paper_are_within_binomial_limits() -> None:
    made = profile()
    w_NE, _ = scores(made, many(1))
    p_E = (w_NE[0] / 0.5).softmax(-1)
    ids_NK = recruit("paper", made, many(), recruits=3, seed=1).ids_NK
    for expert, p in enumerate(p_E.tolist()):
        share = float((ids_NK == expert).double().mean())
        assert abs(share - p) < 4 * (p * (1 - p) / ids_NK.numel()) ** 0.5
    assert torch.equal(ids_NK, recruit("paper", made, many(), recruits=3, seed=1).ids_NK)


def test_the_paper_trims_and_the_repository_does_not() -> None:
    """Gamma is the share of right answers here, for c has more wrong ones."""
    rare = Profile(("a", "b", "c"), "", ("s",), ((9,), (7,), (-9,)), (0.5, 0.5, 0.4), 9)
    skilled = [Question(str(number), "?", skills=("s",)) for number in range(2000)]
    w_NE, _ = scores(rare, skilled[:1])
    p_E = (w_NE[0] / 1.8).softmax(-1)
    assert (p_E < 0.05).tolist() == [False, False, True]
    assert recruit("paper", rare, skilled, recruits=3, temperature=1.8).used == [0, 1]
    ids_NK = recruit("repository", rare, skilled, recruits=3).ids_NK
    positive_E = w_NE[0].clamp_min(0) ** 2
    assert float((ids_NK == 0).double().mean()) == pytest.approx(float(positive_E[0] / positive_E.sum()), abs=0.03)
    assert not (ids_NK == 2).any()


def test_nobody_is_good_at_it() -> None:
    poor = Profile(("a", "b"), "", ("s",), ((-3,), (-1,)), (0.2, 0.4), 9)
    assert recruit("repository", poor, [Question("1", "?", skills=("s",))], recruits=2).ids_NK.tolist() == [[1, 1]]


def test_a_batch_shares_models_under_a_plan() -> None:
    """One wants b a little more than a; the others want a."""
    made = profile()
    batch = [Question(str(n), "?", skills=("sums",)) for n in range(5)] + [Question("v", "?", skills=("verse",))]
    free = recruit("top1", made, batch)
    assert free.used == [0, 2]
    shared = recruit("xshare(1, warmup=0)", made, batch)
    assert shared.used == [0]
    assert shared.outcome is not None
    assert shared.outcome.displaced_N.tolist() == [0] * 5 + [1]
    held = recruit(parse("xshare(1, warmup=0) | regret(0.2)"), made, batch)
    assert held.used == [0, 2]
    assert recruit("xshare(2, warmup=0)", made, batch, recruits=2).ids_NK.sort(-1).values.tolist() == [[0, 2]] * 6
    assert recruit("best", made, batch).used == [0]
    assert recruit("random", made, many(60)).used == [0, 1, 2]


@pytest.mark.parametrize(
    ("rule", "more", "said"),
    [
        ("papper", {}, "unknown rule 'papper'"), ("xshare(9)", {}, "9 of 3 experts"), ("base(2)", {}, "what only"),
        ("paper", {"recruits": 4}, "4 recruits of 3 experts"), ("paper", {"temperature": 0}, "temperature=0"),
    ],
)  # fmt: skip
def test_recruiting_is_refused_in_a_sentence(rule: str, more: dict, said: str) -> None:
    with pytest.raises(CarpoolError, match=said):
        recruit(rule, profile(), QUESTIONS, **more)


def test_profiles_are_saved_read_and_go_stale(tmp_path: Path) -> None:
    made, path = profile(), tmp_path / "profile.json"
    made.save(path)
    assert Profile.load(path) == made
    made.require_current(POOL)
    with pytest.raises(CarpoolError, match="stale"):
        made.require_current(pool_of("a", "b", "c", max_tokens=9))
    with pytest.raises(CarpoolError, match="of a, b, c, the pool of a, b"):
        made.require_current(pool_of("a", "b"))
    for broken in ("{}", "3", path.read_text().replace("units", "sums2").replace("[\n   2,", "[\n   2, 5,")):
        path.write_text(broken)
        with pytest.raises(CarpoolError, match=r"no profile|damaged"):
            Profile.load(path)


def test_profiles_need_skills_and_all_answers() -> None:
    with pytest.raises(CarpoolError, match="no question names a skill"):
        Profile.of(POOL, [Question("1", "?", answer="yes")], asked())
    with pytest.raises(CarpoolError, match="a has not answered question '1'"):
        Profile.of(POOL, QUESTIONS, asked())
    unknown = [Question("1", "?", skills=("x",))]
    with pytest.raises(CarpoolError, match="no known answer"):
        Profile.of(POOL, unknown, answered(POOL, unknown, {"a": (1,), "b": (1,), "c": (1,)}))
