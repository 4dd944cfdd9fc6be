"""Graphs compiled ahead of time: kept on disk by all that they depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from carpool.hosts.engine.ahead import compile_ahead


@pytest.mark.slow
def test_a_library_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    given = (torch.arange(6.0).unflatten(0, (3, 2)), None, torch.ones(2))

    def scaled(rows_NH: Tensor, absent: None, by_H: Tensor) -> tuple[Tensor, None]:
        return rows_NH * (by_H + 1), absent

    def doubled_again(rows_NH: Tensor, absent: None, by_H: Tensor) -> tuple[Tensor, None]:
        return rows_NH * (by_H + 3), absent

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError

    compile_ahead(scaled, given, 1, {})
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", never)
    run = compile_ahead(scaled, given, 1, {})
    found, absent = run(torch.full((7, 2), 3.0), None, torch.ones(2))
    assert absent is None
    assert torch.equal(found, torch.full((7, 2), 6.0))
    with pytest.raises(AssertionError):
        compile_ahead(doubled_again, given, 1, {})  # another constant is another library
