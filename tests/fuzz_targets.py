"""Bad input of every kind, made from a seed: policy texts, files, configurations, logits and results. `TARGETS` try one
each and say whether it was read; a refusal has to be one readable line."""

from __future__ import annotations

import json
import random
import string
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from policies_under_test import ROWS
from report_files import blocks, broken_somewhere, evaluation, interference
from safetensors.torch import save
from torch import Tensor

from carpool import Batch, CarpoolError, RouteSpec, parse, route
from carpool.artefacts.statistics import Statistics
from carpool.hosts.engine.settings import Settings
from carpool.plans.policy_file import PolicyFile
from carpool.report.load import load
from carpool.report.page import page

VALID = [text for row in ROWS for text in row.texts(16, 4)]
GUARDS = ["floor(0.3)", "min_batch(2)", "decode_only", "short_circuit", "regret(0.1)", "protect([3, 7])"]
ODD_NUMBERS = ["-1", "0", "1e999", "nan", "-0.0", "9" * 30, "9" * 5000, "1_0", "0x10", "1j", "True", "None", "1e-320"]
ODD_WORDS = [
    "__import__('os')",
    "lambda: 0",
    "[" * 60,
    "(" * 2000,
    "{1: []}",
    "'\\x00'",
    "\ud800",
    "é",
    "|",
    "||",
    "**{}",
]
ODD_PATHS = ["../stats.safetensors", "/etc/passwd", ".", "..", "", "a\0b", "a/b", "x" * 300, "~", "stats.safetensors/",
             "\ud800", "link", "folder", "pipe"]  # fmt: skip


def allowed(action: Callable[[], object]) -> bool:
    """Whether it went through; a CarpoolError is a refusal, and has to be one readable line."""
    try:
        action()
    except CarpoolError as refusal:
        message = str(refusal)
    else:
        return True
    assert message.strip()
    assert "\n" not in message.strip()
    assert len(message) < 5000
    return False


def mutated_text(rng: random.Random) -> str:
    text = " | ".join([rng.choice(VALID), *rng.sample(GUARDS, rng.randrange(3))])
    for _ in range(rng.randrange(1, 5)):
        at, kind = rng.randrange(len(text) + 1), rng.randrange(6)
        if kind == 0:
            text = text[:at] + rng.choice(string.printable) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + rng.randrange(1, 6) :]
        elif kind == 2:
            text = text[:at] + rng.choice(ODD_WORDS) + text[at:]
        elif kind == 3:
            numbers = [i for i, letter in enumerate(text) if letter.isdigit()] or [0]
            place = rng.choice(numbers)
            text = text[:place] + rng.choice(ODD_NUMBERS) + text[place + 1 :]
        elif kind == 4:
            text = text + rng.choice([" | ", "|", ", "]) + text
        else:
            text = text.replace("(", rng.choice(["((", "[", "(x=", "(budget="]), 1)
    return text


def fuzz_text(rng: random.Random, folder: Path) -> bool:
    def act() -> None:
        plan = parse(mutated_text(rng))
        plan.check(16, 4)
        assert parse(str(plan)) == plan

    return allowed(act)


def odd_json(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return rng.choice([None, True, False, float("nan"), float("inf"), -0.0, 1e308, 2**70, -1])
    if kind == 1:
        return rng.choice(ODD_PATHS)
    if kind == 2:
        return rng.choice(VALID)
    if kind < 6:
        return rng.choice(["batch", "tenant", "prompt", "request", 1, 0.5, 3, "0", [], {}])
    if kind < 8:
        return {rng.choice([*KEYS, "0", "-1", "x"]): odd_json(rng, depth + 1) for _ in range(rng.randrange(4))}
    return [odd_json(rng, depth + 1) for _ in range(rng.randrange(4))]


KEYS = [
    "schema", "policy", "layers", "model", "statistics", "curve", "file", "sha256", "budget", "floor", "fingerprint",
    "stats", "group", "isolation", "allow_untested_engine",
]  # fmt: skip


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut, with flipped bits, with a piece of itself or of noise somewhere."""
    made = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        if not made:
            break
        at, kind = rng.randrange(len(made)), rng.randrange(4)
        if kind == 0:
            made = made[:at]
        elif kind == 1:
            made[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            made[at:at] = rng.randbytes(rng.randrange(1, 20))
        else:
            start = rng.randrange(len(made))
            made[at:at] = made[start : start + 40]
    return bytes(made)


def fuzz_policy_file(rng: random.Random, folder: Path) -> bool:
    content: dict[str, Any] = {"schema": 1, "policy": "xshare(budget=8) | floor(0.3)", "layers": {"1": {"budget": 4}}}
    if rng.random() < 0.6:
        content |= {rng.choice(KEYS): odd_json(rng) for _ in range(rng.randrange(1, 3))}
    if rng.random() < 0.3:
        content["statistics"] = {"file": rng.choice(ODD_PATHS), "sha256": rng.choice(["", "0" * 64, None, 3])}
    data = json.dumps(content).encode()
    if rng.random() < 0.4:
        data = damaged(data, rng)
    if rng.random() < 0.02:
        data = b"[" * 100_000 if rng.random() < 0.5 else b'{"a":' * 50_000
    path = folder / "policy.json"
    path.write_bytes(data)

    def act() -> None:
        loaded = PolicyFile.load(path)
        for layer in range(3):
            loaded.plan_for(layer)

    return allowed(act)


def fuzz_statistics(rng: random.Random, folder: Path) -> bool:
    path, good = folder / "fuzzed.safetensors", (folder / "stats.safetensors").read_bytes()
    size = int.from_bytes(good[:8], "little")
    kind = rng.randrange(6)
    if kind == 0:
        data = damaged(good, rng)
    elif kind == 1:  # a header that claims to be huge
        data = struct.pack("<Q", rng.choice([2**63, 2**64 - 1, len(good), len(good) * 2, size + 1, 0])) + good[8:]
    elif kind == 2:  # bits of the header alone
        data = good[:8] + damaged(good[8 : 8 + size], rng).ljust(size)[:size] + good[8 + size :]
    elif kind == 3:  # offsets, shapes and types that do not fit
        header = json.loads(good[8 : 8 + size])
        entry = header[rng.choice([name for name in header if name != "__metadata__"])]
        change = {
            "data_offsets": rng.choice([[0, 2**62], [5, 1], [-1, 4], [0, 0], "x", None, [0]]),
            "shape": rng.choice([[2**40, 2**40], [-1], [], None, [0], ["a"], [6]]),
            "dtype": rng.choice(["F64", "BOOL", "F8_E4M3", "U64", "nope", None, 7, "I64", "BF16"]),
        }
        name = rng.choice(list(change))
        entry[name] = change[name]
        text = json.dumps(header).encode()
        data = struct.pack("<Q", len(text)) + text + good[8 + size :]
    elif kind == 4:  # a valid file of other tensors
        shape = rng.choice([(6, 6), (6,), (0,), (1, 6, 6), ()])
        dtype = rng.choice([torch.float32, torch.float16, torch.int8, torch.bool, torch.float64, torch.bfloat16])
        name = rng.choice(
            ["layers.1.coverage", "layers.1.similarity_cka", "layers.x.y", "", "a.b", "layers.99999999999.c"]
        )
        with_metadata = json.loads(good[8 : 8 + size])["__metadata__"] if rng.random() < 0.7 else {"a": "b"}
        data = save({name: torch.zeros(shape).to(dtype)}, with_metadata)
    else:
        return allowed(lambda: Statistics.load(folder / rng.choice([one for one in ODD_PATHS if one])))
    path.write_bytes(data)
    return allowed(lambda: Statistics.load(path))


def fuzz_settings(rng: random.Random, folder: Path) -> bool:
    """What a user writes into vLLM's `additional_config`."""
    given: Any = {"policy": "xshare(budget=8)", "isolation": "batch"}
    for _ in range(rng.randrange(3)):
        given[rng.choice(KEYS)] = odd_json(rng)
    if rng.random() < 0.2:
        given.pop("policy", None)
        given["file"] = str(folder / rng.choice([*ODD_PATHS, "policy.json"]))
    if rng.random() < 0.1:
        given = odd_json(rng)
    return allowed(lambda: Settings.of({"carpool": given}))


def odd_logits(rng: random.Random, rows: int, experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(2**30))
    logits_NE = torch.randn(rows, experts, generator=generator) * rng.choice([0.0, 1e-42, 1e-8, 1.0, 50.0, 1e30, 3e38])
    for _ in range(rng.randrange(6)):
        value = rng.choice([torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45, 0.0, -0.0, 3.4e38, -3.4e38, 65504.0])
        where = torch.rand(rows, experts, generator=generator) < rng.choice([0.02, 0.5, 1.0])
        where &= torch.rand(rows, 1, generator=generator) < 0.6
        logits_NE = logits_NE.masked_fill(where, value)
    return logits_NE.to(rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]))


def fuzz_logits(rng: random.Random, folder: Path) -> bool:
    row = rng.choice(ROWS)
    rows, experts, top_k = rng.choice([1, 2, 5, 16]), rng.choice([4, 16, 60, 128]), rng.choice([1, 2, 4])
    text = " | ".join(
        [rng.choice(row.texts(experts, top_k)), *rng.sample([*GUARDS[:5], "protect([1, 3])"], rng.randrange(4))]
    )
    logits_NE = odd_logits(rng, rows, experts)
    generator = torch.Generator().manual_seed(rng.randrange(2**30))
    kind_N = torch.randint(0, 6, (rows,), generator=generator)
    groups = rng.choice([1, rows])
    group_N = torch.arange(rows) % groups
    batch = Batch.of(
        rows, group_N=group_N, num_groups=groups, real_N=kind_N != 0, voter_N=kind_N != 1, exempt_N=kind_N == 2,
        prefill_N=kind_N == 3, **row.extras(rows, experts),
    )  # fmt: skip
    spec = RouteSpec(
        top_k=top_k, scoring=rng.choice(["softmax", "sigmoid", "sqrtsoftplus"]), renormalize=rng.random() < 0.5
    )
    plan = parse(text)
    stats = plan.prepare(row.stats(experts, generator))
    hidden_NH = torch.randn(rows, 4, generator=generator) * rng.choice([0.0, 1.0, 1e20]) if row.hidden else None
    outcome = route(plan, spec, logits_NE, batch, stats=stats, hidden_NH=hidden_NH)
    finite_N = logits_NE.isfinite().all(-1)
    ids_NK, weights_NK = outcome.routing.ids_NK, outcome.routing.weights_NK
    assert ((ids_NK >= 0) & (ids_NK < experts)).all(), text
    assert weights_NK.isfinite().all(), text
    assert (weights_NK >= 0).all(), text
    assert not outcome.changed_N[~finite_N].any(), text
    assert torch.equal(outcome.nonfinite_N, ~finite_N & batch.real_N), text
    return True


def fuzz_results(rng: random.Random, folder: Path) -> bool:
    """Files of results whose numbers, lists and names are not what they were, and the page of what is read."""
    content = broken_somewhere(rng.choice([evaluation, blocks, interference])(), rng)
    path, whole = folder / "results.json", folder / "whole.json"
    path.write_text(json.dumps(content))
    whole.write_text(json.dumps(evaluation()))
    paths = [whole, path] if "histogram_edges" in content else [path]

    def act() -> None:
        page(*load(paths))

    return allowed(act)


TARGETS: dict[str, Callable[[random.Random, Path], bool]] = {
    "text": fuzz_text, "policy_file": fuzz_policy_file, "statistics": fuzz_statistics, "settings": fuzz_settings,
    "logits": fuzz_logits, "results": fuzz_results,
}  # fmt: skip
