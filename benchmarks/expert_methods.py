"""What `expert_bytes.py` measures: every method at its settings, and the files of experts that they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

BITS, GROUPS = (2, 3, 4, 5, 6), (32, 64, 128)
NESTED, SHIPPED = "nested-64", "shipped"
OURS = "depth"
ALONE = "planes at one depth"
CONTROLS = (
    "random on 4 bits", "depth, all levels {2, 4}", "depth, nothing left out", "depth, equal energies",
    "static, by lost energy", ALONE,
)  # fmt: skip
FEWER = {3: (0.12, 0.135, 0.15, 0.17, 0.19), 4: (0.12, 0.15, 0.17, 0.19, 0.22, 0.25), 5: (0.15, 0.19, 0.22, 0.25, 0.28)}
K = 8  # experts a token of the reference model


@dataclass(frozen=True)
class Method:
    """A method at several settings: which file of experts it reads, and its plan."""

    name: str
    settings: tuple[tuple[str, str], ...]


def uniform(bits: int, group: int) -> str:
    return f"uniform-{bits}-{group}"


def only(method: Method, wanted: Callable[[str, str], bool]) -> Method:
    """The settings (file, plan) that are wanted."""
    return replace(method, settings=tuple(one for one in method.settings if wanted(*one)))


def fewer(bits: int) -> str:
    return f"depth, up to {bits} bits"


def methods() -> list[Method]:
    shares = (0.12, 0.135, 0.15, 0.17, 0.19, 0.22, 0.25, 0.28, 0.32)

    def on(bits: int, policy: str, budgets: tuple[int, ...], more: str = "") -> tuple[tuple[str, str], ...]:
        file, cap = (SHIPPED, "") if bits == 16 else (uniform(bits, 64), f" | bits({bits})")
        return tuple((file, f"{policy}(budget={budget}{more}){cap}") for budget in budgets)

    squared = ", warmup=0, utility='squared'"
    nested = {
        OURS: [f"depth(bytes={share})" for share in shares],
        "depth, equal energies": [f"depth(bytes={share}, energy='equal')" for share in shares[2:8]],
        "depth, all levels {2, 4}": [f"depth(bytes={share}, levels=[2, 4])" for share in (0.17, 0.19, 0.22, 0.25)],
        **{  # what a file stores that ends at fewer bits
            fewer(bits): [f"depth(bytes={share}, levels={[0, *range(2, bits + 1)]})" for share in of]
            for bits, of in FEWER.items()
        },
        "depth, nothing left out": [f"depth(bytes={share}, levels={list(BITS)})" for share in (0.15, 0.17, 0.19, 0.22)],
        ALONE: [f"topk(k={K}) | bits({bits})" for bits in BITS],
        "static, by lost energy": [f"bit_plan(bits={bits}, alpha=0, beta=0)" for bits in (2.25, 2.5, 3, 3.5, 4, 4.5)],
        "MC's bit plan": [f"bit_plan(bits={bits})" for bits in (2.25, 2.5, 3, 3.5, 4, 4.5)],
        "MC's bit plan, as released": [f"bit_plan(bits={bits}, gamma=1.0)" for bits in (2.5, 3, 3.5, 4)],
        "HOBBIT": [f"hobbit({high}, {low})" for high, low in ((3, 2), (4, 2), (4, 3), (5, 4), (6, 5))],
        "HOBBIT, nothing left out": [
            f"hobbit({high}, {low}, second=1.0)" for high, low in ((3, 2), (4, 2), (4, 3), (5, 3), (6, 4))
        ],
    }
    return [
        *(Method(f"uniform, groups of {group}", tuple((uniform(bits, group), f"topk(k={K}) | bits({bits})")
                                                      for bits in BITS)) for group in GROUPS),
        *(Method(name, tuple((NESTED, plan) for plan in plans)) for name, plans in nested.items()),
        Method("XShare on 3 bits", on(3, "xshare", (30, 36, 44, 52, 58), squared)),
        Method("XShare on 4 bits", on(4, "xshare", (22, 28, 36, 44, 52, 58), squared)),
        Method("XShare on 5 bits", on(5, "xshare", (36, 44, 52, 58), squared)),
        Method("XShare on 16 bits", on(16, "xshare", (10, 16, 26, 36), squared)),
        Method("surrogates on 16 bits", on(16, "surrogate", (10, 20, 30))),
        Method("random on 4 bits", on(4, "random", (36, 44, 52))),
    ]  # fmt: skip
