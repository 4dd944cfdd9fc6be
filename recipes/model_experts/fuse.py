"""Trains FusionRoute's router on experts of `train.py`: supervised, then with preferences (arXiv 2601.05106).

    python fuse.py CORPUS WORK --experts prose python math

Writes `WORK/router-sft`, `WORK/router` (after both phases) and the head of each (`router_head.safetensors` in them).
The paper's mixture: supervised samples train everything, preference samples the router's own weights alone, never the
head. A better answer is the text's own continuation, a worse one what the chosen expert writes itself.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tomllib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "reference_model"))

from train import batch_at, save, stream

from carpool.models.fuse import answer_logprobs, cdpo_loss, sft_loss

LOG_STEPS = 20


def states(router, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `[B, T, V]` and last hidden states `[B, T, H]` of the router."""
    made = router.model(input_ids=ids_BT).last_hidden_state
    return router.lm_head(made), made


@torch.no_grad()
def experts_logits(experts: list, ids_BT: Tensor) -> Tensor:
    return torch.stack([expert(ids_BT).logits for expert in experts])


def spliced(streams: list[Tensor], step: int, train: dict) -> Tensor:
    """Windows `[B, T + 1]` of which every second one changes its domain half-way."""
    ids_BT = batch_at(streams, step, train)
    half = ids_BT.shape[1] // 2
    ids_BT[::2, half:] = ids_BT.roll(1, 0)[::2, half:]
    return ids_BT


def supervised(router, head: torch.nn.Linear, experts: list, ids_BT: Tensor, share: float) -> Tensor:
    logits_BTV, states_BTH = states(router, ids_BT[:, :-1])
    told_EBTV = experts_logits(experts, ids_BT[:, :-1])
    counted_BT = torch.ones_like(ids_BT[:, 1:], dtype=torch.bool)
    own, routed = sft_loss(logits_BTV, head(states_BTH), told_EBTV, ids_BT[:, 1:], counted_BT, share=share)
    return own + routed


def preferred(router, reference, head: torch.nn.Linear, experts: list, ids_BT: Tensor, settings: dict) -> Tensor:
    """CDPO on pairs: the text's own continuation, and a sample of the expert that the head chooses first."""
    prompt = settings["prompt"]
    end = prompt + settings["answer"]
    with torch.no_grad():
        chosen_B = head(states(router, ids_BT[:, :prompt])[1][:, -1]).argmax(-1)
        worse = [
            experts[expert].generate(row[None, :prompt], max_new_tokens=end - prompt, min_new_tokens=end - prompt,
                                     do_sample=True, top_k=0, pad_token_id=0)[0]
            for expert, row in zip(chosen_B.tolist(), ids_BT, strict=True)
        ]  # fmt: skip
    pairs_2BT = torch.stack([ids_BT[:, :end], torch.stack(worse)])
    told = [_answer(router, reference, head, experts, ids, prompt) for ids in pairs_2BT]
    router_2BT, reference_2BT, expert_2BT = (torch.stack(each) for each in zip(*told, strict=True))
    counted = torch.ones_like(expert_2BT, dtype=torch.bool)
    return cdpo_loss(router_2BT, reference_2BT, expert_2BT, counted, beta=settings["beta"])


def _answer(router, reference, head, experts: list, ids_BT: Tensor, prompt: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the tokens after the prompt: router, reference, and the expert chosen at each token."""
    logits_BTV, states_BTH = states(router, ids_BT[:, :-1])
    with torch.no_grad():
        before_BTV, _ = states(reference, ids_BT[:, :-1])
        chosen_BT = head(states_BTH).argmax(-1)
        told_EBTV = experts_logits(experts, ids_BT[:, :-1])
        index_1BT1 = chosen_BT[None, ..., None].expand(1, *chosen_BT.shape, told_EBTV.shape[-1])
        expert_BTV = told_EBTV.gather(0, index_1BT1)[0]
    targets_BT = ids_BT[:, 1:]
    own_BT, expert_BT = answer_logprobs(logits_BTV, expert_BTV, targets_BT)
    before_BT, _ = answer_logprobs(before_BTV, expert_BTV, targets_BT)
    return own_BT[:, prompt - 1 :], before_BT[:, prompt - 1 :], expert_BT[:, prompt - 1 :]


def write(router, head: torch.nn.Linear, tokenizer, folder: Path) -> None:
    save(router, tokenizer, folder)
    save_file({"router_head": head.weight.detach().contiguous()}, folder / "router_head.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--experts", nargs="+", required=True)
    arguments = parser.parse_args()
    config = tomllib.loads((HERE / "config.toml").read_text())
    settings, train, work = config["fusion"], config["train"] | {"seed": config["train"]["seed"] + 1}, arguments.work
    train["batch"] = settings["batch"]
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    torch.manual_seed(train["seed"])

    def model(name: str):
        return AutoModelForCausalLM.from_pretrained(work / name, dtype=torch.float32)

    experts = [model(name).eval().requires_grad_(False) for name in arguments.experts]
    streams = [
        stream(arguments.corpus, name, config["domains"][name], tokenizer) for name in arguments.experts
    ]  # fmt: skip
    router = model("base")
    head = torch.nn.Linear(router.config.hidden_size, len(experts), bias=False)
    torch.nn.init.zeros_(head.weight)
    groups = [
        {"params": router.parameters(), "lr": settings["learning_rate"]},
        {"params": head.parameters(), "lr": settings["head_learning_rate"]},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(settings["steps"]):
        loss = supervised(router, head, experts, spliced(streams, step, train), settings["share"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % LOG_STEPS == 0:
            print(f"supervised: step {step + 1}, loss {loss.item():.3f}", flush=True)
    write(router, head, tokenizer, work / "router-sft")
    reference = copy.deepcopy(router).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(router.parameters(), lr=settings["preference_learning_rate"], weight_decay=0.0)
    for step in range(settings["preference_steps"]):
        ids_BT = batch_at(streams, settings["steps"] + step, train)
        loss = preferred(router, reference, head, experts, ids_BT, settings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % LOG_STEPS == 0:
            print(f"preferences: step {step + 1}, loss {loss.item():.3f}", flush=True)
    write(router, head, tokenizer, work / "router")


if __name__ == "__main__":
    main()
