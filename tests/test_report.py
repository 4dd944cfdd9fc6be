"""`carpool report`: one self-contained page with everything the results hold, or one sentence on what is wrong."""

import json
import re
from dataclasses import replace

import pytest
from lockstep_tools import NumberTokenizer, noise, small_model
from typer.testing import CliRunner

from carpool.cli.commands import app
from carpool.cli.common import model_facts
from carpool.evaluate import results as results_file
from carpool.evaluate.study import Settings, sequences_for, study
from carpool.hosts.transformers import weight_bytes
from carpool.plans.grammar import parse
from carpool.report import details, figures, page, sections
from carpool.report.bandwidth import QWEN3_30B, Sizes, sizes_of
from carpool.report.depth import depth_section
from carpool.report.load import load, method_of
from carpool.routing.batch import Grouping

POLICIES = ("oea(k0=1)", "xshare(budget=3)", "xshare(budget=5)", "topk(k=1)")
EVIL = "</script><b>&"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two files of the same policies on other seeds."""
    folder = tmp_path_factory.mktemp("results")
    model, texts = small_model(), [noise(domain, 200, seed) for seed, domain in enumerate(("a<i>", "b", "a<i>", "b"))]
    paths = []
    for seed in (0, 1):
        chosen = Settings(
            tuple(map(parse, POLICIES)), Grouping.parse("batch"), (2, 4), sequence=9, prefill=3, batches=4, seed=seed
        )
        found = study(model, chosen, sequences_for(chosen, texts, NumberTokenizer()))
        paths.append(folder / f"seed{seed}.json")
        results_file.write(
            paths[-1], [row for rows in found for row in rows], decode=lambda ids: EVIL,
            model={"name": "tiny", "layers": 2, "experts": 8, "top_k": 2}, texts=[], seed=seed,
        )  # fmt: skip
    return paths


def invoke(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def without_libraries(html):
    """The page without plotly's own code."""
    scripts = sorted(re.findall(r"<script>.*?</script>", html, flags=re.DOTALL), key=len)
    return html.replace(scripts[-1], "")


def test_a_page_of_two_files(results, tmp_path):
    out = tmp_path / "report.html"
    done = invoke(*results, "-o", out)
    assert done.exit_code == 0, done.output
    html = out.read_text()
    own = without_libraries(html)
    for title in (
        "What it saves",
        "bandwidth",
        "Layer by layer",
        "Who uses which",
        "lose most",
        "All results",
        "Side by",
    ):
        assert title in own
    for policy in POLICIES:
        assert policy in own
    # nothing is fetched, and a text cannot leave its place
    assert not re.search(r"(src|href)=\"(?!data:)", own)
    assert EVIL not in own
    assert "a<i>" not in own.replace("\\u003ci\\u003e", "")
    one_of_many = load(results)[0][1].at(4)[1]
    assert f"{one_of_many.value('kl'):.4f}" in own


def test_interference_beside_an_evaluation(results, tmp_path):
    quantiles = {"mean": 0.01, "quantiles": {"p99": 0.1, "p100": 0.4321}, "histogram": [1, 2, 3]}
    row = {
        "policy": "oea(k0=1)", "kl": quantiles, "kl_between_co_batches": quantiles, "flipped_greedy": 0.1,
        "unstable_greedy": 0.2, "worst_displaced_mass": 0.3, "worst_token": {"text": EVIL},
    }  # fmt: skip
    content = {"kind": "carpool interference", "schema": 1, "histogram_edges": [0.01, 0.1], "results": [row]}
    path, out = tmp_path / "interference.json", tmp_path / "report.html"
    path.write_text(json.dumps(content))
    assert invoke(results[0], path, "-o", out).exit_code == 0
    own = without_libraries(out.read_text())
    assert "What neighbours change" in own
    assert "0.432" in own
    assert EVIL not in own
    out.unlink()
    assert "beside those of" in invoke(path, "-o", out).output
    path.write_text(json.dumps(content | {"histogram_edges": [1]}))
    assert "is [1, 2, 3], not a list of 2" in invoke(results[0], path, "-o", out).output
    assert not out.exists()


def blocks_of(path, target):
    """The results as if they were of block diffusion."""
    content = json.loads(path.read_text()) | {"kind": "carpool block diffusion"}
    one = {"value": 0.75, "low": 0.7, "high": 0.8}
    for row in content["results"]:
        del row["details"]
        row["masked_tokens"] = row.pop("decoded_tokens")
        row["decoding"] = dict.fromkeys(("union", "union_share", "tokens_per_forward", "agreement"), one)
        row["decoding"] |= {"followed_agreement": None, "perplexity_ratio": {"value": 1.234, "low": None, "high": None}}
    target.write_text(json.dumps(content))
    return content


def test_block_diffusion(results, tmp_path):
    path, out = tmp_path / "blocks.json", tmp_path / "report.html"
    content = blocks_of(results[0], path)
    done = invoke(path, "-o", out)
    assert done.exit_code == 0, done.output
    own = without_libraries(out.read_text())
    for text in ("What is decoded", "0.7000–0.8000", "1.234", "masked tokens", "All results"):
        assert text in own
    assert "Who uses which" not in own
    assert invoke(path, results[1], "-o", out).exit_code == 0
    own = without_libraries(out.read_text())
    assert own.index("Block diffusion") < own.index("What is decoded") < own.index("Decoding step by step")
    del content["results"][1]["decoding"]["agreement"]
    path.write_text(json.dumps(content))
    assert "lacks 'agreement' of the decoding of oea(k0=1)" in invoke(path, "-o", out).output


def test_ticks_are_written_in_full():
    values, texts = figures._ticks([0.0041, 0.3])
    assert texts[:5] == ["0.001", "0.002", "0.005", "0.01", "0.02"]
    assert values[0] <= 0.0041
    assert values[-1] >= 0.3
    assert figures._ticks([figures.LEAST_KL, 2.0])[1] == [
        "0.000001", "0.00001", "0.0001", "0.001", "0.01", "0.1", "1", "10",
    ]  # fmt: skip


def test_what_is_opened_is_what_the_headline_speaks_of(results, tmp_path):
    """A second file with a batch size of its own does not hide the first one's results."""
    content = json.loads(results[1].read_text())
    content["results"] = [row | {"batch": 32} for row in content["results"] if row["batch"] == 4]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    first, second = load([results[0], other])[0]
    section = sections.frontiers([first, second])
    assert re.findall("<button[^>]*>batch (\\d+)<", section) == ["2", "4", "32"]
    assert 'data-opened="1"' in section


def test_methods_are_recognised():
    assert method_of("stock") == ("stock", True)
    assert method_of("xshare(budget=16)") == ("xshare", False)
    assert method_of("xshare(budget=0.5, utility='squared')") == ("xshare(utility='squared')", False)
    assert method_of("oea(k0=2) | floor(0.3)") == ("oea | floor(0.3)", False)
    assert method_of("random(budget=3, warmup=0)") == ("random(warmup=0)", True)
    assert method_of("topk(k=2)") == ("topk", True)
    assert method_of("somebodys_own(n=3)") == ("somebodys_own", False)


def test_what_is_no_result(results, tmp_path):
    other, out = tmp_path / "other.json", tmp_path / "report.html"
    content = json.loads(results[0].read_text())
    cases = {
        "nope": (None, "cannot read the results"),
        "not JSON": ("{", "is not JSON"),
        "a number that is none": (json.dumps(content | {"seed": float("nan")}), "NaN; give finite numbers"),
        "a long number": (json.dumps(content)[:-1] + f', "more": {"1" * 4400}}}', "a number of 4400 digits"),
        "a list": ("[]", "holds no results of an evaluation"),
        "another kind": (json.dumps(content | {"kind": "x"}), "holds no results of an evaluation"),
        "another schema": (json.dumps(content | {"schema": 99}), "schema 99"),
        "empty": (json.dumps(content | {"results": []}), "holds no results"),
        "no stock": (json.dumps(content | {"results": content["results"][1:2]}), "lacks results"),
        "half a row": (
            json.dumps(content | {"results": [{"policy": one, "batch": 4} for one in ("stock", "a(1)")]}),
            "lacks 'union_share'",
        ),
    }
    for name, (text, message) in cases.items():
        other.unlink(missing_ok=True)
        if text is not None:
            other.write_text(text)
        done = invoke(other, "-o", out)
        assert done.exit_code == 2, name
        assert message in done.output, name
        assert not out.exists(), name
    done = invoke(results[0], "-o", tmp_path / "missing" / "report.html")
    assert done.exit_code == 2
    assert "does not exist" in done.output


def test_results_of_an_older_version_have_no_details(results, tmp_path):
    content = json.loads(results[0].read_text())
    for row in content["results"]:
        del row["details"]
    old, out = tmp_path / "old.json", tmp_path / "report.html"
    old.write_text(json.dumps(content))
    assert invoke(old, "-o", out).exit_code == 0
    assert "Who uses which" not in without_libraries(out.read_text())


def test_the_same_results_are_no_second_measurement(results, tmp_path):
    copy = tmp_path / "copy.json"
    copy.write_bytes(results[0].read_bytes())
    for second, said in ((results[0], "is given twice"), (copy, f"holds the same results as {results[0]}")):
        done = invoke(results[0], results[1], second, "-o", tmp_path / "report.html")
        assert done.exit_code == 2
        assert said in done.output.replace("\n", "")
    assert not (tmp_path / "report.html").exists()


def test_the_header_counts_tokens_at_every_batch_size(results):
    (found,), _ = load(results[:1])
    for sizes, said in (
        ({2: 1920, 4: 3072}, "1,920 at batch 2, 3,072 at batch 4"),
        ({2: 3072, 4: 3072}, "3,072 at every batch size"),
    ):
        for row in found.rows:
            row.data["decoded_tokens"] = sizes[row.batch]
        assert page._by_batch(found, "decoded_tokens") == said
    del found.stock(4).data["decoded_tokens"]
    assert page._by_batch(found, "decoded_tokens") == "?"


def test_many_batch_sizes_are_a_range(results):
    (found,), _ = load(results[:1])
    rows = [replace(row, data=row.data | {"batch": batch, "batches": batch}) for batch in (1, 2, 4, 8)
            for row in found.at(2)]  # fmt: skip
    assert page._by_batch(replace(found, rows=tuple(rows)), "batches") == "1 to 8 a batch size"


def test_an_expert_is_used_by_a_share_of_the_tokens(results):
    """Tokens are stock's, whatever a policy computes in a layer."""
    (found,), _ = load(results[:1])
    stock, row = found.stock(4), found.at(4)[4]
    assert row.policy == "topk(k=1)"
    tokens = details._tokens(stock)
    assert sum(tokens.values()) == pytest.approx(stock.data["decoded_tokens"])
    for line in details._use(row, tokens):
        assert max(line) <= 1
        assert sum(line) == pytest.approx(1)  # one expert a token


def test_the_bandwidth_section_says_whose_sizes_it_shows(results):
    (found,), _ = load(results[:1])
    assert replace(sizes_of(found, None), whose="") == replace(QWEN3_30B, whose="")
    assert "because the results do not say those of tiny" in sizes_of(found, None).whose
    found.facts["model"] |= {"expert_bytes": 2e6, "other_bytes": 3e6, "dtype": "bfloat16"}
    own = sizes_of(found, None)
    assert own.whose == "the evaluated tiny itself, in bfloat16"
    assert (own.expert, own.layers, own.other) == (2e6, 2, 3e6)
    assert own.whose in page.page([found])
    found.facts["model"]["dtype"] = "float32"  # bytes are counted in 16 bits everywhere
    own = sizes_of(found, None)
    assert own.whose == "the evaluated tiny itself, counted in 16 bits (it was evaluated in float32)"
    assert (own.expert, own.layers, own.other) == (1e6, 2, 1.5e6)


def test_how_deep_experts_are_read(results, tmp_path):
    content = json.loads(results[0].read_text())
    stock = content["results"][0]
    rows = [("depth(bytes=0.2)", 0.8, 0.2, 0.01), ("oea(k0=1)", 0.5, 0.5, 0.02), ("xshare(budget=4)", 0.7, 0.7, 0.01),
            ("random(budget=3)", 0.3, 0.3, 0.001), ("topk(k=1) | bits(4)", 1.0, 0.3, 0.005)]  # fmt: skip
    content["results"] = [stock] + [
        stock | {"policy": policy, "union_share": union, "bytes_share": share, "kl": kl}
        | {"union": union * stock["union"]["value"]}
        for policy, union, share, kl in rows
    ]  # fmt: skip
    path = tmp_path / "deep.json"
    path.write_text(json.dumps(content))
    (evaluation,), _ = load([path])
    shown = depth_section(evaluation, Sizes("a <model>", 2e6, 4, 0), stock["batch"])
    assert "MB are at the sizes of a &lt;model&gt;." in shown
    megabytes = stock["union"]["value"] * 2
    lines = re.findall(r"<tr.*?</tr>", shown)[1:]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in lines]
    assert [one[0].replace("<wbr>", "") for one in cells] == ["depth(bytes=0.2)", "topk(k=1) | bits(4)", "stock"]
    assert [one[4] for one in cells] == ["4.00", "4.80", "16"]
    assert [one[5] for one in cells] == [f"{share * megabytes:.3g}" for share in (0.2, 0.3, 1)]
    assert [one[8] for one in cells] == ["70.0%", "–", ""], "the cheapest that loses no more; controls do not count"
    for row in content["results"]:
        row["bytes_share"] = row["union_share"]
    path.write_text(json.dumps(content))
    (whole,), _ = load([path])
    assert depth_section(whole, Sizes("m", 1, 1, 0), stock["batch"]) == ""


def test_results_know_what_their_model_weighs():
    model = small_model()
    expert, other = weight_bytes(model)
    experts = [one for name, one in model.named_parameters() if ".experts." in name]
    assert expert * 2 * 8 == sum(4 * one.numel() for one in experts)
    embeddings = model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    everything = sum(4 * one.numel() for one in model.parameters())
    assert other == everything - expert * 2 * 8 - (0 if tied else 4 * embeddings)
    facts = model_facts(model, None)
    assert (facts["expert_bytes"], facts["other_bytes"]) == (expert, other)
