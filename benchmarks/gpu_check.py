"""What only the owner of a GPU can run: one command, one JSON.

    make gpu-check                          # or: python benchmarks/gpu_check.py --output gpu-check.json
    python benchmarks/gpu_check.py --model Qwen/Qwen3-30B-A3B --output gpu-check.json

`graphs`: engines that record CUDA graphs replay a policy, take other numbers and a switch without restart, and stay
within the budget. `off`: configured but switched off, and a budget of all experts, against a vLLM without the key: the
same tokens and log-probabilities bit for bit (where the key costs a fused routing kernel, against vLLM without it).
`speed`: decode throughput, each state in a process of its own, in turn. `quality`: `carpool evaluate` on transformers.
Each step runs in a process of its own, and one that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from carpool.artefacts.files import write_text

NO_GPU = "gpu-check: this machine has no CUDA GPU that torch can see, so nothing was checked"
FULL = "xshare(budget=1.0)"
Result = dict[str, Any]


def graphs(options: argparse.Namespace) -> Result:
    """Captured graphs follow rows, numbers and the switch."""
    llm = engine(options, options.policy)
    failed: list[str] = []
    generate(llm, options)
    first = report(llm)
    if not first["rows_changed"]:
        failed.append("replayed graphs changed no row")
    generate(llm, options)
    again = report(llm)
    if again["rows"] != first["rows"]:
        failed.append(f"two equal runs counted {first['rows']:.0f} and {again['rows']:.0f} rows")
    llm.collective_rpc("carpool_set", kwargs={"policy": options.wider})
    generate(llm, options)
    wider = report(llm)
    if wider["union"] <= first["union"]:
        failed.append(f"{options.wider} reads no more experts than {options.policy}")
    llm.collective_rpc("carpool_set", kwargs={"enabled": False})
    generate(llm, options)
    if report(llm)["rows_changed"]:
        failed.append("switched off, rows were still changed")
    return {"failed": failed, "first": first, "wider": wider, "graphs": recorded(llm)}


def off(options: argparse.Namespace) -> Result:
    """Off and a budget of all experts are vLLM's own output."""
    stock = apart(options, "stock_outputs")  # first: this process must not hold the device meanwhile
    failed: list[str] = list(stock["failed"])
    llm = engine(options, FULL)
    full = generate(llm, options)
    if report(llm)["rows_changed"]:
        failed.append("a budget of all experts changed rows")
    llm.collective_rpc("carpool_set", kwargs={"enabled": False})
    switched_off = generate(llm, options)
    if full != switched_off:
        failed.append("a budget of all experts and the switch give different outputs")
    # another kernel may round differently; that is no fault of the policy, but the owner has to know
    same = json.loads(json.dumps(switched_off)) == stock.get("outputs")
    return {"failed": failed, "same_as_not_configured": same}


def stock_outputs(options: argparse.Namespace) -> Result:
    """What vLLM gives without the key."""
    return {"failed": [], "outputs": generate(engine(options, None), options)}


def speed(options: argparse.Namespace) -> Result:
    """Decode throughput of every state; the states take turns."""
    states = {"stock": "", "full": FULL, options.policy: options.policy, options.wider: options.wider}
    found: dict[str, list[float]] = {name: [] for name in states}
    unions: dict[str, float] = {}
    for _ in range(options.repeats):
        for name, policy in states.items():
            made = apart(options, "throughput", "--state", policy)
            if made["failed"]:
                return made
            found[name] += made["tokens_per_second"]
            unions[name] = made["union"]
    rows = {name: {"tokens_per_second": values, "union": unions[name]} for name, values in found.items()}
    return {"failed": [], "batch": options.batch, "states": rows}


def throughput(options: argparse.Namespace) -> Result:
    """Output tokens a second of one engine, three times after a warm-up; prompts are one token long."""
    llm = engine(options, options.state or None)
    generate(llm, options)
    rates = []
    for _ in range(3):
        begin = time.perf_counter()
        outputs = generate(llm, options)
        rates.append(sum(len(ids) for ids, _ in outputs) / (time.perf_counter() - begin))
    counted = report(llm) if options.state else {"union": 0.0, "steps": 0.0}
    return {"failed": [], "tokens_per_second": rates, "union": counted["union"] / max(1.0, counted["steps"])}


def quality(options: argparse.Namespace) -> Result:
    """Lockstep evaluation on transformers, on the same device."""
    from carpool.artefacts.texts import load_texts
    from carpool.evaluate.results import as_dict
    from carpool.evaluate.study import Settings, sequences_for, study
    from carpool.hosts.transformers import load_model
    from carpool.plans.grammar import parse
    from carpool.routing.batch import Grouping
    from carpool_demo import TEXTS

    model, tokenizer = load_model(options.quality_model, device_map=options.device)
    documents = load_texts(sorted(TEXTS.glob("*.jsonl")))
    settings = Settings(
        tuple(parse(text) for text in options.quality_policy), Grouping.parse("batch"), (options.batch,),
        tokens=options.quality_tokens,
    )  # fmt: skip
    sequences = sequences_for(settings, documents, tokenizer)
    results = study(model, settings, sequences)
    return {"failed": [], "results": [as_dict(result) for found in results for result in found]}


STEPS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "graphs": graphs, "off": off, "speed": speed, "quality": quality,
    "stock_outputs": stock_outputs, "throughput": throughput,
}  # fmt: skip
CHECKS = ("graphs", "off", "speed", "quality")


def engine(options: argparse.Namespace, policy: str | None) -> Any:
    """An `LLM` on the device, with CUDA graphs where there is one."""
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    settings: dict[str, Any] = {
        "seed": 0, "max_num_seqs": options.batch, "max_model_len": 1024, "enable_prefix_caching": False,
        "additional_config": {} if policy is None else {"carpool": {"policy": policy, "isolation": "batch"}},
    }  # fmt: skip
    if options.device == "cpu":
        settings |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 24, "dtype": "float32", "block_size": 32,
                     "max_model_len": 256}  # fmt: skip
        if policy is not None:
            settings["additional_config"]["carpool"]["compile"] = False
    return LLM(options.model, skip_tokenizer_init=True, **settings)


def generate(llm: Any, options: argparse.Namespace) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and their log-probabilities of `batch` requests that start from different tokens."""
    from vllm import SamplingParams

    given = SamplingParams(max_tokens=options.tokens, temperature=0, logprobs=0, detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": [100 + 3 * i]} for i in range(options.batch)]
    results = []
    for output in llm.generate(prompts, given, use_tqdm=False):
        ids = list(output.outputs[0].token_ids)
        results.append((ids, [step[i].logprob for step, i in zip(output.outputs[0].logprobs, ids, strict=True)]))
    return results


def report(llm: Any) -> dict[str, float]:
    """Counters summed over layers, then reset."""
    [found, *_] = llm.collective_rpc("carpool_report", kwargs={"reset": True})
    names = ("steps", "rows", "rows_changed", "natural_union", "union", "displaced_mass")
    return {name: float(sum(layer[name] for layer in found["layers"])) for name in names}


def recorded(llm: Any) -> str:
    """How vLLM recorded CUDA graphs."""
    return str(llm.llm_engine.vllm_config.compilation_config.cudagraph_mode)


def apart(options: argparse.Namespace, step: str, *more: str) -> Result:
    """A step in a process of its own, so that it starts with an empty device."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        flags = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in PASSED]
        policies = ["--quality-policy", *options.quality_policy]
        command = [sys.executable, __file__, *flags, *policies, f"--step={step}", f"--output={path}", *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not path.exists():
            cause = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {"failed": [f"the step ended with code {done.returncode}: {cause}"]}
        result: Result = json.loads(path.read_text())
        return result


def about() -> dict[str, Any]:
    """Device and versions."""
    import torch
    import vllm

    import carpool

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "carpool": carpool.__version__, "vllm": vllm.__version__, "torch": torch.__version__}


PASSED = (
    "model", "device", "policy", "wider", "batch", "tokens", "repeats", "quality_model", "quality_tokens",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 if all checks passed, 1 if one failed, 2 without a GPU."""
    options = parse_arguments(arguments)
    if options.device != "cpu":
        import torch

        if not torch.cuda.is_available():
            print(NO_GPU, file=sys.stderr)
            return 2
    if options.step is not None:
        write_text(options.output, json.dumps(STEPS[options.step](options)) + "\n")
        return 0
    content: dict[str, Any] = {"arguments": {name: getattr(options, name) for name in PASSED}, "about": about()}
    for name in CHECKS:
        content[name] = apart(options, name)
        print(f"{name}: {'; '.join(content[name]['failed']) or 'passed'}", flush=True)
        write_text(options.output, json.dumps(content, indent=1) + "\n")
    return int(any(content[name]["failed"] for name in CHECKS))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="allenai/OLMoE-1B-7B-0924")
    parser.add_argument("--policy", default="xshare(budget=16)")
    parser.add_argument("--wider", default="xshare(budget=32)", help="the same policy with another number")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quality-model", default="allenai/OLMoE-1B-7B-0924")
    parser.add_argument("--quality-policy", nargs="+", default=["xshare(budget=16)", "xshare(budget=24)", "topk(k=4)"])
    parser.add_argument("--quality-tokens", type=int, default=24_576)
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal without graphs")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--state", default="", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
