"""The model type `carpool-vllm`: the harness's `vllm`, with the plugin configured; generation tasks only."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NoReturn

from lm_eval.models.vllm_causallms import VLLM

from carpool.errors import CarpoolError
from carpool.lm_eval.sums import Sums, by_task, depends, facts, require_no_cache, told
from carpool.plans.policy_file import PolicyFile, plan_or_file

PROMPTS = (
    "log-likelihood tasks score prompts, which vLLM routes natively whatever the policy: run them with the model type "
    "carpool (transformers, in lockstep)"
)


class CarpoolVLLM(VLLM):
    """See the module. The defaults of serving are added to the policy (docs/serve.md).

    Args:
        pretrained: folder or hub name.
        policy: a policy text, or a policy file.
        group: rows that share a coreset, batch or request; `max_num_seqs` says how many requests decode together.
        stats: statistics for policies that need some.
        allow_unchanged: let a policy pass that changes no row.
        others: as of `vllm`; `additional_config` may hold more settings of the plugin.

    Raises:
        CarpoolError: no policy, replicas of the engine, or what the plugin refuses.
    """

    def __init__(
        self,
        pretrained: str,
        policy: str | None = None,
        group: str = "batch",
        stats: str | None = None,
        allow_unchanged: bool = False,
        **others: Any,
    ) -> None:
        if policy is None:
            raise CarpoolError("no policy was given: add policy=... to the model's arguments, or use the type vllm")
        if int(others.get("data_parallel_size", 1)) > 1:
            raise CarpoolError("data parallelism would decode a batch in every replica: leave out data_parallel_size")
        self.plan, self.group = plan_or_file(str(policy)), group
        self.allow_unchanged, self.sums = allow_unchanged, Sums()
        kind = "file" if isinstance(self.plan, PolicyFile) else "policy"
        chosen = {kind: str(policy), "group": group, "isolation": group}
        if stats is not None:
            chosen["stats"] = str(Path(stats).resolve())
        configured = dict(others.pop("additional_config", None) or {})
        configured["carpool"] = {**configured.get("carpool", {}), **chosen}
        super().__init__(pretrained, additional_config=configured, **others)
        logging.getLogger(__name__).warning(depends(self.plan, self.group, self.together))

    @property
    def together(self) -> int:
        """The most requests that decode together."""
        return int(self.model.llm_engine.vllm_config.scheduler_config.max_num_seqs)

    def set_cache_hook(self, cache_hook: Any) -> None:
        require_no_cache(cache_hook)
        super().set_cache_hook(cache_hook)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> NoReturn:
        raise CarpoolError(PROMPTS)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> NoReturn:
        raise CarpoolError(PROMPTS)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return by_task(
            requests, lambda some: self._generate(some, disable_tqdm), self.sums, self.plan, self.allow_unchanged
        )

    def _generate(self, requests: list[Any], disable_tqdm: bool) -> list[str]:
        self._report()  # warm-up is no task
        made: list[str] = super().generate_until(requests, disable_tqdm)
        for layer in self._report():
            self.sums.add(
                rows=layer["rows"] - layer["rows_exempt"], changed_rows=layer["rows_changed"], steps=layer["steps"],
                experts_read=layer["union"], experts_natively=layer["natural_union"],
                displaced_mass=layer["displaced_mass"], expected_loss=layer["expected_loss"],
            )  # fmt: skip
        return made

    def _report(self) -> list[dict[str, Any]]:
        """Counters of the layers since the last call; all ranks count the same."""
        layers: list[dict[str, Any]] = self.model.collective_rpc("carpool_report", kwargs={"reset": True})[0]["layers"]
        return layers

    def get_model_info(self) -> dict[str, Any]:
        """The harness puts this into its results, after the tasks."""
        mine = facts(self.plan, self.sums, self.group, self.together)
        logging.getLogger(__name__).warning(told(mine))
        return {"carpool": mine}
