"""TEAM's decoding on the block-diffusion model, part by part: experts and tokens a forward, agreement, perplexity.

    python benchmarks/diffusion_team.py --output docs/results/diffusion-team.json       # about ten minutes on one core
    python benchmarks/diffusion_team.py --prompts 1 --batch 1 --only TEAM --output /tmp/quick.json  # does it run

The authors' measures: APF, distinct experts read in a layer and forward (all branches of it together); TPF, tokens
accepted in a forward; APT, their ratio, experts read a token. They are of one request: a few decode together here, each
in a group of its own, which is each of them alone. Counts, not times: a forward with four branches computes four times
the rows. Beside them what the text became: how many positions hold stock's token, the same with every block decoded
after stock's text (where more than one is decoded), and perplexity under the reference model. Rows that the output
already holds for the same model and prompts are left as they are, so a run can be continued.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from carpool.artefacts.files import write_text
from carpool.artefacts.texts import load_texts
from carpool.cli.common import embedded_texts
from carpool.diffusion import Decoding
from carpool.diffusion.team import Team, TeamCold
from carpool.evaluate.block_study import prompts_of
from carpool.evaluate.decoded import Decoded, metrics
from carpool.evaluate.generations import Generated, decode
from carpool.evaluate.results import provenance, text_facts
from carpool.evaluate.sequences import draw
from carpool.evaluate.study import describe
from carpool.hosts.transformers import fingerprint, load_model
from carpool.plans.grammar import parse
from carpool.routing.batch import Grouping

Given = Callable[[], dict[str, Any]]
SEED = 0


def configurations(top_k: int) -> list[tuple[str, str, Given]]:
    """Name, policy, and what `generate` is given (anew for each generation)."""
    native = f"des_seq(k0={top_k})"  # every voter's own experts: TEAM's rule where some rows do not vote

    def team(name: str, cold: TeamCold | None, *, reuse: bool, branches: bool, policy: str = native) -> Any:
        return name, policy, lambda: {"step": Team(cold, reuse=reuse, branches=branches)}

    found: list[tuple[str, str, Given]] = [
        team("cold rows ride", TeamCold(), reuse=False, branches=False),
        team("outputs reused", None, reuse=True, branches=False),
        team("branches", None, reuse=False, branches=True),
        team("cold rows ride, outputs reused", TeamCold(), reuse=True, branches=False),
        team("TEAM", TeamCold(), reuse=True, branches=True),
    ]
    found += [(policy, policy, dict) for policy in ("des_seq(k0=2)", "des_seq(k0=3)", "des_vote(beta=0.3)")]
    for policy in ("des_seq(k0=3)", "des_vote(beta=0.3)"):
        found.append(team(f"TEAM, {policy}", TeamCold(), reuse=True, branches=True, policy=policy))
    for confidence, near in ((0.4, 2), (0.6, 4)):
        cold = TeamCold(confidence, near)
        found.append(team(f"TEAM, tau_h {confidence}, L_h {near}", cold, reuse=True, branches=True))
    return found


def row(name: str, policy: str, generated: Generated, decoded: Decoded, layers: int) -> dict[str, Any]:
    """Metrics of one configuration."""
    sums = {key: float(values.sum()) for key, values in generated.sums.items()}
    experts, tokens = decoded.union_of_group.value, decoded.tokens_per_forward.value
    return {
        "name": name, "policy": policy, "apf": experts, "tpf": tokens, "apt": experts / tokens,
        "rows_per_forward": sums["rows"] / layers / sums["request_forwards"],
        "changed": sums["changed"] / sums["rows"], "request_forwards": sums["request_forwards"], **asdict(decoded),
    }  # fmt: skip


def main() -> None:
    options = arguments()
    model, tokenizer = load_model(options.model)
    judge = None if options.no_judge else load_model(None)[0]
    moe = describe(model)
    given: dict[str, Any] = {} if options.block is None else {"block": options.block}
    texts = load_texts(options.text or embedded_texts())
    count, length = options.prompts, options.prompt + 1
    apart = count // options.batch
    drawn = draw(texts, tokenizer, count=count, batches=apart, length=length, seed=SEED)
    prompts = prompts_of(drawn, count, options.prompt)
    chosen = configurations(moe.top_k)
    if options.only:
        chosen = [one for one in chosen if one[0] in options.only]
    content = {
        "command": "python benchmarks/diffusion_team.py", "seed": SEED, "prompts": count, "batch": options.batch,
        "prompt_tokens": options.prompt, "new_tokens": options.new, "group": "request",
        "model": {"fingerprint": fingerprint(model), "experts": moe.experts, "top_k": moe.top_k, "layers": moe.layers},
        "judge": None if judge is None else fingerprint(judge), "texts": text_facts(options.text or embedded_texts()),
    }  # fmt: skip
    settings = kept(options.output, content)
    with Progress() as progress:
        task = progress.add_task("decoding", total=len(options.threshold) * count * (1 + len(chosen)))
        for threshold in options.threshold:
            decoding = Decoding.of(model, threshold=threshold, max_new=options.new, end_tokens=(), **given)
            setting = settings.setdefault(threshold, {"threshold": threshold, "block_size": decoding.block, "rows": []})
            have = {made["name"] for made in setting["rows"]}
            missing = [one for one in chosen if one[0] not in have]
            progress.advance(task, count * (len(chosen) - len(missing)))
            if not missing:
                continue
            how: dict[str, Any] = {
                "group": Grouping.parse("request"), "judge": judge, "advance": partial(progress.advance, task)
            }  # fmt: skip
            found = decode(model, moe, [], prompts, decoding, options.batch, **how)
            if not have:
                setting["rows"].append(row("stock", "", found[0], metrics(found)[0], moe.layers))
            how |= {"stock": found[0], "follow": options.new > decoding.block}  # else all follow the same text anyway
            for name, policy, extra in missing:
                pair = decode(model, moe, [parse(policy)], prompts, decoding, options.batch, given=extra, **how)
                made = row(name, policy, pair[1], metrics(pair)[1], moe.layers)
                print(f"{threshold} {name}: APF {made['apf']:.2f} TPF {made['tpf']:.2f}", flush=True)
                setting["rows"].append(made)
                by_threshold = [settings[found_at] for found_at in sorted(settings, reverse=True)]
                whole = provenance() | content | {"settings": by_threshold}
                write_text(options.output, json.dumps(whole, indent=1) + "\n")


def kept(path: Path, content: dict[str, Any]) -> dict[float, dict[str, Any]]:
    """What the output holds by threshold, if it was measured on the same."""
    before = json.loads(path.read_text()) if path.exists() else {}
    same = {name: before.get(name) for name in content} == content
    return {setting["threshold"]: setting for setting in before["settings"]} if same else {}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the block-diffusion model of carpool[demo]")
    parser.add_argument("--text", type=Path, nargs="+", help="default: the held-out texts of carpool[demo]")
    parser.add_argument("--block", type=int, help="default: as the model says")
    parser.add_argument("--threshold", type=float, nargs="+", default=[0.9, 0.5])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--batch", type=int, default=3, help="prompts that decode together")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--only", nargs="+", help="names of configurations")
    parser.add_argument("--no-judge", action="store_true", help="no perplexity")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.model is None:
        from carpool_demo import diffusion_model_path

        options.model = diffusion_model_path()
    return options


if __name__ == "__main__":
    main()
