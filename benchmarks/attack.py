"""How far can a stranger push a victim's tokens? Two searches against every policy and floor.

    python benchmarks/attack.py --output docs/results/attack.json

(eight to nine minutes on one core; the file grows line by line, and the same command goes on where one was stopped).
A victim decodes one token in a batch with attackers who choose all of their text (and, as with a server that lets
clients force tokens, their last token too). Both searches are coordinate ascent: one attacker after the other takes the
best of many candidates, beginning with the best of as many random co-batches.

Routing: attackers are rows whose router logits were recorded; maximises the victim's displaced mass in one layer.
Tokens: attackers are sequences run through the model. One half of the searches maximises KL(stock || policy) of the
victim's next token, the other the loss of the token that follows in its text.

A coreset is a step function of the attackers' embeddings, so the gradient of the victim's loss with respect to them
is 0 almost everywhere. What can be had to first order is this: a policy keeps the experts that are asked for, so a row
hurts the less it asks for the victim's. A third of the candidates comes from the rows that ask least (`shortlist`), a
third are random texts, a third mix the texts that the attackers have already.

Only the last token of a text is decoded; what comes before it is a prompt, which is native and computed once.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reference import Prompts, Reference, groups_of
from rich.progress import track
from torch import Tensor

from carpool import Batch, Outcome, parse
from carpool.artefacts.files import require_writable, write_text
from carpool.evaluate.lockstep import compare
from carpool.hosts.transformers import share

POLICIES = (
    "xshare(budget=16)", "des_vote(size=16)", "oea(k0=2)", "surrogate(budget=16)", "sere(top=2)", "base(budget=16)",
    "lynx(budget=16)",
)  # fmt: skip
FLOORS = (None, 0.3, 0.1)
TEXTS, REPEATED, TOKENS = 96, 32, 32  # prompts of text, prompts of one repeated token, last tokens tried with each
SHORTLIST = 256  # of all these rows
ROUNDING = 1e-9  # of sums of float32 weights in float64


@dataclass(frozen=True)
class Search:
    """How hard attackers try."""

    attackers: int
    candidates: int
    rounds: int
    restarts: int
    seed: int


class Library:
    """Texts that attackers may send: rows `[N, 2]` of (prompt, last token), with what routers make of them natively."""

    def __init__(self, reference: Reference, windows_WT: Tensor, victims_VT: Tensor, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocabulary, self.num_prompts = reference.model.config.vocab_size, len(windows_WT) + REPEATED
        repeated_R = torch.randint(2, self.vocabulary, (REPEATED,), generator=generator)
        length = windows_WT.shape[1] - 1
        ids_PT = torch.cat((windows_WT[:, :-1], repeated_R.unsqueeze(1).expand(-1, length), victims_VT[:, :-1]))
        self.prompts = Prompts(reference, ids_PT)
        last_PL = torch.randint(2, self.vocabulary, (self.num_prompts, TOKENS), generator=generator)
        last_PL[:, 0] = torch.cat((windows_WT[:, -1], repeated_R))  # as the text goes on
        prompt_PL = torch.arange(self.num_prompts).unsqueeze(1).expand_as(last_PL)
        victims_V2 = torch.stack((torch.arange(self.num_prompts, len(ids_PT)), victims_VT[:, -1]), 1)
        rows_N2 = torch.stack((prompt_PL, last_PL), -1).flatten(0, 1)
        self.rows_N2, self.victims_V2, self.count = rows_N2, victims_V2, len(rows_N2)
        self.pool = self.prompts.record(torch.cat((rows_N2, victims_V2)))
        stock, batch = reference.prepared(str(reference.moe.stock)), groups_of(self.pool.rows, 1)
        rows = torch.arange(self.pool.rows)
        inputs = [reference.route(stock, self.pool, layer, rows, batch).inputs for layer in range(reference.moe.layers)]
        self._asked_LNE = torch.stack([one.weights_NE for one in inputs])
        native_LNE = torch.stack([one.native_weight_NE for one in inputs])
        self._used_LNE = native_LNE / native_LNE.sum(-1, keepdim=True)

    def shortlist(self, rows_V: Tensor, layer: int | None = None) -> Tensor:
        """The rows `[V, S]` that ask least for the native experts of each of the given rows, in a layer or in all."""
        layers = slice(None) if layer is None else slice(layer, layer + 1)
        used_LVE, asked_LNE = self._used_LNE[layers, rows_V], self._asked_LNE[layers, : self.count]
        overlap_VN = torch.einsum("lve,lne->vn", used_LVE, asked_LNE)
        return overlap_VN.topk(SHORTLIST, largest=False).indices

    def random(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Rows `[..., 2]`: any prompt with any last token."""
        prompt = torch.randint(self.num_prompts, shape, generator=generator)
        return torch.stack((prompt, torch.randint(2, self.vocabulary, shape, generator=generator)), -1)


def displaced(outcome: Outcome, size: int) -> Tensor:
    """Displaced mass of the first of every `size` rows."""
    return outcome.displaced_N[::size]


def routing_search(
    reference: Reference, library: Library, text: str, victims_V: Tensor, how: Search
) -> dict[str, float]:
    """The largest displaced mass of any victim in any layer, beside random co-batches and after the search."""
    generator, attackers, candidates = torch.Generator().manual_seed(how.seed), how.attackers, how.candidates
    prepared, size, count, half = reference.prepared(text), attackers + 1, len(victims_V), how.candidates // 2
    batch = groups_of(count * candidates, size)
    worst, chance = 0.0, list[Tensor]()
    for layer in range(len(prepared)):
        short_VS = library.shortlist(victims_V, layer)
        chosen_VB = torch.empty(count, size, dtype=torch.int64)
        for turn in range(1 + how.rounds * attackers):
            fresh_VC = torch.randint(library.count, (count, candidates), generator=generator)
            if turn == 0:  # whole random co-batches, to start from the best and to know what chance does
                shape = (count, candidates, size)
                tried_VCB = torch.randint(library.count, shape, generator=generator)
                tried_VCB[:, :, 0] = victims_V.unsqueeze(1)
            else:
                places = torch.randint(SHORTLIST, (count, half), generator=generator)
                fresh_VC[:, :half] = short_VS.gather(1, places)
                tried_VCB = chosen_VB.unsqueeze(1).repeat(1, candidates, 1)
                tried_VCB[:, 1:, 1 + turn % attackers] = fresh_VC[:, :-1]  # the first candidate changes nothing
            outcome = reference.route(prepared, library.pool, layer, tried_VCB.flatten(), batch)
            displaced_VC = displaced(outcome, size).view(count, candidates)
            if turn == 0:
                chance.append(displaced_VC.flatten())
            chosen_VB = tried_VCB[torch.arange(count), displaced_VC.argmax(1)]
            worst = max(worst, float(displaced_VC.max()))
    random = torch.cat(chance)
    return {
        "displaced_random_mean": float(random.mean()), "displaced_random_max": float(random.max()),
        "displaced_worst": worst, "routed": len(prepared) * (1 + how.rounds * attackers) * count * candidates,
    }  # fmt: skip


def proposals(library: Library, chosen_XA2: Tensor, short_XS: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows `[X, count, 2]` for one attacker of each search: random, of the shortlist, and mixed from what all have."""
    made_XC2, (searches, attackers, _), third = (
        library.random((len(chosen_XA2), count), generator),
        chosen_XA2.shape,
        count // 3,
    )
    places = torch.randint(SHORTLIST, (searches, third), generator=generator)
    made_XC2[:, :third] = library.rows_N2[short_XS.gather(1, places)]
    for part in range(2):  # the prompt of one attacker with the last token of another, or of the same
        whose = torch.randint(attackers, (searches, third), generator=generator)
        made_XC2[:, third : 2 * third, part] = chosen_XA2[:, :, part].gather(1, whose)
    return made_XC2


def token_search(
    reference: Reference, library: Library, text: str, stock_VV: Tensor, targets_V: Tensor, how: Search
) -> dict[str, float]:
    """The largest divergence and loss of any victim, beside random co-batches and after the search."""
    generator, size, candidates = torch.Generator().manual_seed(how.seed), how.attackers + 1, how.candidates
    victim_X = torch.arange(len(targets_V)).repeat_interleave(2 * how.restarts)
    searches = len(victim_X)
    for_loss_X1 = (torch.arange(searches) % 2 == 1).unsqueeze(1)
    short_XS = library.shortlist(library.count + victim_X)
    stock_RV, targets_R = (
        stock_VV[victim_X].repeat_interleave(candidates, 0),
        targets_V[victim_X].repeat_interleave(candidates),
    )
    stock_loss_R = -stock_RV.log_softmax(-1).gather(1, targets_R.unsqueeze(1)).squeeze(1).double()
    worst_displaced = 0.0

    def see(layer: int, batch: Batch, outcome: Outcome) -> None:
        nonlocal worst_displaced
        worst_displaced = max(worst_displaced, float(displaced(outcome, size).max()))

    kept = list[Tensor]()
    chosen_XB2 = torch.empty(0)
    batch = groups_of(searches * candidates, size)
    with torch.inference_mode(), share(reference.model, parse(text), stats=reference.stats, batch=batch, observe=see):
        for turn in range(1 + how.rounds * how.attackers):
            if turn == 0:
                tried_XCB2 = library.random((searches, candidates, size), generator)
                tried_XCB2[:, :, 0] = library.victims_V2[victim_X].unsqueeze(1)
            else:
                given = (chosen_XB2[:, 1:], short_XS, candidates - 1, generator)
                tried_XCB2 = chosen_XB2.unsqueeze(1).repeat(1, candidates, 1, 1)
                tried_XCB2[:, 1:, 1 + turn % how.attackers] = proposals(library, *given)
            hidden_RH = library.prompts.decode(tried_XCB2.flatten(0, 2))[::size]
            found = compare(stock_RV, reference.model.get_output_embeddings()(hidden_RH), targets_R)
            values = (found.kl_R, found.nll_R - stock_loss_R, found.agree_R)
            kl_XC, loss_XC, agree_XC = (value.view(searches, candidates) for value in values)
            best_X = torch.where(for_loss_X1, loss_XC, kl_XC).argmax(1)
            chosen_XB2 = tried_XCB2[torch.arange(searches), best_X]
            kept.append(torch.stack((kl_XC, loss_XC, 1 - agree_XC)))
    kl, loss, flipped = torch.stack(kept, 1).unbind()  # [turns, searches, candidates] each
    by_victim = flipped.transpose(0, 1).reshape(len(targets_V), -1)
    return {
        "kl_random_mean": float(kl[0].mean()), "kl_random_max": float(kl[0].max()), "kl_worst": float(kl.max()),
        "loss_random_mean": float(loss[0].mean()), "loss_random_max": float(loss[0].max()),
        "loss_worst": float(loss.max()), "flipped_random": float(flipped[0].mean()),
        "victims_flipped": float(by_victim.amax(1).mean()), "token_displaced_worst": worst_displaced,
        "co_batches": kl.numel(),
    }  # fmt: skip


def found_before(path: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of a run with the same arguments, model and texts that was stopped."""
    old = json.loads(path.read_text()) if path.exists() else {}
    same = all(old.get(name) == content[name] for name in ("kind", "arguments", "model", "texts"))
    return old["results"] if same else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--attackers", type=int, default=8)
    parser.add_argument("--victims", type=int, default=4, help="of the search over tokens")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--restarts", type=int, default=2, help="of each of the two searches over tokens")
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    require_writable(given.output)
    reference = Reference()
    drawn = reference.sequences(TEXTS + given.victims, given.length, given.seed).ids_ST
    victims_VT, targets_V = drawn[: given.victims, :-1], drawn[: given.victims, -1]
    library = Library(reference, drawn[given.victims :, :-1], victims_VT, given.seed)
    with torch.inference_mode():
        stock_VV = reference.model(input_ids=victims_VT, logits_to_keep=1).logits[:, 0]
    rows_V = torch.randint(library.count, (16,), generator=torch.Generator().manual_seed(given.seed))
    how = Search(given.attackers, given.candidates, given.rounds, given.restarts, given.seed)
    facts = reference.facts(**{name: value for name, value in vars(given).items() if name != "output"})
    content = {"kind": "carpool attack", **facts, "texts_to_choose_from": library.count, "routing": {"victims": 16}}
    results = found_before(given.output, content)
    done = [(one["policy"], one["floor"]) for one in results]
    left = [(policy, tau) for policy in POLICIES for tau in FLOORS if (policy, tau) not in done]
    for policy, tau in track(left, "attacking"):
        text = policy if tau is None else f"{policy} | floor({tau})"
        routed = routing_search(reference, library, text, rows_V, how)
        tokens = token_search(reference, library, text, stock_VV, targets_V, how)
        worst, bound = max(routed["displaced_worst"], tokens["token_displaced_worst"]), 1.0 if tau is None else tau
        head: dict[str, Any] = {"policy": policy, "floor": tau, "bound": bound, "held": worst <= bound + ROUNDING}
        results.append(head | routed | tokens)
        write_text(given.output, json.dumps(content | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
