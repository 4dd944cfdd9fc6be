"""What each expert of a pool is good at, by skill, from questions with known answers (Symbolic-MoE, arXiv 2503.05641).

Shapes: `N` questions, `E` experts, `S` skills.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from carpool.artefacts.files import write_text
from carpool.artefacts.json_text import read_json
from carpool.errors import CarpoolError
from carpool.models.pool import Pool
from carpool.models.questions import Answers, Question, is_right

SCHEMA = 1
Nearest = Callable[[str, Sequence[str]], str | None]  # a question's skill among the profile's; None: to none of them


@dataclass(frozen=True)
class Profile:
    """Right less wrong answers by skill.

    Attributes:
        experts: names, in the pool's order. pool: its fingerprint.
        skills: of the questions, sorted.
        balance_ES: right less wrong answers of each expert on questions with each skill.
        right_E: share of all questions that each expert answered rightly.
        questions: how many there were.
    """

    experts: tuple[str, ...]
    pool: str
    skills: tuple[str, ...]
    balance_ES: tuple[tuple[int, ...], ...]
    right_E: tuple[float, ...]
    questions: int

    @classmethod
    def of(cls, pool: Pool, questions: Sequence[Question], answers: Answers) -> Profile:
        """Raises CarpoolError where an expert has not answered a question, or no question names a skill."""
        skills = sorted({skill for one in questions for skill in one.skills})
        if not skills:
            raise CarpoolError('no question names a skill; add "skills" to the questions that a profile is made from')
        balances, rights = [], []
        for name in pool.names:
            balance, right = dict.fromkeys(skills, 0), 0
            for one in questions:
                answer = answers.of(one, name)
                if answer is None:
                    raise CarpoolError(f"{name} has not answered question {one.id!r}; let every expert answer all")
                good = is_right(one, answer)
                right += good
                for skill in set(one.skills):
                    balance[skill] += 1 if good else -1
            balances.append(tuple(balance.values()))
            rights.append(right / len(questions))
        return cls(tuple(pool.names), pool.fingerprint, tuple(skills), tuple(balances), tuple(rights), len(questions))

    @property
    def gamma_E(self) -> Tensor:
        """Global competence, float64: each expert's share of the sum of all balances. Where an expert has no more right
        than wrong answers, shares of right answers instead: a factor below 0 would turn its ranking round."""
        total_E = torch.tensor(self.balance_ES, dtype=torch.float64).sum(-1)
        right_E = torch.tensor(self.right_E, dtype=torch.float64)
        return total_E / total_E.sum() if (total_E > 0).all() else right_E / right_E.sum().clamp_min(1e-12)

    @property
    def best(self) -> int:
        """The expert with the most right answers; the first of several."""
        return max(range(len(self.experts)), key=lambda expert: self.right_E[expert])

    def strength(self, questions: Sequence[Question], nearest: Nearest | None = None) -> tuple[Tensor, Tensor]:
        """How good each expert is at the skills of each question.

        Args:
            nearest: the profile's skill that a question's skill stands for; default: the same word.

        Returns:
            strength_NE: sum of the balances over the question's skills, float64 (the paper's S).
            empty_N: questions without any skill that the profile knows, bool.
        """
        nearest = exact if nearest is None else nearest
        place = {skill: index for index, skill in enumerate(self.skills)}
        used_NS = torch.zeros(len(questions), len(self.skills), dtype=torch.float64)
        for row, one in enumerate(questions):
            for skill in sorted(set(one.skills)):
                found = nearest(skill, self.skills)
                if found is not None:
                    used_NS[row, place[found]] += 1
        return used_NS @ torch.tensor(self.balance_ES, dtype=torch.float64).T, used_NS.sum(-1) == 0

    def require_current(self, pool: Pool) -> None:
        """Raises CarpoolError unless it describes this pool as it is now."""
        if tuple(pool.names) != self.experts:
            raise CarpoolError(
                f"the profile is of {', '.join(self.experts)}, the pool of {', '.join(pool.names)}; make it again"
            )
        if pool.fingerprint != self.pool:
            raise CarpoolError("the profile is stale: weights or settings of the pool have changed; make it again")

    def save(self, path: str | Path) -> None:
        """Write it as JSON, in one piece."""
        content = {"schema": SCHEMA, **{name: getattr(self, name) for name in self.__dataclass_fields__}}
        write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Raises CarpoolError unless the file is a profile of this version."""
        found = read_json(path, "the profile")
        try:
            if found.pop("schema") != SCHEMA:
                raise TypeError
            rows = tuple(tuple(map(int, row)) for row in found.pop("balance_ES"))
            texts = {name: tuple(map(str, found.pop(name))) for name in ("experts", "skills")}
            profile = cls(
                **texts, balance_ES=rows, right_E=tuple(map(float, found.pop("right_E"))), pool=str(found.pop("pool")),
                questions=int(found.pop("questions")),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CarpoolError(f"{path} is no profile of this version; make it again") from None
        shapes = {len(profile.balance_ES), len(profile.right_E)} | {len(profile.experts)}
        if found or len(shapes) > 1 or {len(row) for row in profile.balance_ES} != {len(profile.skills)}:
            raise CarpoolError(f"{path} is damaged: its counts do not fit its experts and skills; make it again")
        return profile


def exact(skill: str, known: Sequence[str]) -> str | None:
    """The same word, or none."""
    return skill if skill in known else None


def by_cosine(embed: Callable[[Iterable[str]], Tensor], *, least: float = 0.0) -> Nearest:
    """The nearest skill by cosine of embeddings, as in the paper; none below `least`.

    The paper has no such limit: an unrelated skill then still votes.

    Args:
        embed: texts to vectors `[., H]`, such as `SentenceTransformer.encode`.
    """
    known_SH: dict[tuple[str, ...], Tensor] = {}

    def nearest(skill: str, known: Sequence[str]) -> str | None:
        key = tuple(known)
        if key not in known_SH:
            known_SH[key] = torch.nn.functional.normalize(torch.as_tensor(embed(list(key))).double(), dim=-1)
        own_H = torch.nn.functional.normalize(torch.as_tensor(embed([skill])).double(), dim=-1)[0]
        cosine_S = known_SH[key] @ own_H
        best = int(cosine_S.argmax())
        return known[best] if float(cosine_S[best]) >= least else None

    return nearest
