"""The statistics file: it comes back as it was, and everything else is refused in one sentence."""

import dataclasses
import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from carpool import CarpoolError
from carpool.artefacts.checksum import checksum_of
from carpool.artefacts.files import atomic_path, read_safetensors, require_writable, write_text
from carpool.artefacts.identity import ENTRIES, SAMPLES, Identity, Sample
from carpool.artefacts.statistics import Statistics
from carpool.artefacts.tensor_checks import SIMILARITIES

E, LAYERS = 6, (1, 4)


def layer(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {"coverage": torch.randint(0, 300, (E,), generator=generator)}
    for name in SIMILARITIES:
        values = torch.rand(E, E, generator=generator)
        values = values if name == "similarity_routed" else (values + values.T) / 2
        tensors[name] = values.fill_diagonal_(1)
    return tensors | {name: torch.randn(E, ENTRIES, generator=generator).bfloat16() for name in SAMPLES}


def statistics(**changes):
    values = {
        "layers": {index: layer(index) for index in LAYERS},
        "fingerprint": "ab" * 32,
        "architecture": "TestForCausalLM",
        "num_experts": E,
        "top_k": 2,
        "hidden_size": 8,
        "tokens": 1024,
        "seed": 3,
        "data": (("prose.txt", "12" * 32), ("prose.txt", "34" * 32)),
        "created": "2025-01-01T00:00:00+00:00",
        "carpool_version": "0.1.0",
        "torch_version": "2.6",
    }
    return Statistics(**(values | changes))


def altered(name, change):
    layers = {index: layer(index) for index in LAYERS}
    layers[4][name] = change(layers[4][name])
    return layers


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "stats.safetensors"
    statistics().save(path)
    return path


def same(a, b):
    plain = [f.name for f in dataclasses.fields(Statistics) if f.name != "layers"]
    tensors = all(torch.equal(a.layers[i][n], b.layers[i][n]) for i in LAYERS for n in a.layers[i])
    return all(getattr(a, name) == getattr(b, name) for name in plain) and set(a.layers) == set(b.layers) and tensors


def test_round_trip(saved):
    loaded = Statistics.load(saved)
    assert same(loaded, statistics())
    assert set(loaded.for_layer(4)) == {*SIMILARITIES, *SAMPLES, "coverage"}
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_other_statistics_are_kept(tmp_path):
    more = {"norm_bias": torch.arange(E).double(), "norm_scale": torch.tensor(0.5)}
    statistics(layers={index: layer(index) | more for index in LAYERS}).save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors").for_layer(1)
    assert loaded["norm_bias"].tolist() == [0, 1, 2, 3, 4, 5]
    assert loaded["norm_scale"].item() == 0.5


def model(**changes):
    """The model that the statistics are of, or another one."""
    samples = {index: Sample({name: layer(index)[name] for name in SAMPLES}) for index in LAYERS}
    values = {"fingerprint": "ab" * 32, "layers": (4, 1), "num_experts": E, "top_k": 2, "hidden_size": 8}
    return Identity(**(values | {"samples": samples} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 8}, "6 experts, the model has 8"),
        ({"top_k": 4}, "2 experts a token, the model has 4"),
        ({"hidden_size": 16}, "experts of width 8, the model has 16"),
        ({"layers": (0, 1)}, r"layers 1, 4, the model's MoE layers are 0, 1"),
        ({"fingerprint": "cd" * 32}, "another model"),
        ({"samples": {1: Sample({name: -layer(1)[name] for name in SAMPLES})}}, "same routers: in layer 1 .* differ"),
    ],
)
def test_another_models_statistics_are_refused(changes, message):
    with pytest.raises(CarpoolError, match=f"{message}.*run `carpool calibrate MODEL -o stats.safetensors`"):
        statistics().check(model(**changes))


def test_check():
    assert not statistics().check(model())
    assert not statistics().check(model(hidden_size=None))
    said = statistics().check(model(samples={4: Sample(hidden="weights of torch.uint8")}))
    assert said.startswith("the experts of 2 of 2 layers could not be compared")
    with pytest.raises(CarpoolError, match="no layer 2, only 1, 4"):
        statistics().for_layer(2)


def test_statistics_of_routers_alone_need_no_sample():
    tensors = {"coverage": layer()["coverage"], "sensitivity": torch.tensor(0.5), "coverage/a": torch.ones(E)}
    made = statistics(layers=dict.fromkeys(LAYERS, tensors))
    assert not made.check(model(samples={}))
    with pytest.raises(
        CarpoolError,
        match=r"'norm_bias' and no sample of the weights.*run `carpool calibrate MODEL -o stats.safetensors`",
    ):
        statistics(layers=dict.fromkeys(LAYERS, tensors | {"norm_bias": torch.ones(E)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": {}}, "no layer"),
        ({"layers": {1: {"coverage": torch.ones(E, dtype=torch.int64)}}}, "nothing beside it"),
        ({"layers": {1: layer(), 2: layer() | {"more": torch.ones(1)}}}, "not hold the same"),
        ({"layers": altered("similarity_cosine", lambda s: s[:, :5])}, r"not torch.float32 \[6, 6\]"),
        ({"layers": altered("similarity_cosine", lambda s: s.bfloat16())}, "is torch.bfloat16"),
        ({"layers": altered("similarity_cosine", lambda s: s.clone().fill_(float("nan")))}, "NaN or inf"),
        ({"layers": altered("similarity_routed", lambda s: s.log().neg().reciprocal().neg())}, "NaN or inf"),
        ({"layers": altered("similarity_cosine", lambda s: s * 2)}, "outside"),
        ({"layers": altered("similarity_frobenius", lambda s: s - 2 * (1 - torch.eye(E)))}, "outside"),
        ({"layers": altered("similarity_cka", lambda s: s / 2)}, "itself is not 1"),
        ({"layers": altered("similarity_cka", lambda s: s.tril() + torch.zeros(E, E))}, "not symmetric"),
        ({"layers": altered("similarity_routed", lambda s: torch.eye(E))}, "identity matrix"),
        ({"layers": altered("coverage", lambda c: c.float())}, "coverage is torch.float32"),
        ({"layers": altered("coverage", lambda c: c - 1000)}, "between 0 and"),
        ({"layers": altered("coverage", lambda c: c + 1000)}, "between 0 and"),
        ({"layers": {1: layer() | {"more": torch.ones(1).cfloat()}}}, "is torch.complex64"),
        ({"layers": {1: layer() | {"more": torch.ones(1) / 0}}}, "NaN or inf"),
        ({"layers": altered("sample_in", lambda s: s[:, :3])}, r"not torch.bfloat16 \[6, 16\]"),
        ({"layers": altered("sample_in", lambda s: torch.cat([s, s]))}, "at most 6 experts"),
        ({"layers": altered("sample_out", lambda s: s.float())}, "is torch.float32"),
        ({"layers": altered("sample_out", lambda s: s / 0)}, "the model's weights do"),
        ({"layers": {1: {name: t for name, t in layer().items() if name != "sample_out"}}}, "no sample of the weights"),
        ({"tokens": 255}, "255 tokens; at least 256"),
        ({"top_k": 7}, "7 of 6 experts"),
    ],
)
def test_invalid_statistics_cannot_exist(changes, message):
    with pytest.raises(CarpoolError, match=message):
        statistics(**changes)


def write_raw(path, tensors=None, **metadata):
    """A file with a right checksum, whatever it says."""
    good = statistics()
    tensors = {f"layers.{i}.{n}": t for i in LAYERS for n, t in good.layers[i].items()} | (tensors or {})
    entries = {k: v for k, v in (good._metadata() | metadata).items() if v is not None}
    save_file(tensors, path, entries | {"checksum": checksum_of(entries, tensors).hex})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, None),
        ({"schema": None}, "no statistics file of carpool"),
        ({"schema": "2"}, "schema '2', this version reads 1"),
        ({"tokens": None}, "'tokens' is missing"),
        ({"tokens": "many"}, "'tokens' is not JSON"),
        ({"tokens": "true"}, "'tokens' is True, not of type int"),
        ({"tokens": "3"}, "3 tokens; at least"),
        ({"tokens": "1" * 5000}, "a number of 5000 digits"),
        ({"seed": "NaN"}, "NaN; give finite numbers"),
        ({"data": "[" * 100_000}, "nested too deeply"),
        ({"seed": "1.5"}, "'seed' is 1.5, not of type int"),
        ({"fingerprint": "[]"}, r"'fingerprint' is \[\], not of type str"),
        ({"data": "[[1, 2]]"}, "'data' must list"),
        ({"data": "{}"}, "'data' is {}"),
        ({"num_experts": "7"}, r"not torch.int64 \[7\]"),
    ],
)
def test_metadata_are_checked(tmp_path, metadata, message):
    path = tmp_path / "s.safetensors"
    write_raw(path, **metadata)
    if message is None:
        assert same(Statistics.load(path), statistics())
        return
    with pytest.raises(CarpoolError, match=message):
        Statistics.load(path)


@pytest.mark.parametrize("key", ["weight", "layers.x.coverage", "layers.-1.coverage", f"layers.{'9' * 5000}.coverage"])
def test_foreign_tensors_are_refused(tmp_path, key):
    write_raw(tmp_path / "s.safetensors", {key: torch.ones(2)})
    with pytest.raises(CarpoolError, match="none of carpool's"):
        Statistics.load(tmp_path / "s.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"short", "not a safetensors file"),
        (b"PK\x03\x04 some zip archive that is long enough", "not a safetensors file"),
        (struct.pack("<Q", 1 << 62) + b"{}", "claim a header of 4611686018427387904"),
        (struct.pack("<Q", 100) + b"{}", "truncated"),
        (struct.pack("<Q", 2) + b"{}", "no statistics file of carpool"),
        (struct.pack("<Q", 2) + b"[]", "no safetensors file"),
        (struct.pack("<Q", 8) + b"not json", "no safetensors file"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "s.safetensors"
    path.write_bytes(content)
    with pytest.raises(CarpoolError, match=message):
        Statistics.load(path)


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(CarpoolError, match="No such file"):
        Statistics.load(tmp_path / "none.safetensors")
    with pytest.raises(CarpoolError, match="not a regular file"):
        Statistics.load(tmp_path)


@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_refused(tmp_path_factory, share):
    path = tmp_path_factory.mktemp("truncated") / "s.safetensors"
    statistics().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CarpoolError):
        Statistics.load(path)


@given(data=st.data())
def test_a_flipped_bit_never_passes_for_other_numbers(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flipped") / "s.safetensors"
    statistics().save(path)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    low, high = data.draw(st.sampled_from([(0, 8), (8, header), (header, len(content))]))
    for _ in range(8):
        flipped = bytearray(content)
        flipped[data.draw(st.integers(low, high - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(flipped)
        try:
            loaded = Statistics.load(path)
        except CarpoolError:
            continue
        assert same(loaded, statistics())  # white space in the header


def test_layers_one_at_a_time_are_those_of_the_whole_file(tmp_path):
    path, many = tmp_path / "many.safetensors", (1, 2, 10, 11, 100)
    whole = statistics(layers={index: layer(index) for index in many})
    whole.save(path)
    found = dict(Statistics.by_layer(path))
    assert sorted(found) == list(many)
    assert all(torch.equal(found[index][name], one) for index in many for name, one in whole.layers[index].items())
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CarpoolError, match="checksum differs"):
        list(Statistics.by_layer(path))


def test_checksum_covers_metadata(saved):
    tensors, metadata = read_safetensors(saved)
    save_file(tensors, saved, metadata | {"seed": json.dumps(4)})
    with pytest.raises(CarpoolError, match="checksum differs"):
        Statistics.load(saved)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, CarpoolError])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, failure):
    path = tmp_path / "out.json"
    write_text(path, "old")
    with pytest.raises(failure), atomic_path(path) as temporary:  # noqa: PT012 - the write is part of the case
        temporary.write_text("half of the n")
        raise failure("interrupted")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_writing_goes_through_links_and_refuses_what_is_no_file(tmp_path):
    target = tmp_path / "target"
    target.write_text("old")
    link = tmp_path / "link"
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    with pytest.raises(CarpoolError, match="is not a regular file"):
        require_writable(tmp_path)
    with pytest.raises(CarpoolError, match="is not a regular file"):
        write_text("/dev/null", "")
    with pytest.raises(CarpoolError, match=r"folder .*/none does not exist"):
        require_writable(tmp_path / "none" / "file")
