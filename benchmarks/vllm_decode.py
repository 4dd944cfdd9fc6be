"""Decode throughput of vLLM under policies, against stock and against the ideal, in one process.

    python benchmarks/vllm_decode.py --output docs/results/vllm-decode.json            # about 80 minutes on two cores
    python benchmarks/vllm_decode.py --quick --output /tmp/quick.json                  # proves that it runs
    python benchmarks/vllm_decode.py --batch 16 --policy "xshare(budget=16)" "surrogate(budget=16)" \
        --output docs/results/vllm-decode-surrogates.json                              # surrogates beside backfill
    python benchmarks/vllm_decode.py --batch 16 --methods --output docs/results/vllm-decode-methods.json

One engine decodes one batch of requests; between steps it is switched between stock (all hooks of the plugin taken
out), the plugin switched off, a budget of all experts, policies, and for each policy two ideals: routing forced to
random sets of as many experts as the policy read in the round before (`ideal`), and to the very ids that it chose there
(`replayed`), neither running a policy. Every round times one step of each (`--steps` for more), in random order but a
policy right beside its ideals: the nearer the steps that are compared, the less the machine has changed between them.
Ratios are medians over rounds of what stood side by side (a virtual machine pauses now and then, and a mean would show
that), intervals order statistics. A cell whose checks fail gets no speeds. Cells that the output already holds are left
as they are, so a run can be continued.

Statistics are random numbers of the right size, and the surrogates of `surrogate(...)` random maps (`--surrogates
RANK`, int8): they show speed only. Beside a `surrogate`, `xshare` of the same budget shows what adding their output
costs (`throughput_over_backfill`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from engines import GEOMETRIES, as_json, machine, read_bandwidth, start
from vllm_rounds import SEED, Ideal, Policy, State, interleave, summarise
from vllm_states import Engine, union

from carpool.artefacts.files import write_text

FULL = "xshare(budget=1.0)"  # the whole plugin, and nothing shared
METHODS = (  # all but `surrogate`, which has a run of its own, and the one that needs devices
    "xshare(budget={quarter})", "xshare_speculative(budget={quarter}, request_budget=2)", "oea(k0=2)", "des_seq(k0=2)",
    "des_vote(size={quarter})", "lynx(budget={quarter})", "base(budget={quarter})", "sere(top=2)",
    "allow_list(size={quarter})", "top_p(p=0.15)", "tail_mass(beta=0.6)", "layer_threshold(tau=0.125)", "topk(k=4)",
    "random(budget={quarter}, warmup=0)",
)  # fmt: skip
PROMPT = 16  # tokens
WARM = 12  # untimed steps in which unions are counted and compared


def main() -> None:
    options = arguments()
    output: Path = options.output
    if options.cell is not None:
        run_cells(options)
        return
    for threads in options.threads:
        cells = [batch for batch in options.batch if key(options, threads, batch) not in load(output)["cells"]]
        if not cells:
            continue
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment |= {"OMP_PROC_BIND": "true"} if threads > 1 else {}  # threads that move wait for each other
        command = [sys.executable, __file__, *sys.argv[1:], "--cell", str(threads)]
        subprocess.run(command, env=environment, check=True)
    show(load(output))


def run_cells(options: argparse.Namespace) -> None:
    """All batch sizes at one number of threads."""
    import torch

    threads: int = options.cell
    torch.set_num_threads(threads)
    bandwidth = read_bandwidth(0.25 if options.quick else 1.0)
    geometry = GEOMETRIES[options.geometry]
    layers = options.layers or geometry.layers
    carpool = {"policy": FULL, "isolation": "batch", "compile": not options.eager}
    length = steps_of_a_cell(options)
    llm = start(
        geometry, layers, options.dtype, additional_config={"carpool": carpool}, max_num_seqs=max(options.batch),
        max_model_len=length, kv_cache_memory_bytes=length << 21,
    )  # fmt: skip
    for batch in options.batch:
        content = load(options.output)
        name = key(options, threads, batch)
        if name in content["cells"]:
            continue
        item = 4 if options.dtype == "float32" else 2
        about = {
            "geometry": options.geometry, "layers": layers, "dtype": options.dtype, "batch": batch, "threads": threads,
            "experts": geometry.experts, "top_k": geometry.top_k, "expert_mb": geometry.expert_bytes(item) / 1e6,
            "rounds": options.rounds, "steps_per_block": options.steps, "warm_steps": WARM, "seed": SEED,
            "compiled": not options.eager, "read_bandwidth_gb_s": bandwidth, "load_before": os.getloadavg()[0],
        }  # fmt: skip
        if foreseeing(options):
            about["surrogates"] = {"rank": options.surrogates, "maps": "random: speed only"}
        cell = about | measure(llm, batch, options, bandwidth, layers * geometry.expert_bytes(item))
        content = load(options.output)  # a slow cell must not lose what another run wrote meanwhile
        content["machine"] = machine()
        content["cells"][name] = cell
        write_text(options.output, as_json(content))
        print(f"{name}: {cell['failed'] or 'ok'}", flush=True)


def measure(
    llm: Any, batch: int, options: argparse.Namespace, bandwidth: float, bytes_per_expert: int
) -> dict[str, Any]:
    """One cell: checks first, then interleaved blocks."""
    engine = Engine(llm, batch, SEED, PROMPT, compile=not options.eager)
    geometry, layers = GEOMETRIES[options.geometry], len(engine.routers)
    surrogate = layers * engine.give_statistics(options.surrogates if foreseeing(options) else 0)
    failed: list[str] = []
    idle: list[str] = []
    try:
        engine.stock()
        states: list[State] = [State("stock", engine.stock, union(engine.record(WARM)))]
        engine.policy(None)
        engine.report()
        states.append(State("off", lambda: engine.policy(None), union(engine.record(WARM))))
        if engine.report()["steps"]:
            failed.append("switched off, policies still ran")
        for text in (FULL, *options.policy):
            engine.policy(text)
            same = engine.compare_graph()
            if batch > 1 and not options.eager and not (same and all(same)):
                failed.append(f"{text}: no compiled graph, or one with other experts")
            engine.report()
            policy = Policy(engine, text, engine.record(WARM))
            report = engine.report()
            if batch > 1 and abs(report["union"] / max(report["steps"], 1) - policy.union) > 1e-6:
                failed.append(f"{text}: the counters say another union than the experts got")
            if text == FULL and report["rows_changed"]:
                failed.append(f"{text}: {report['rows_changed']:.0f} rows changed")
            if text != FULL and not report["rows_changed"]:
                idle.append(text)  # the batch reads fewer experts than the budget
                continue
            states.append(policy)
            if text != FULL:
                states += [Ideal(kind, policy, geometry.experts) for kind in ("ideal", "replayed")]
        if batch > geometry.experts // geometry.top_k and len(idle) == len(options.policy):
            failed.append("no policy changed a row")
        if failed:
            return {"failed": "; ".join(failed), "states": {}}
        interleave(engine, states, options.rounds, options.steps)
    finally:
        engine.close()
    return {
        "failed": "",
        "idle": idle,
        "load_after": os.getloadavg()[0],
        "states": summarise(states, batch * options.steps, options.steps, bandwidth, bytes_per_expert, surrogate),
    }


def steps_of_a_cell(options: argparse.Namespace) -> int:
    """At most, prompts included."""
    states = 3 * len(options.policy) + 3
    checks = (len(options.policy) + 3) * (WARM + 1)
    return max(1024, states * options.rounds * options.steps + checks + max(options.batch) + PROMPT)


def foreseeing(options: argparse.Namespace) -> bool:
    """Whether a policy needs surrogates."""
    return any(text.startswith("surrogate(") for text in options.policy)


def key(options: argparse.Namespace, threads: int, batch: int) -> str:
    more = f" surrogates={options.surrogates}" if foreseeing(options) else ""
    more += " eager" if options.eager else ""
    return f"{options.geometry} {options.dtype} threads={threads} batch={batch}{more}"


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    return content


def show(content: dict[str, Any]) -> None:
    for name, cell in content["cells"].items():
        print(f"\n{name}: {cell['failed'] or 'checks passed'}")
        for state, row in cell["states"].items():
            ratios = [
                f"{row[f'throughput_over_{other}']['value']:.3f} of {other}"
                for other in ("stock", "ideal", "replayed", "backfill")
                if f"throughput_over_{other}" in row
            ]
            print(
                f"  {state:30s} {row['tokens_per_second']:8.1f} tok/s  union {row['union']:6.1f}  {', '.join(ratios)}"
            )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=0, help="0: as many as fit into 24 GiB")
    parser.add_argument(
        "--dtype", default="float32", help="float32: on CPUs without bf16 units bf16 is bound by compute"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--policy", nargs="+", help="default: an eighth, a quarter and half of the experts, and OEA")
    parser.add_argument("--methods", action="store_true", help="instead: every published method once")
    parser.add_argument("--surrogates", type=int, default=16, metavar="RANK", help="of the random maps; speed only")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=1, help="steps a block")
    parser.add_argument("--eager", action="store_true", help="the plugin without its compiled graph")
    parser.add_argument("--quick", action="store_true", help="a tiny model; its speeds mean nothing")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cell", type=int, help=argparse.SUPPRESS)  # run the cells of this number of threads here
    options = parser.parse_args()
    if options.quick:
        options.geometry, options.batch, options.threads = "tiny", [4], [1]
        options.policy = ["xshare(budget=8)", "surrogate(budget=8)"]
    experts = GEOMETRIES[options.geometry].experts
    if options.methods:
        options.policy = [text.format(quarter=experts // 4) for text in METHODS]
    options.policy = options.policy or [f"xshare(budget={experts // part})" for part in (8, 4, 2)] + ["oea(k0=2)"]
    return options


if __name__ == "__main__":
    main()
