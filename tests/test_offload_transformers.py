"""`carpool.offload`: a transformers model whose experts are on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_compressed_checkpoints import logits, made
from test_transformers_loading import save
from tiny_models import tiny_model, tokens

import carpool
from carpool import CarpoolError
from carpool.hosts.transformers import find_layers, load_model
from carpool.kernels.experts import build

pytestmark = pytest.mark.skipif(not build.ready(), reason="no compiler for the kernels")


@pytest.fixture(scope="module", params=["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp(request.param)
    source = save(tmp / "source", tiny_model(request.param))
    made(source, tmp / "planes", "planes", (2, 4), 32)
    return tmp / "planes"


SMALL = 200_000  # bytes: a few experts of each layer of the tiny models, whose planes are padded to pages


def test_exact_is_the_resident_model_bit_for_bit(folder: Path) -> None:
    resident, _ = load_model(folder)
    ids = tokens(3, 6)
    want = logits(resident, ids)
    before = [name for name, _ in resident.named_parameters()]
    with carpool.offload(folder, SMALL) as run:
        assert run.model is not resident
        assert torch.equal(logits(run.model, ids), want)
        assert torch.equal(logits(run.model, ids), want)
        made_ids = run.model.generate(ids, max_new_tokens=5, do_sample=False)
        assert run.totals.uses > run.totals.hits
        assert "in memory" in str(run)
        assert run.experts.memory.used <= SMALL
        assert [name for name, _ in run.model.named_parameters()] == before
        left = run.model
    assert torch.equal(made_ids, resident.generate(ids, max_new_tokens=5, do_sample=False))
    with pytest.raises(CarpoolError, match="are on disk and were not loaded; read them there"):
        logits(left, ids)
    with carpool.offload(left, "1MB", cache="lfu") as run:
        assert torch.equal(logits(left, ids), want)


def test_a_resident_model_is_as_before_after_the_block(folder: Path) -> None:
    model, _ = load_model(folder)
    ids = tokens(2, 5)
    want = logits(model, ids)
    with carpool.offload(model, SMALL, on_miss="depth(2)"):
        assert not torch.equal(logits(model, ids), want)
    assert torch.equal(logits(model, ids), want)


def test_policies_share_experts_that_are_on_disk(folder: Path) -> None:
    resident, _ = load_model(folder)
    ids = tokens(4, 6)
    for plan in ("xshare(budget=4)", "depth(price=0, levels=[2, 4])"):
        with carpool.share(resident, plan):
            want = logits(resident, ids)
        with carpool.offload(folder, "10MB") as run, carpool.share(run.model, plan):
            assert torch.equal(logits(run.model, ids), want)


def test_policies_may_use_what_is_in_memory_beside_their_budget(folder: Path) -> None:
    resident, _ = load_model(folder)
    ids = tokens(4, 6)
    want, plan = logits(resident, ids), "xshare(budget=1, warmup=0)"
    for free in (True, False):
        with carpool.offload(folder, "10MB", resident_free=free) as run:
            assert torch.equal(logits(run.model, ids), want)
            with carpool.share(run.model, plan, exempt_prefill=False):
                assert torch.equal(logits(run.model, ids), want) == free


def test_experts_are_pinned_by_the_number_of_their_layer(folder: Path) -> None:
    resident, _ = load_model(folder)
    index = find_layers(resident)[1].index
    with carpool.offload(folder, "300KB", pinned={index: [2]}) as run:
        assert torch.equal(logits(run.model, tokens(2, 3)), logits(resident, tokens(2, 3)))
        assert int(run.experts.resident_LE[1, 2]) == run.experts.store.geometry.deepest
    with pytest.raises(CarpoolError, match="layer 99 has no experts"), carpool.offload(folder, "1MB", pinned={99: [2]}):
        pass


def test_files_that_do_not_belong_are_refused(folder: Path, tmp_path: Path) -> None:
    with carpool.offload(folder, SMALL) as run:
        logits(run.model, tokens(1, 2))
    path = next(folder.glob("*.offload"))
    content = path.read_bytes()
    at = content.index(b'"source": "') + 11
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(CarpoolError, match=r"was made from another"), carpool.offload(folder, SMALL):
        pass
    path.unlink()
    with (
        pytest.raises(CarpoolError, match=r"cannot write .*does not exist"),
        carpool.offload(folder, SMALL, file=tmp_path / "no" / "x"),
    ):
        pass
    usual = tiny_model("qwen3_moe")
    with pytest.raises(CarpoolError, match="are no planes in memory"), carpool.offload(usual, SMALL):
        pass
    source = save(tmp_path / "usual", usual)
    with pytest.raises(CarpoolError, match="has no experts in planes; make a copy"), carpool.offload(source, SMALL):
        pass
    with pytest.raises(CarpoolError, match="memory 4 gigs: give an amount"), carpool.offload(folder, "4 gigs"):
        pass


def test_the_next_layer_is_read_ahead(folder: Path) -> None:
    resident, _ = load_model(folder)
    with carpool.offload(folder, "300KB") as run:
        for seed in range(6):
            ids = tokens(1, 1, seed)
            assert torch.equal(logits(run.model, ids), logits(resident, ids))
        assert run.totals.fetched > 0
        assert run.totals.useful <= run.totals.fetched
    layers = find_layers(resident)
    assert len(layers) == 2
