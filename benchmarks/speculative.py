"""Speculative decoding on vLLM under policies that share experts: acceptance, experts read per verify step, throughput.

    python benchmarks/speculative.py --rounds 4 --output docs/results/speculative.json
    python benchmarks/speculative.py --quick --output /tmp/quick.json

The reference model continues held-out text, greedily, with drafts by ngram lookup, by the model itself (an upper bound:
under stock every draft is accepted) and by its first layers (an untrained cut, a lower bound). Acceptance is exact with
respect to the model under the policy, not to the original. Throughput: rounds in which stock and every policy take
turns in random order, medians of what stood in the same round; the model's weights fit into a cache, so it shows what
the policy costs and no reads saved.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from engines import machine, set_environment
from vllm_rounds import paired
from vllm_states import Hooks

from carpool.artefacts.files import sha256_file, write_text

BUDGETS = ((12, 6), (20, 10), (32, 16))  # of the batch, of each request; the model has 64 experts, 8 a token
FULL = "xshare(budget=1.0)"
SPECULATIONS = ("ngram", "itself", "first layers")
DRAFTS = 3
SEED = 0


def policies() -> list[str]:
    return [
        f"xshare_speculative(budget={budget}, request_budget={request_budget}, merge={merge!r})"
        for budget, request_budget in BUDGETS
        for merge in ("topup", "prune")
    ]


def speculation(name: str, model: Path, folder: Path) -> dict[str, Any]:
    """vLLM's `speculative_config`."""
    if name == "ngram":
        return {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    draft = model if name == "itself" else first_layers(model, folder)
    return {"method": "draft_model", "num_speculative_tokens": DRAFTS, "model": str(draft)}


def first_layers(model: Path, folder: Path, layers: int = 2) -> Path:
    """The model with its first layers only."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cut = AutoModelForCausalLM.from_pretrained(model)
    cut.model.layers = cut.model.layers[:layers]
    cut.config.num_hidden_layers = layers
    cut.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def prompts(model: Path, texts: Path, count: int, length: int) -> list[list[int]]:
    """The first tokens of `count` documents, domains in turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    files = [path.read_text().splitlines() for path in sorted(texts.glob("*.jsonl"))]
    found: list[list[int]] = []
    for lines in zip(*files, strict=False):
        for line in lines:
            ids = tokenizer(json.loads(line)["text"])["input_ids"]
            if len(ids) >= length:
                found.append(ids[:length])
    if len(found) < count:
        raise SystemExit(f"{len(found)} documents of {length} tokens, fewer than {count}")
    return found[:count]


class Run:
    """One engine with one way of drafting."""

    def __init__(self, model: Path, speculation: dict[str, Any], batch: int, timed: bool) -> None:
        from vllm import LLM

        self.timed = timed
        self.llm = LLM(
            str(model), dtype="float32", enforce_eager=True, kv_cache_memory_bytes=1 << 28, max_model_len=512,
            max_num_seqs=batch, max_num_batched_tokens=4096, block_size=32, seed=SEED, skip_tokenizer_init=False,
            disable_log_stats=False, enable_prefix_caching=False, speculative_config=speculation,
            additional_config={"carpool": {"policy": FULL, "isolation": "batch", "compile": timed}},
        )  # fmt: skip
        self.hooks = Hooks(self.llm)

    def use(self, policy: str | None) -> None:
        """A policy, or stock: all hooks of the plugin taken out."""
        self.llm.collective_rpc("carpool_report", kwargs={"reset": True})
        if policy is None:
            self.hooks.take_out()
            return
        self.hooks.put_in()
        self.llm.collective_rpc("carpool_set", kwargs={"policy": policy, "compile": self.timed})

    def generate(self, given: list[list[int]], tokens: int) -> tuple[list[list[int]], float, dict[str, float]]:
        """Token ids, seconds, and what the engine counted."""
        from vllm import SamplingParams

        before = self.counted()
        begin = time.perf_counter()
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in given],
            SamplingParams(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True), use_tqdm=False,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        counts = {name: value - before[name] for name, value in self.counted().items()}
        return [list(output.outputs[0].token_ids) for output in outputs], seconds, counts

    def counted(self) -> dict[str, float]:
        """vLLM's counters of drafts, and ours summed over layers."""
        counts: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            if metric.name in ("vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens"):
                counts[metric.name.removeprefix("vllm:spec_decode_num_")] = float(metric.value)
        [report] = self.llm.collective_rpc("carpool_report")
        for name in ("steps", "union", "natural_union", "rows", "rows_changed", "displaced_mass"):
            counts[name] = float(sum(layer[name] for layer in report["layers"]))
        return counts


def measure(run: Run, given: list[list[int]], options: argparse.Namespace) -> dict[str, Any]:
    """Every policy beside stock: counts from the first round, times from all."""
    states: dict[str, str | None] = {"stock": None, FULL: FULL, **{text: text for text in options.policy}}
    times: dict[str, list[float]] = {name: [] for name in states}
    rows: dict[str, Any] = {}
    tokens: dict[str, list[list[int]]] = {}
    shuffle = random.Random(SEED)
    for number in range(options.rounds):
        for name, policy in shuffle.sample(list(states.items()), len(states)):
            run.use(policy)
            ids, seconds, counts = run.generate(given, options.tokens)
            times[name].append(seconds)
            if number == 0:
                tokens[name] = ids
                rows[name] = counted_row(counts)
    rows = {name: rows[name] for name in states}
    failed = [] if tokens[FULL] == tokens["stock"] else ["a budget of all experts changed tokens"]
    failed += [f"{text}: no row changed" for text in options.policy if not rows[text]["rows_changed"]]
    rows["stock"] |= {
        name: rows[FULL][name] for name in ("union", "natural_union")
    }  # the same tokens, so the same steps
    result: dict[str, Any] = {"failed": "; ".join(failed), "states": rows}
    if not failed and options.rounds > 1:
        seconds = {name: np.array(values) for name, values in times.items()}
        for name, row in rows.items():
            row["tokens_per_second"] = len(given) * options.tokens / float(np.median(seconds[name]))
            row["throughput_over_stock"] = asdict(paired(seconds["stock"], seconds[name]))
            row["seconds"] = times[name]
    return result


def counted_row(counts: dict[str, float]) -> dict[str, Any]:
    steps = counts["steps"]
    return {
        "acceptance_length": 1 + counts["accepted_tokens"] / max(1.0, counts["drafts"]),
        "drafts": counts["drafts"],
        "union": counts["union"] / steps if steps else None,
        "natural_union": counts["natural_union"] / steps if steps else None,
        "displaced_mass": counts["displaced_mass"] / counts["rows"] if steps else None,
        "rows_changed": counts["rows_changed"],
    }


def main() -> None:
    options = arguments()
    if options.only is None:
        for name in options.speculation:  # a second engine of a process trips over what ngram's drafts import
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name], check=True)
        return
    set_environment()
    from carpool_demo import MODEL, TEXTS

    given = prompts(MODEL, TEXTS, options.batch, options.prompt)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(MODEL, speculation(options.only, MODEL, Path(folder)), options.batch, timed=options.rounds > 1)
        found = measure(run, given, options)
    content: dict[str, Any] = {
        "model": "carpool-demo", "model_sha256": sha256_file(MODEL / "model.safetensors"),
        "batch": options.batch, "prompt_tokens": options.prompt, "new_tokens": options.tokens,
        "draft_tokens": DRAFTS, "rounds": options.rounds, "seed": SEED, "machine": machine(), "speculation": {},
    }  # fmt: skip
    if options.output.exists() and options.only != options.speculation[0]:
        content["speculation"] = json.loads(options.output.read_text())["speculation"]
    content["speculation"][options.only] = found
    write_text(options.output, json.dumps(content, indent=1) + "\n")
    show(options.only, found)


def show(name: str, result: dict[str, Any]) -> None:
    print(f"\n{name}: {result['failed'] or 'checks passed'}")
    for policy, row in result["states"].items():
        speed = f", {row['throughput_over_stock']['value']:.2f} of stock" if "throughput_over_stock" in row else ""
        print(
            f"  {policy:70s} accepted {row['acceptance_length']:.2f}, union {row['union'] or 0:.1f}{speed}", flush=True
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=96, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a request")
    parser.add_argument("--rounds", type=int, default=1, help="more than one: measure throughput too")
    parser.add_argument("--policy", nargs="+", default=policies())
    parser.add_argument("--speculation", nargs="+", choices=SPECULATIONS, default=list(SPECULATIONS))
    parser.add_argument("--quick", action="store_true", help="one policy, few tokens")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", choices=SPECULATIONS, help=argparse.SUPPRESS)  # measure this one in this process
    options = parser.parse_args()
    if options.quick:
        options.policy, options.batch, options.tokens, options.speculation = policies()[:1], 4, 8, ["ngram"]
    return options


if __name__ == "__main__":
    main()
