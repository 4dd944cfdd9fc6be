"""`carpool.fuse`: a router writes, and at each token one expert of a pool adds its logits (FusionRoute, 2601.05106).

Shapes: `B` texts, `E` experts, `H` hidden size, `V` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.models.catchup import CatchUp
from carpool.models.fuse import fused
from carpool.models.recruit import require_routable
from carpool.plans.grammar import Plan, parse
from carpool.plans.pipeline import route
from carpool.routing.batch import Batch
from carpool.routing.spec import RouteSpec

HEAD = "router_head"  # the tensor's name in its file, [E, H]
NATIVE = "topk(k=1)"  # each text its own best expert


@dataclass
class Report:
    """What fusing cost.

    Attributes:
        steps: tokens that were chosen for a whole batch. tokens: for texts that had not ended.
        switches: texts that went on with another expert than the step before.
        caught_up: tokens that experts read late, because others were chosen when they were written.
        prompt: tokens of prompts that experts read when they were first chosen.
        reads: models read, summed over steps: the router, and each expert that any text chose.
        bytes: of their weights. natural: experts that would have been read without a plan.
        chosen: tokens by expert.
    """

    steps: int = 0
    tokens: int = 0
    switches: int = 0
    caught_up: int = 0
    prompt: int = 0
    reads: int = 0
    bytes: int = 0
    natural: int = 0
    chosen: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        steps = max(1, self.steps)
        shares = ", ".join(f"{name} {count / max(1, self.tokens):.0%}" for name, count in self.chosen.items())
        return (
            f"{self.tokens} tokens in {self.steps} steps; {self.reads / steps:.2f} models and "
            f"{self.bytes / steps / 1e6:.1f} MB read a step ({1 + self.natural / steps:.2f} models without a plan); "
            f"{self.switches} switches, {self.caught_up} tokens read late, {self.prompt} of prompts; chosen: {shares}"
        )


class Fusion:
    """A router and the experts of a pool, in transformers. Make it with `carpool.fuse`; use it in a `with` block."""

    def __init__(
        self, router: Any, experts: Mapping[str, Any], head_EH: Tensor, plan: Plan, *, router_logits: bool,
        switch_cost: float,
    ) -> None:  # fmt: skip
        self.router, self.names, self.plan = router, list(experts), plan
        self.head_EH, self.router_logits, self.switch_cost = head_EH, router_logits, switch_cost
        self.experts = [CatchUp(model.eval()) for model in experts.values()]
        self.sizes, self.router_size = [_bytes(model) for model in experts.values()], _bytes(router)
        self.counted = Report(chosen=dict.fromkeys(self.names, 0))
        self.hidden_BH: Tensor | None = None
        self._hook: Any = None

    def __enter__(self) -> Fusion:
        head = self.router.get_output_embeddings()
        self._hook = head.register_forward_pre_hook(lambda _, given: self._see(given[0]))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        for expert in self.experts:
            expert.forget()

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **given: Any) -> Any:
        """`router.generate` with the fused logits; takes its arguments.

        Penalties and the like (processors that `generate` makes itself) change the router's logits alone; temperature
        and the other samplers act on the fused ones.

        Raises:
            CarpoolError: outside of a `with` block; beams or assisted decoding, whose rows change their places.
        """
        if self._hook is None:
            raise CarpoolError("fusing works inside its block only: with carpool.fuse(...) as run: run.generate(...)")
        config = given.get("generation_config") or self.router.generation_config
        beams = given.get("num_beams", config.num_beams) or 1
        if beams > 1 or given.get("assistant_model") is not None or given.get("prompt_lookup_num_tokens"):
            raise CarpoolError(
                "rows change their places under beams and assisted decoding; fuse greedily or by sampling"
            )
        from transformers import LogitsProcessorList

        ends = given.get("eos_token_id", config.eos_token_id)
        copies = given.get("num_return_sequences", config.num_return_sequences) or 1
        mask_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        step = _Step(self, mask_BL.bool().repeat_interleave(copies, 0), _as_set(ends))
        processors = LogitsProcessorList([*given.pop("logits_processor", []), step])
        for expert in self.experts:
            expert.forget()
        with torch.inference_mode():
            return self.router.generate(
                input_ids, attention_mask=mask_BL, logits_processor=processors, num_beams=1, **given
            )

    def report(self) -> Report:
        """What has been fused so far."""
        return self.counted

    def _see(self, hidden_BTH: Tensor) -> None:
        self.hidden_BH = hidden_BTH[:, -1]

    def choose(self, texts: Sequence[Sequence[int]], live_B: Tensor) -> Tensor:
        """The expert of each text for its next token, int64 `[B]`, from the router's hidden states of this step."""
        assert self.hidden_BH is not None
        logits_BE = self.hidden_BH.float() @ self.head_EH.float().T
        if self.switch_cost:
            unread = [[expert.unread(row, len(ids)) - 1 for expert in self.experts] for row, ids in enumerate(texts)]
            logits_BE = logits_BE - self.switch_cost * torch.tensor(unread, device=logits_BE.device)
        batch = Batch.of(len(texts), device=logits_BE.device, real_N=live_B)
        outcome = route(self.plan, RouteSpec(top_k=1), logits_BE, batch)
        self.counted.natural += int(outcome.inputs.native_NE[live_B].any(0).sum())
        return outcome.routing.ids_NK[:, 0].long()


class _Step:
    """A processor of logits for one call of `generate`: adds the chosen expert's log-probabilities."""

    def __init__(self, fusion: Fusion, prompt_BL: Tensor, ends: set[int]) -> None:
        self.fusion, self.prompt_BL, self.ends = fusion, prompt_BL, ends
        self.before: list[int | None] = [None] * len(prompt_BL)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        run, counted, width = self.fusion, self.fusion.counted, self.prompt_BL.shape[1]
        texts = [
            [*(ids[:width][told]).tolist(), *ids[width:].tolist()]
            for ids, told in zip(input_ids, self.prompt_BL, strict=True)
        ]
        live = [not self.ends.intersection(ids[width:].tolist()) for ids in input_ids]
        chosen = run.choose(texts, torch.tensor(live, device=scores.device)).tolist()
        made = scores.clone()
        for row, (ids, expert) in enumerate(zip(texts, chosen, strict=True)):
            if not live[row]:
                continue  # what is written after a text's end is padding
            reader = run.experts[expert]
            first, unread = row not in reader.readings, reader.unread(row, len(ids))
            logits_V = reader.logits(row, ids).to(scores.device)
            made[row] = fused(scores[row], logits_V) if run.router_logits else logits_V
            prompt = int(self.prompt_BL[row].sum()) if first else 0
            counted.prompt += prompt
            counted.caught_up += max(0, unread - prompt - 1)  # the newest token is nobody's late one
            counted.switches += self.before[row] is not None and self.before[row] != expert
            counted.chosen[run.names[expert]] += 1
            self.before[row] = expert
        used = {expert for expert, alive in zip(chosen, live, strict=True) if alive}
        counted.steps += 1
        counted.tokens += sum(live)
        counted.reads += 1 + len(used)
        counted.bytes += run.router_size + sum(run.sizes[expert] for expert in used)
        return made


def fuse(
    router: Any,
    experts: Mapping[str, Any],
    head: Tensor | str | Path,
    *,
    plan: str | Plan = NATIVE,
    router_logits: bool = True,
    switch_cost: float = 0.0,
) -> Fusion:
    """Write with a router whose logits one expert a token complements.

        with carpool.fuse(router, {"math": m, "code": c}, "head.safetensors", plan="xshare(2, warmup=0)") as run:
            run.generate(**tokenizer(texts, return_tensors="pt", padding=True), max_new_tokens=64)
        print(run.report())

    Args:
        router, experts: models of transformers with one vocabulary.
        head: `W` of the paper, `[E, H]`: experts are ranked by `W h`, `h` the router's last hidden state. Or the file
            that holds it as `router_head`.
        plan: of `carpool.parse`: which experts the texts of a batch may choose in a step, which bounds the models that
            a step reads; `| regret(tau)` bounds what that costs a text.
        router_logits: False leaves the router's own logits out (the paper's ablation): it then only chooses.
        switch_cost: taken from an expert's score for each token of the text that it would have to catch up on.

    Raises:
        CarpoolError: vocabularies differ, a head that does not fit, a plan that looks at what only layers have.
    """
    if not experts:
        raise CarpoolError("no experts to fuse; give one or more by name")
    sizes = {"the router": _vocabulary(router)} | {name: _vocabulary(model) for name, model in experts.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise CarpoolError(f"fusion adds logits token by token and needs one vocabulary; entries: {told}")
    head_EH = _head(head) if isinstance(head, str | Path) else head
    hidden = router.get_output_embeddings().weight.shape[1]
    if tuple(head_EH.shape) != (len(experts), hidden) or not bool(head_EH.isfinite().all()):
        shape = list(head_EH.shape)
        raise CarpoolError(
            f"the head is {shape}; {len(experts)} experts and a router {hidden} wide need finite numbers"
        )
    found = parse(plan)
    require_routable(found, len(experts), 1)
    if not 0 <= switch_cost < float("inf"):
        raise CarpoolError(f"switch_cost={switch_cost}: give a number, 0 or more")
    device = router.get_output_embeddings().weight.device
    return Fusion(
        router.eval(), experts, head_EH.detach().to(device), found, router_logits=router_logits, switch_cost=switch_cost
    )


def _head(path: str | Path) -> Tensor:
    from carpool.artefacts.files import read_safetensors

    tensors, _ = read_safetensors(path)
    if HEAD not in tensors:
        raise CarpoolError(f"{path} holds no {HEAD}; it is written by the recipe of fusing")
    return tensors[HEAD]


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _bytes(model: Any) -> int:
    return sum({one.data_ptr(): one.numel() * one.element_size() for one in model.parameters()}.values())


def _as_set(ends: Any) -> set[int]:
    return set() if ends is None else {ends} if isinstance(ends, int) else set(map(int, ends))
