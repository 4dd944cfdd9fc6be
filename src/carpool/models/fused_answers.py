"""Answers of a fused pool: questions in, answers out, as of one expert."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch

from carpool.artefacts.files import sha256_file
from carpool.errors import CarpoolError
from carpool.models.fusion import Fusion, Report, fuse
from carpool.models.pool import Pool
from carpool.models.questions import CUT_SHORT, Answer, Question
from carpool.models.runners.in_transformers import InTransformers, load
from carpool.models.runners.records import too_long


class Fuser:
    """Loads a pool's router and experts for the time of a block, and answers with `carpool.fuse`.

    Attributes:
        name: of the whole, in answers. fingerprint: of pool, head and plan.
        report: what fusing has cost.
    """

    name = "fused"

    def __init__(self, pool: Pool, router: str, head: str | Path, plan: str, switch_cost: float = 0.0) -> None:
        """Raises CarpoolError for an expert that is not there, or a pool of the router alone."""
        self.router = pool[router]
        self.experts = [expert for expert in pool.experts if expert.name != router]
        if not self.experts:
            raise CarpoolError(f"a pool of {router} alone; add the experts that complement it")
        self.head, self.plan, self.switch_cost = head, plan, switch_cost
        told = f"{pool.fingerprint}:{router}:{sha256_file(head)}:{plan}:{switch_cost}"
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()[:16]
        self.report = Report()
        self._fusion: Fusion | None = None

    def __enter__(self) -> Fuser:
        model, tokenizer = load(self.router)
        experts = {expert.name: load(expert)[0] for expert in self.experts}
        self._fusion = fuse(model, experts, self.head, plan=self.plan, switch_cost=self.switch_cost)
        self._runner, self.report = InTransformers(model, tokenizer), self._fusion.report()
        self._fusion.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fusion is not None:
            self._fusion.__exit__(kind, error, trace)
        self._fusion = None

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer a question, greedily; a question that does not fit the router's context gets an empty one."""
        assert self._fusion is not None
        runner, expert = self._runner, self.router
        told = {
            one.id: runner.tokenizer(runner.put(expert, one), add_special_tokens=not expert.chat)["input_ids"]
            for one in questions
        }
        fit = [one for one in questions if 0 < len(told[one.id]) <= expert.context - expert.max_tokens]
        width = max((len(told[one.id]) for one in fit), default=0)
        new: dict[str, list[int]] = {}
        if fit:
            rows = [told[one.id] for one in fit]
            ids_BT = torch.tensor([[runner.pad] * (width - len(ids)) + ids for ids in rows])
            mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows])
            made = self._fusion.generate(
                ids_BT.to(runner.model.device), mask_BT.to(runner.model.device), max_new_tokens=expert.max_tokens,
                do_sample=False, pad_token_id=runner.pad, eos_token_id=sorted(runner.ends) or None,
                stop_strings=list(expert.stop) or None, tokenizer=runner.tokenizer,
            )  # fmt: skip
            new = {one.id: ids for one, ids in zip(fit, made[:, width:].tolist(), strict=True)}
        return [self._answer(one, len(told[one.id]), new.get(one.id)) for one in questions]

    def _answer(self, question: Question, read: int, ids: list[int] | None) -> Answer:
        if ids is None:
            empty = too_long(self.router, question)
            return Answer(empty.id, empty.asked, self.name, self.fingerprint, "", None, empty.finish)
        ends = [place for place, token in enumerate(ids) if token in self._runner.ends]
        text = self._runner.tokenizer.decode(ids[: ends[0]] if ends else ids, skip_special_tokens=True)
        stops = [place for stop in self.router.stop if (place := text.find(stop)) >= 0]
        finish = "stop" if ends or stops else CUT_SHORT
        text = text[: min(stops)] if stops else text
        written = ends[0] if ends else len(ids)
        return Answer(
            question.id, question.hash, self.name, self.fingerprint, text.strip(), None, finish, read, written
        )
