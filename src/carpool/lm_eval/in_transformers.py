"""The model type `carpool`: the harness's `hf`, with a policy; log-likelihoods are scored in lockstep."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from lm_eval import utils
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from carpool.artefacts.model_source import source_of
from carpool.artefacts.statistics import Statistics
from carpool.errors import CarpoolError
from carpool.evaluate.answers import Question, deal, score
from carpool.evaluate.study import describe
from carpool.hosts.transformers import share
from carpool.lm_eval.sums import Sums, by_task, depends, facts, require_company, require_no_cache, told
from carpool.plans.policy_file import plan_or_file, stats_for
from carpool.routing.batch import Grouping


class CarpoolLM(HFLM):
    """See the module. Prompts keep their native routing.

    Args:
        pretrained: folder or hub name; default: the reference model (`carpool[demo]`).
        policy: a policy text, or a policy file.
        group: rows that share a coreset: batch, request or block:n.
        stats: statistics for policies that need some.
        batch_size: requests that decode together; what a policy does depends on it, so it is a number.
        seed: of the choice of requests that are scored together.
        allow_unchanged: let a policy pass that changes no row.
        device, others: as of `hf`.

    Raises:
        CarpoolError: no policy, one that is impossible for the model or has nothing to share, `batch_size=auto`,
            more than one process.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        policy: str | None = None,
        group: str = "batch",
        stats: str | None = None,
        batch_size: int | str | None = 1,
        seed: int = 0,
        allow_unchanged: bool = False,
        device: str | None = None,
        **others: Any,
    ) -> None:
        if policy is None:
            raise CarpoolError("no policy was given: add policy=... to the model's arguments, or use the type hf")
        self.plan, self.grouping = plan_or_file(str(policy)), Grouping.parse(group)
        if not str(batch_size).isdecimal() or int(str(batch_size)) < 1:
            raise CarpoolError(f"batch_size={batch_size}: give the number of requests that decode together")
        require_company(self.plan, self.grouping, int(str(batch_size)))
        self.stats = None if stats is None else Statistics.load(stats)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(source_of(pretrained)[0], batch_size=int(str(batch_size)), device=device, **others)
        if self.world_size > 1:
            raise CarpoolError(f"{self.world_size} processes would each decode a batch of their own: start one")
        self.moe, self.seed, self.allow_unchanged, self.sums = describe(self.model), seed, allow_unchanged, Sums()
        self.plan.check(self.moe.experts, self.moe.top_k)
        logging.getLogger(__name__).warning(depends(self.plan, str(self.grouping), self.batch_size))

    def set_cache_hook(self, cache_hook: Any) -> None:
        require_no_cache(cache_hook)
        super().set_cache_hook(cache_hook)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        ask = super().loglikelihood
        return self._by_task(requests, lambda some: ask(some, disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return self._by_task(requests, lambda some: self._rolling(some, disable_tqdm))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        ask = super().generate_until
        return self._by_task(requests, lambda some: ask(some, disable_tqdm))

    def _by_task(self, requests: list[Any], ask: Callable[[list[Any]], list[Any]]) -> list[Any]:
        return by_task(requests, ask, self.sums, self.plan, self.allow_unchanged)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        questions = [self._question(context, answer) for _, context, answer in requests]
        batches = deal(questions, self.batch_size, self.seed)
        found: dict[int, tuple[float, bool]] = {}
        for places in tqdm(batches, disable=disable_tqdm, desc="Scoring in lockstep"):
            scored = score(
                self.model, self.plan, [questions[place] for place in places], self.grouping,
                num_layers=self.moe.layers, stats=self.stats, observe=self.sums,
            )  # fmt: skip
            for place, result in zip(places, scored, strict=True):
                found.setdefault(place, result)
        return [found[place] for place in range(len(questions))]

    def _question(self, context: list[int], answer: list[int]) -> Question:
        if len(answer) > self.max_length:
            raise CarpoolError(f"an answer of {len(answer)} tokens exceeds the model's {self.max_length}")
        kept = self.max_length + 1 - len(answer)  # the answer's last token is no input
        return Question(tuple(context[-kept:]), tuple(answer))

    def _rolling(self, requests: list[Any], disable_tqdm: bool) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        owner: list[int] = []
        for place, request in enumerate(requests):
            cut = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for context, answer in map(utils.make_disjoint_window, cut):
                windows.append((None, context, answer))
                owner.append(place)
        totals = [0.0] * len(requests)
        for place, (log_likelihood, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[place] += log_likelihood
        return totals

    def _model_generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        how: dict[str, Any] = {"group": self.grouping, "stats": stats_for(self.plan, self.stats), "observe": self.sums}
        with torch.inference_mode(), share(self.model, self.plan, **how):
            return super()._model_generate(*args, **kwargs)

    def get_model_info(self) -> dict[str, Any]:
        """The harness puts this into its results, after the tasks."""
        mine = facts(self.plan, self.sums, str(self.grouping), self.batch_size, seed=self.seed)
        logging.getLogger(__name__).warning(told(mine))
        return super().get_model_info() | {"carpool": mine}
