"""What only the owner of a GPU can run: one command, one JSON, eight minutes.

    make gpu-check                          # or: python benchmarks/gpu_check.py --output gpu-check.json
    python benchmarks/gpu_check.py --model Qwen/Qwen3-30B-A3B --minutes 20 --output gpu-check.json

For each of vLLM's model runners two engines start, one without the key and one with it, each in a process of its own:

* `runner`: it is the one of that name; V2 starts as vLLM's default, without an environment variable.
* `path`: a layer's routing runs in two launches, and vLLM recorded CUDA graphs.
* `graphs`: replayed graphs change rows, count two equal runs alike, take another budget and a switch without restart.
* `off`: switched off, and with a budget of all experts, the same tokens and log-probabilities bit for bit. Whether
  these are also vLLM's without the key is told and no failure: the key may cost a fused routing kernel.
* `speed`: output tokens a second of each state, one engine after another: a first impression, no benchmark.

Then `quality`: `carpool evaluate` on transformers. A check that fails does not stop the others. What does not fit into
`--minutes` is not run, and counts as failed.
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
RUNNERS = {"V2": None, "V1": "0"}  # what VLLM_USE_V2_MODEL_RUNNER says; V2 is the default where Triton runs
LEAST = 20  # seconds without which no step begins
Result = dict[str, Any]
Outputs = list[tuple[list[int], list[float]]]  # tokens and log-probabilities of each request


def stock(options: argparse.Namespace) -> Result:
    """What vLLM gives without the key, and how fast."""
    llm = engine(options, None)
    outputs, rates = timed(llm, options)
    return {"failed": other_runner(llm, options), "outputs": outputs, "tokens_per_second": rates}


def shared(options: argparse.Namespace) -> Result:
    """One engine with the key, through all its states."""
    llm = engine(options, options.policy)
    failed = other_runner(llm, options)
    found: Result = {"failed": failed, "graphs": recorded(llm), "states": {}}
    [settings, *_] = llm.collective_rpc("carpool_report")
    found["path"] = settings["paths"]
    if options.device != "cpu" and found["path"] != ["two launches"]:
        failed.append(f"path: routing runs {' and '.join(found['path'])}, not in two launches")

    def state(name: str, **change: Any) -> tuple[Outputs, dict[str, float]]:
        if change:
            llm.collective_rpc("carpool_set", kwargs=change)
        outputs, rates = timed(llm, options)
        counted = report(llm)
        found["states"][name] = {"tokens_per_second": rates, **counted}
        return outputs, counted

    _, first = state(options.policy)
    generate(llm, options)
    twice = [report(llm)["rows"], first["rows"] / (1 + options.repeats)]
    if not first["rows_changed"]:
        failed.append("graphs: the policy changed no row")
    if twice[0] != twice[1]:
        failed.append(f"graphs: two equal runs counted {twice[1]:.0f} and {twice[0]:.0f} rows")
    _, wider = state(options.wider, policy=options.wider)
    if wider["union"] <= first["union"]:
        failed.append(f"graphs: {options.wider} reads no more experts than {options.policy}")
    full, counted = state(FULL, policy=FULL)
    if counted["rows_changed"]:
        failed.append("off: a budget of all experts changed rows")
    off, counted = state("off", enabled=False)
    if counted["rows_changed"]:
        failed.append("off: switched off, rows were still changed")
    if full != off:
        failed.append("off: a budget of all experts and the switch give different outputs")
    return found | {"outputs": off}


def together(plain: Result, found: Result) -> Result:
    """Both engines of a runner."""
    failed = [*plain["failed"], *found["failed"]]
    given, without = found.pop("outputs", None), plain.pop("outputs", None)
    return {"failed": failed, "same_as_not_configured": given is not None and given == without,
            "stock": plain, "shared": found}  # fmt: skip


def timed(llm: Any, options: argparse.Namespace) -> tuple[Outputs, list[float]]:
    """Outputs of a first run, and output tokens a second of some more."""
    outputs, rates = generate(llm, options), []
    for _ in range(options.repeats):
        begin = time.perf_counter()
        again = generate(llm, options)
        rates.append(sum(len(ids) for ids, _ in again) / (time.perf_counter() - begin))
    return outputs, rates


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


STEPS: dict[str, Callable[[argparse.Namespace], Result]] = {"stock": stock, "shared": shared, "quality": quality}


def engine(options: argparse.Namespace, policy: str | None) -> Any:
    """An `LLM` on the device, with CUDA graphs where there is one."""
    os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
    if (asked := RUNNERS[options.runner]) is not None:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = asked
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


def other_runner(llm: Any, options: argparse.Namespace) -> list[str]:
    """What fails if vLLM started another runner than the one to check."""
    name = "V2" if llm.llm_engine.vllm_config.use_v2_model_runner else "V1"
    return [] if name == options.runner else [f"runner: vLLM started {name}, and its log says why"]


def generate(llm: Any, options: argparse.Namespace) -> Outputs:
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


def apart(options: argparse.Namespace, step: str, seconds: float, runner: str = "V2") -> Result:
    """A step in a process of its own, so that it starts with an empty device, for some seconds at most."""
    if seconds < LEAST:
        return {"failed": [f"not run: the {options.minutes:g} minutes were over (--minutes)"]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        flags = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in PASSED]
        policies = ["--quality-policy", *options.quality_policy]
        command = [sys.executable, __file__, *flags, *policies, f"--step={step}", f"--runner={runner}",
                   f"--output={path}"]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"failed": [f"stopped: the {options.minutes:g} minutes were over (--minutes)"]}
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
    "model", "device", "policy", "wider", "minutes", "batch", "tokens", "repeats", "quality_model", "quality_tokens",
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
    end = time.monotonic() + 60 * options.minutes
    for name in (*options.runners, "quality"):
        begin = time.monotonic()
        if name == "quality":
            content[name] = apart(options, name, end - begin)
        else:
            plain = apart(options, "stock", end - begin, name)
            content[name] = together(plain, apart(options, "shared", end - time.monotonic(), name))
        content[name]["seconds"] = round(time.monotonic() - begin)
        print(f"{name}: {'; '.join(content[name]['failed']) or 'passed'} ({content[name]['seconds']} s)", flush=True)
        write_text(options.output, json.dumps(content, indent=1) + "\n")
    return int(any(content[name]["failed"] for name in (*options.runners, "quality")))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="allenai/OLMoE-1B-7B-0924")
    parser.add_argument("--policy", default="xshare(budget=16)")
    parser.add_argument("--wider", default="xshare(budget=32)", help="the same policy with another number")
    parser.add_argument("--runners", nargs="+", default=[*RUNNERS], choices=RUNNERS)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quality-model", default="allenai/OLMoE-1B-7B-0924")
    parser.add_argument("--quality-policy", nargs="+", default=["xshare(budget=16)", "xshare(budget=24)", "topk(k=4)"])
    parser.add_argument("--quality-tokens", type=int, default=8192)
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal without graphs")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--runner", choices=RUNNERS, default="V2", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
