"""What a layer's routing launches: `TRITON_INTERPRET=1 python benchmarks/gpu_layer.py`."""

from __future__ import annotations

from generators import Block, load

PAGE = "docs/vllm.md"


def blocks() -> list[Block]:
    content = load("routing-launches.json")
    if content is None:
        return []
    lines = [line for line in content["lines"] if line["groups"] == 1]
    few, many = (choose(lines, key=lambda line: line["operations_general"]) for choose in (min, max))
    [ours] = {line["launches"] for line in lines}
    beside = [f"`{_name(line)}` {line['operations_beside']}" for line in lines if line["operations_beside"]]
    wrong = sum(line["rows_with_other_experts"] for line in content["lines"])
    layer, apart = lines[0], max(line["ulp"] for line in content["lines"])
    said = (
        f"`TRITON_INTERPRET=1 python benchmarks/gpu_layer.py --sizes {layer['layer']} --rows {layer['rows']}` counts "
        f"them: {ours} launches a layer for each of {len(lines)} policies (operations beside them: "
        f"{', '.join(beside) or 'none'}). Routing operation by operation takes {few['operations_general']} "
        f"(`{_name(few)}`) to {many['operations_general']} (`{_name(many)}`) operations, each a kernel at least. Rows "
        f"with other experts than there: {wrong}; weights within {apart} ulp. Python {content['python']}, torch "
        f"{content['torch'].partition('+')[0]}, Triton {content['triton']}, {content['machine']}: counted and compared "
        "in Triton's interpreter, not timed.\n"
    )
    return [Block(PAGE, "routing launches", said)]


def _name(line: dict[str, str]) -> str:
    """The policy without its guards."""
    return line["policy"].partition(" | ")[0]
