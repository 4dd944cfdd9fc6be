"""DES in SGLang beside `carpool.diffusion`: `python benchmarks/sglang_diffusion.py`."""

from __future__ import annotations

from generators import Block, load, rows

HEADS = (
    "policy", "voters", ">T in SGLang", ">T in `carpool.diffusion`", ">tokens a pass in SGLang",
    ">in `carpool.diffusion`", ">same tokens",
)  # fmt: skip


def blocks() -> list[Block]:
    content = load("sglang-diffusion.json")
    if content is None:
        return []
    about = (
        f"The block-diffusion model of `carpool-demo` (64 experts, 8 a token) served by SGLang {content['sglang']} on "
        f"a CPU: {content['texts']} prompts of {content['prompt']} tokens, one by one, a block of {content['block']} "
        f"each, threshold {content['threshold']}. T is the distinct experts that a layer reads in a pass over a block, "
        "as in the paper's table; the last column counts prompts whose whole block comes out the same in both. "
        "`python benchmarks/sglang_diffusion.py`."
    )
    lines = []
    for cell in content["cells"]:
        theirs, ours = cell["sglang"], cell["carpool.diffusion"]
        lines.append([
            f"`{cell['policy']}`", cell["voters"], f"{theirs['T']:.2f}", f"{ours['T']:.2f}",
            f"{theirs['tokens_per_forward']:.3f}", f"{ours['tokens_per_forward']:.3f}",
            f"{cell['same_tokens']} of {content['texts']}",
        ])  # fmt: skip
    return [Block("docs/sglang.md", "diffusion", f"{about}\n\n{rows(HEADS, lines)}")]
