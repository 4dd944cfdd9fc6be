"""FusionRoute's claim on small experts: does adding a routed expert's logits beat each of its parts, and what is read?

    python benchmarks/models_fusion.py WORK CORPUS --experts prose python math --output docs/results/models-fusion.json

WORK holds what `recipes/model_experts/train.py` and `fuse.py` made. Held-out windows of one domain, and windows that
change their domain half-way, under teacher forcing: at each token every model sees the text so far. Accuracy of the
best token, and nats a token at the best temperature (a sum of two log-probabilities is too sharp at 1); intervals over
windows. Beside the paper's rows stand the controls that it lacks: the router with one fixed expert, a uniform ensemble,
the router alone after the same training, and an oracle that knows the next token.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from model_items import documents
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import carpool
from carpool import Batch, RouteSpec, parse, route
from carpool.artefacts.files import write_text
from carpool.models.fuse import fused, informative

LENGTH = 128
TEMPERATURES = (0.8, 1.0, 1.5, 2.0, 2.5)
PLANS = ("xshare(budget=1, warmup=0)", "xshare(budget=2, warmup=0)", "xshare(budget=1, warmup=0) | regret(0.2)")
HEAD_FILE = "router_head.safetensors"
TOGETHER = 8  # texts of a batch that share a plan


def windows(corpus: Path, domains: list[str], tokenizer: Any, count: int, splice: bool) -> Tensor:
    """Held-out windows `[count, LENGTH + 1]`, the domains in turns."""
    generator = torch.Generator().manual_seed(int(splice))
    streams = {}
    for name in domains:
        ids: list[int] = []
        for text in documents(corpus, name)[:60]:
            ids += [*tokenizer(text[:6000])["input_ids"], tokenizer.eos_token_id]
        streams[name] = torch.tensor(ids)

    def piece(name: str, length: int) -> Tensor:
        start = int(torch.randint(0, len(streams[name]) - length, (), generator=generator))
        return streams[name][start : start + length]

    rows = []
    for place in range(count):
        first, second = domains[place % len(domains)], domains[(place + 1 + place // len(domains)) % len(domains)]
        half = (LENGTH + 1) // 2 if splice else LENGTH + 1
        rows.append(torch.cat([piece(first, half), piece(second, LENGTH + 1 - half)]) if splice else piece(first, half))
    return torch.stack(rows)


class Tally:
    """Sums by window of each row of the table."""

    def __init__(self) -> None:
        self.right: dict[str, list[float]] = {}
        self.nats: dict[str, list[list[float]]] = {}

    def add(self, name: str, logits_BTV: Tensor, targets_BT: Tensor) -> None:
        right_BT = (logits_BTV.argmax(-1) == targets_BT).double()
        self.right.setdefault(name, []).extend(right_BT.mean(-1).tolist())
        by_temperature = []
        for temperature in TEMPERATURES:
            told_BTV = (logits_BTV / temperature).log_softmax(-1)
            by_temperature.append(-told_BTV.gather(-1, targets_BT.unsqueeze(-1)).squeeze(-1).mean(-1))
        self.nats.setdefault(name, []).extend(torch.stack(by_temperature, -1).tolist())

    def row(self, name: str, against: str) -> dict[str, Any]:
        right_W = torch.tensor(self.right[name], dtype=torch.float64)
        gain_W = right_W - torch.tensor(self.right[against], dtype=torch.float64)
        nats_WX = torch.tensor(self.nats[name], dtype=torch.float64)
        best = int(nats_WX.mean(0).argmin())
        return {
            "row": name, "accuracy": round(float(right_W.mean()), 4), "half_width": round(_half(right_W), 4),
            "against_router_alone": round(float(gain_W.mean()), 4), "against_half_width": round(_half(gain_W), 4),
            "nats": round(float(nats_WX[:, best].mean()), 4), "temperature": TEMPERATURES[best],
            "nats_at_1": round(float(nats_WX[:, TEMPERATURES.index(1.0)].mean()), 4),
        }  # fmt: skip


def _half(values: Tensor) -> float:
    return 1.96 * float(values.std()) / math.sqrt(len(values))


def costs(chosen_BT: Tensor, experts: int) -> dict[str, float]:
    """Of a routing by token: switches and late tokens a token, and distinct experts a step of `TOGETHER` texts."""
    switches = late = 0
    for row in chosen_BT.tolist():
        read = [0] * experts  # where each was chosen last; what comes before a text's first token is its prompt
        for place, expert in enumerate(row):
            late += max(0, place - read[expert] - 1)
            read[expert] = place
            switches += place > 0 and expert != row[place - 1]
    distinct = [len(set(column)) for part in chosen_BT.split(TOGETHER) for column in part.T.tolist()]
    return {
        "switches_a_token": round(switches / chosen_BT.numel(), 4),
        "late_tokens_a_token": round(late / chosen_BT.numel(), 4),
        "experts_a_step": round(sum(distinct) / len(distinct), 3),
    }  # fmt: skip


def routed(plan: str, w_BTE: Tensor) -> Tensor:
    """The expert of each token, `[B, T]`; texts of a batch share a step, `TOGETHER` at a time."""
    rows, length = w_BTE.shape[:2]
    step_BT = torch.arange(rows)[:, None] // TOGETHER * length + torch.arange(length)
    steps = int(step_BT.max()) + 1
    batch = Batch.of(
        rows * length, group_N=step_BT.flatten(), num_groups=steps, step_N=step_BT.flatten(), num_steps=steps
    )
    return (
        route(parse(plan), RouteSpec(top_k=1), w_BTE.flatten(0, 1), batch).routing.ids_NK.reshape(rows, length).long()
    )


def table(work: Path, names: list[str], ids_BT: Tensor) -> dict[str, Any]:
    """All rows over some windows."""

    def model(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(work / name, dtype=torch.float32).eval()

    experts, tally = [model(name) for name in names], Tally()
    routers = {"": "router", " (before preferences)": "router-sft"}
    chosen: dict[str, list[Tensor]] = {}
    told_positions = []
    loaded = {label: model(folder) for label, folder in routers.items()}
    heads = {label: load_file(work / folder / HEAD_FILE)["router_head"] for label, folder in routers.items()}
    for part_BT in ids_BT.split(TOGETHER):
        text_BT, targets_BT = part_BT[:, :-1], part_BT[:, 1:]
        told_EBTV = torch.stack([expert(text_BT).logits for expert in experts])
        told_positions.append(informative(told_EBTV).double().mean())
        log_EBTV = told_EBTV.log_softmax(-1)
        for name, logits_BTV in zip(names, told_EBTV, strict=True):
            tally.add(f"expert {name}", logits_BTV, targets_BT)
        tally.add("uniform ensemble of experts", log_EBTV.mean(0), targets_BT)
        for label, router in loaded.items():
            states_BTH = router.model(input_ids=text_BT).last_hidden_state
            own_BTV, w_BTE = router.lm_head(states_BTH), states_BTH @ heads[label].T
            tally.add(f"router alone{label}", own_BTV, targets_BT)
            plans = {"": w_BTE.argmax(-1)} | ({} if label else {f", {plan}": routed(plan, w_BTE) for plan in PLANS})
            for plan, choice_BT in plans.items():
                index = choice_BT[None, ..., None].expand(1, *choice_BT.shape, told_EBTV.shape[-1])
                expert_BTV = told_EBTV.gather(0, index)[0]
                if not plan:
                    tally.add(f"routed only{label}", expert_BTV, targets_BT)
                tally.add(f"fused{label}{plan}", fused(own_BTV, expert_BTV), targets_BT)
                chosen.setdefault(f"fused{label}{plan}", []).append(choice_BT)
            if not label:
                for name, logits_BTV in zip(names, told_EBTV, strict=True):
                    tally.add(f"router + always {name}", fused(own_BTV, logits_BTV), targets_BT)
                tally.add("router + ensemble", own_BTV.log_softmax(-1) + log_EBTV.mean(0), targets_BT)
                best_BT = log_EBTV.gather(-1, targets_BT[None, ..., None].expand(len(names), -1, -1, 1)).argmax(0)[
                    ..., 0
                ]
                index = best_BT[None, ..., None].expand(1, *best_BT.shape, told_EBTV.shape[-1])
                tally.add("router + oracle", fused(own_BTV, told_EBTV.gather(0, index)[0]), targets_BT)
                chosen.setdefault("router + oracle", []).append(best_BT)
    rows = [tally.row(name, "router alone") for name in tally.right]
    for row in rows:
        if row["row"] in chosen:
            row |= costs(torch.cat(chosen[row["row"]]), len(names))
    return {"windows": len(ids_BT), "informative": round(float(torch.stack(told_positions).mean()), 4), "rows": rows}


def written(work: Path, names: list[str], tokenizer: Any, corpus: Path) -> list[dict[str, Any]]:
    """What writing with `carpool.fuse` costs: eight texts of 64 tokens after prompts of 32."""
    router, *experts = (
        AutoModelForCausalLM.from_pretrained(work / name, dtype=torch.float32) for name in ("router", *names)
    )
    head = work / "router" / HEAD_FILE
    ids_BT = windows(corpus, names, tokenizer, TOGETHER, splice=False)[:, :32]
    made = []
    for plan, cost in (("topk(k=1)", 0.0), ("topk(k=1)", 0.05), *((plan, 0.0) for plan in PLANS)):
        with carpool.fuse(router, dict(zip(names, experts, strict=True)), head, plan=plan, switch_cost=cost) as run:
            run.generate(ids_BT, max_new_tokens=64, do_sample=False, pad_token_id=1)
        told = run.report()
        made.append({
            "plan": plan, "switch_cost": cost, "steps": told.steps, "tokens": told.tokens, "switches": told.switches,
            "late_tokens": told.caught_up, "prompt_tokens": told.prompt,
            "models_a_step": round(told.reads / told.steps, 3), "bytes_a_step": told.bytes // told.steps,
        })  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--experts", nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.work / "base")
    result: dict[str, Any] = {"experts": arguments.experts, "length": LENGTH, "texts_a_step": TOGETHER}
    with torch.inference_mode():
        for name, splice in (("one domain", False), ("spliced", True)):
            ids_BT = windows(arguments.corpus, arguments.experts, tokenizer, arguments.windows, splice)
            result[name] = table(arguments.work, arguments.experts, ids_BT)
            for row in result[name]["rows"]:
                Console().print(name, row, soft_wrap=True)
        result["written"] = written(arguments.work, arguments.experts, tokenizer, arguments.corpus)
    write_text(arguments.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
