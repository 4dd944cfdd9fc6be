"""The tables of docs/reading.md.

python benchmarks/expert_reading.py --output docs/results/expert-reading.json
python benchmarks/vllm_planes.py --output docs/results/vllm-planes.json
python benchmarks/whole_model.py --output docs/results/whole-model.json
python benchmarks/kernel_kl.py planes/ --output docs/results/kernel-kl.json
python benchmarks/llama_peer.py --dtype bfloat16 --output docs/results/llama-peer.json
(on other processors: into files that end with -avx2 or -amx; llama_peer.py with AVX2 without --dtype bfloat16)
"""

from __future__ import annotations

from typing import Any

from generators import Block, load, rows

PAGE = "docs/reading.md"
MACHINES = ("", "-avx2", "-amx")  # what a result of another machine ends with
SERVED = ("planes", "random")
WHOLE = "qwen3-30b-a3b"  # the geometry that is shown with every number of threads


def blocks() -> list[Block]:
    makers = {
        "layer": ("expert-reading", layer), "vllm": ("vllm-planes", engine), "whole": ("whole-model", whole),
        "kl": ("kernel-kl", kernel_kl), "llama": ("llama-peer", peer),
    }  # fmt: skip
    made = []
    for name, (file, make) in makers.items():
        found = [content for machine in MACHINES if (content := load(f"{file}{machine}.json"))]
        if found:
            made.append(Block(PAGE, f"reading {name}", "\n".join(map(make, found))))
    served = [content for name in SERVED if (content := load(f"vllm-serve-{name}.json"))]
    if served:
        made.append(Block(PAGE, "reading serve", serve(served)))
    random = [content for content in served if content["layers"]]
    return [*made, *(Block("README.md", "planes in short", in_short(content)) for content in random)]


def processor(machine: dict[str, Any]) -> str:
    """Its name, and the best of the instructions that matter: its name alone says little."""
    best = machine["isa"][-1].removesuffix("f").replace("_", "-").upper()
    return f"{machine['cpu']} with {best}"


def layer(content: dict[str, Any]) -> str:
    """Times of a layer's experts, and shares of the streaming rate; of the first machine for all geometries."""
    machine = content["machine"]
    first = content == load("expert-reading.json")
    head = (
        f"One {machine['cpu']} with {machine['cores']} cores and {content['instructions'].upper()}, "
        f"{machine['date']}, seed {content['seed']}, medians of {content['rounds']} rounds. Milliseconds for the "
        "routed experts of one layer, in brackets the share of a streaming read of the same minutes that their "
        "bytes amount to.\n"
    )
    parts = [head]
    for geometry in dict.fromkeys(cell["geometry"] for cell in content["cells"]) if first else [WHOLE]:
        mine = [cell for cell in content["cells"] if cell["geometry"] == geometry]
        most = max(cell["threads"] for cell in mine)
        mine = [cell for cell in mine if (first and geometry == WHOLE) or cell["threads"] == most]
        states = list(mine[0]["states"])
        lines = [
            [str(cell["threads"]), str(cell["batch"])]
            + [f"{cell['distinct_experts']:.0f}", f"{cell['bf16_ideal_ms']:.1f}"]
            + [_cell(cell["states"].get(state)) for state in states]
            for cell in mine
        ]
        columns = [">threads", ">rows", ">experts", ">bf16 ideal", *(f">{state}" for state in states)]
        parts.append(f"\n**{geometry}**\n\n" + rows(columns, lines))
    return "".join(parts)


def _cell(state: dict[str, Any] | None) -> str:
    return "–" if state is None else f"{state['ms']:.2f} ({state['of_stream']:.0%})"


def engine(content: dict[str, Any]) -> str:
    """Decode steps of vLLM, and a prompt."""
    machine, cells = content["machine"], content["cells"]
    head = (
        f"{content['geometry']}, {content['layers']} layers with random weights, vLLM "
        f"{machine['versions']['vllm']}, {processor(machine)}, {content['threads'] or machine['cores']} threads "
        f"({machine['date']}, seed {content['seed']}, medians of {content['rounds']} interleaved rounds of "
        f"{content['tokens']} tokens). Milliseconds a step, in brackets the speed-up over stock and the one that "
        "bytes allow.\n\n"
    )
    states = list(cells[0]["step_ms"])
    lines = [
        [state, f"{cells[0]['step_ms'][state]['bits']:.2f}"]
        + [
            f"{found['median']:.1f} ({found['speed_up']:.2f} of {found['bound']:.2f})"
            for found in (cell["step_ms"][state] for cell in cells)
        ]
        for state in states
    ]
    table = rows(["experts", ">bits", *(f">batch {cell['batch']}" for cell in cells)], lines)
    if "choosing" in cells[0]["step_ms"][states[0]]:
        table += "\n" + choosing(cells, "step_ms", "choosing", "median") + "\n"
    prompt = content["prompt"]
    if not prompt:
        return head + table
    tail = (
        f"\nA prompt of {prompt['tokens']:,} tokens to its first token: stock {prompt['stock']:.2f} s, planes "
        f"{prompt['planes']:.2f} s ({prompt['stock'] / prompt['planes']:.2f} of stock's speed).\n"
    )
    return head + table + tail


def serve(contents: list[dict[str, Any]]) -> str:
    """What vLLM's own client saw of servers on 16-bit weights and on planes."""
    machine = contents[0]["machine"]
    head = (
        f"vLLM {machine['versions']['vllm']}, {processor(machine)}, one thread, {machine['date']}; `vllm bench serve`, "
        "medians of servers that started in turn.\n\n"
    )
    lines = []
    for content in contents:
        name = f"{content['geometry']}, {content['layers']} layers" if content["layers"] else "reference model"
        for state, found in content["summary"].items():
            if not isinstance(found, dict):
                continue
            policy = f"`{content['policy']}`" if state == "shared" else "as stored" if state == "planes" else "stock"
            lines.append([
                name, policy, str(content["concurrency"]), f"{found['output_throughput']:.0f}",
                f"{found['mean_ttft_ms']:.0f}", f"{found['mean_tpot_ms']:.1f}", f"{found['p99_tpot_ms']:.1f}",
                f"{found['peak_memory_bytes'] / 2**30:.1f}",
            ])  # fmt: skip
    heads = ["model", "experts", ">requests at once", ">tokens/s", ">first token, ms", ">a token, ms", ">99 %, ms",
             ">memory, GiB"]  # fmt: skip
    return head + rows(heads, lines)


def in_short(content: dict[str, Any]) -> str:
    """What a server gains, in a sentence."""
    stock, planes, shared = (content["summary"][state] for state in ("stock", "planes", "shared"))
    rate, memory = "output_throughput", "peak_memory_bytes"
    return (
        f"`vllm bench serve` with {content['concurrency']} requests at once, {content['layers']} layers of "
        f"{content['geometry']} with random weights, a thread of an {processor(content['machine'])}: stock bf16 "
        f"{stock[rate]:.0f} tokens a second, planes as stored (6 bits) {planes[rate]:.0f}, under "
        f"`{content['policy']}` {shared[rate]:.0f} ({shared[rate] / stock[rate]:.1f} times as many), in "
        f"{shared[memory] / 2**30:.1f} instead of {stock[memory] / 2**30:.1f} GiB. {_whole_in_short()}"
        "[Kernels, peers, llama.cpp among them](docs/reading.md).\n"
    )


def _whole_in_short() -> str:
    content = load("whole-model.json")
    hosts = [] if content is None else [host for host in content["hosts"] if host["host"] == "vllm"]
    if not content or not hosts:
        return ""
    [cells] = [made for state, made in hosts[0]["states"].items() if "(" in state]
    rates = ", ".join(f"{cell['tokens_s']:.0f} at batch {cell['batch']}" for cell in cells)
    whole = 16 * content["planes_gib"] / content["bits_stored"]
    return (
        f"All {content['layers']} layers, whose experts are {whole:.0f} GiB in bf16, run in "
        f"{hosts[0]['peak_anonymous_gib']:.0f} GiB on two such cores: tokens a second {rates}. "
    )


def whole(content: dict[str, Any]) -> str:
    """What both hosts take for a whole model."""
    machine = content["machine"]
    head = (
        f"{content['geometry']}: {content['layers']} layers, vocabulary {content['vocabulary']:,}, "
        f"{content['bits_stored']:.2f} bits stored an expert weight: {content['planes_gib']:.1f} GiB of planes and "
        f"{content['weights_gib']:.1f} GiB of other weights in bf16. {processor(machine)}, {machine['date']}, seed "
        f"{content['seed']}; one run.\n\n"
    )
    lines = [
        [
            host["host"],
            str(host["threads"] or machine["cores"]),
            f"{host['load_s']:.0f} s",
            f"{host['peak_anonymous_gib']:.1f} GiB",
            state,
        ]
        + [f"{cell['tokens_s']:.2f}" for cell in cells]
        for host in content["hosts"]
        for state, cells in host["states"].items()
    ]
    batches = [cell["batch"] for cell in next(iter(content["hosts"][0]["states"].values()))]
    columns = ["host", ">threads", ">loaded in", ">peak memory", "experts", *(f">tokens/s, batch {b}" for b in batches)]
    return head + rows(
        columns, [[*line[:4], f"`{line[4]}`" if "(" in line[4] else line[4], *line[5:]] for line in lines]
    )


def kernel_kl(content: dict[str, Any]) -> str:
    """KL with the kernels beside KL in plain torch."""
    given = content["arguments"]
    head = (
        f"Reference model, batch {given['batch']}, {given['batches']} batches of held-out text, seed {given['seed']}, "
        f"{content['instructions'].upper()}; nats a token [95 %].\n\n"
    )

    def shown(one: dict[str, Any]) -> str:
        between = "" if one["low"] is None else f" [{one['low']:.4f}, {one['high']:.4f}]"
        return f"{one['kl']:.4f}{between}"

    lines = [
        [f"`{row['plan']}`", f"{row['bits']:.2f}", *(shown(row[name]) for name in ("plain", "kernels", "apart"))]
        for row in content["rows"]
    ]
    return head + rows(["plan", ">bits", ">plain torch", ">kernels", ">kernels from plain torch"], lines)


def peer(content: dict[str, Any]) -> str:
    """llama.cpp beside vLLM on planes."""
    machine, cells = content["machine"], content["cells"]
    head = (
        f"{content['geometry']}, {content['layers']} layers with random weights, llama-cpp-python "
        f"{content['llama_cpp_python']}, {processor(machine)}, {content['threads']} threads ({machine['date']}, seed "
        f"{content['seed']}, medians of {content['rounds']} interleaved rounds of {content['steps']} steps). "
        f"Milliseconds a step, in brackets tokens a second. Beside experts: {content['dtype']} in vLLM, F16 in "
        "llama.cpp.\n\n"
    )
    lines = [
        [state, f"{found['bits']:.2f}"]
        + [f"{cell['states'][state]['step_ms']:.1f} ({cell['states'][state]['tokens_s']:.0f})" for cell in cells]
        for state, found in cells[0]["states"].items()
    ]
    table = rows(["experts", ">bits", *(f">batch {cell['batch']}" for cell in cells)], lines)
    emulated = _emulated() if content["dtype"] == "float32" else ""
    return f"{head}{table}\n{choosing(cells, 'states', 'choosing_ms', 'step_ms')}{emulated}\n"


def choosing(cells: list[dict[str, Any]], states: str, part: str, step: str) -> str:
    """The largest share of a step that choosing depths takes, for every batch; states without it are stock's."""
    shares = [
        f"{max(one.get(part, 0) / one[step] for one in cell[states].values()):.1%} at batch {cell['batch']}"
        for cell in cells
    ]
    return f"Choosing depths takes at most {', '.join(shares)} of vLLM's step."


def _emulated() -> str:
    """The same with bf16 (`--dtype bfloat16`), where that was run."""
    content = load("llama-peer-avx2-bf16.json")
    if content is None:
        return ""
    deepest = list(content["cells"][0]["states"])[2]
    found = " / ".join(f"{cell['states'][deepest]['step_ms']:.1f}" for cell in content["cells"])
    return f" With `--dtype bfloat16`, which this processor emulates, {deepest} takes {found} ms."
