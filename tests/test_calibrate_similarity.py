"""Similarities against loops written from their definitions, in fp64, a token and a pair at a time."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carpool.calibrate.similarity import CKA, Similarity

CLOSE = {"atol": 2e-6, "rtol": 2e-6}  # results are rounded to fp32


def case(seed, tokens=24, experts=5, hidden=3, top_k=2):
    generator = torch.Generator().manual_seed(seed)
    outputs_NEH = torch.randn(tokens, experts, hidden, generator=generator)
    outputs_NEH *= torch.rand(experts, 1, generator=generator) + 0.5
    ids_NK = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    weights_NK = torch.rand(tokens, top_k, generator=generator) + 0.01
    return outputs_NEH, ids_NK, weights_NK


def measured(*inputs, chunks=(10**9,)):
    similarity = Similarity(inputs[0].shape[1])
    start = 0
    for size in [*chunks, 10**9]:
        part = [tensor[start : start + size] for tensor in inputs]
        if len(part[0]):
            similarity.update(*part)
        start += size
    return similarity.result()


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def squared_distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def twin(outputs_NEH, ids_NK, weights_NK):
    out, ids, weights = outputs_NEH.double().tolist(), ids_NK.tolist(), weights_NK.double().tolist()
    tokens, experts = len(out), len(out[0])
    distance = [[0.0] * experts for _ in range(experts)]
    cosine = [[0.0] * experts for _ in range(experts)]
    routed = [[0.0] * experts for _ in range(experts)]
    coverage = [0] * experts
    for u in range(experts):
        for v in range(experts):
            distance[u][v] = math.sqrt(sum(squared_distance(out[t][u], out[t][v]) for t in range(tokens)))
            cosines = []
            for t in range(tokens):
                norms = math.sqrt(dot(out[t][u], out[t][u]) * dot(out[t][v], out[t][v]))
                cosines.append(dot(out[t][u], out[t][v]) / norms if norms > 0 else 0.0)
            cosine[u][v] = sum(cosines) / tokens if u != v else 1.0
            error = energy = 0.0
            for t in range(tokens):
                for expert, weight in zip(ids[t], weights[t], strict=True):
                    if expert == u:
                        error += weight**2 * squared_distance(out[t][u], out[t][v])
                        energy += weight**2 * dot(out[t][u], out[t][u])
            routed[u][v] = 1.0 if u == v else (1 - error / energy if energy > 0 else 0.0)
        coverage[u] = sum(u in row for row in ids)
    largest = max(max(row) for row in distance)
    frobenius = [[1 - d / largest if largest > 0 else 1.0 for d in row] for row in distance]
    return frobenius, cosine, routed, coverage


def assert_is_twin(found, inputs):
    frobenius, cosine, routed, coverage = twin(*inputs)
    torch.testing.assert_close(found["similarity_frobenius"].double(), torch.tensor(frobenius).double(), **CLOSE)
    torch.testing.assert_close(found["similarity_cosine"].double(), torch.tensor(cosine).double(), **CLOSE)
    torch.testing.assert_close(found["similarity_routed"].double(), torch.tensor(routed).double(), **CLOSE)
    assert found["coverage"].tolist() == coverage


@given(
    seed=st.integers(0, 1000),
    experts=st.integers(3, 7),
    hidden=st.integers(1, 5),
    top_k=st.integers(1, 3),
    chunks=st.lists(st.integers(1, 12), max_size=4),
)
def test_streaming_in_any_chunks_is_the_definition(seed, experts, hidden, top_k, chunks):
    inputs = case(seed, experts=experts, hidden=hidden, top_k=top_k)
    assert_is_twin(measured(*inputs, chunks=chunks), inputs)


def test_experts_without_tokens_or_without_output():
    outputs_NEH, ids_NK, weights_NK = case(0)
    outputs_NEH[:, 1] = 0  # an expert that gives nothing
    ids_NK[ids_NK == 3] = 4  # an expert that gets nothing; doubled ids may appear, so keep one slot
    inputs = outputs_NEH, ids_NK[:, :1], weights_NK[:, :1]
    found = measured(*inputs)
    assert_is_twin(found, inputs)
    assert found["similarity_routed"][3].tolist() == [0, 0, 0, 1, 0]
    assert found["similarity_cosine"][1].tolist() == [0, 1, 0, 0, 0]


def test_by_hand():
    # one token, experts (3, 4), (6, 8) and (-4, 3); all weight on the first
    outputs_NEH = torch.tensor([[[3.0, 4.0], [6.0, 8.0], [-4.0, 3.0]]])
    found = measured(outputs_NEH, torch.tensor([[0]]), torch.tensor([[0.5]]))
    # twice the output: the error is as large as the output, as bad as nothing; a right angle: twice as bad
    torch.testing.assert_close(found["similarity_routed"][0], torch.tensor([1.0, 0.0, -1.0]))
    torch.testing.assert_close(found["similarity_cosine"][0], torch.tensor([1.0, 1.0, 0.0]))
    # distances 5, sqrt(50) and sqrt(125)
    expected = torch.tensor([1.0, 1 - 5 / 125**0.5, 1 - (50 / 125) ** 0.5])
    torch.testing.assert_close(found["similarity_frobenius"][0], expected)


def test_routed_ignores_scale_and_other_tokens_while_frobenius_does_not():
    outputs_NEH, ids_NK, weights_NK = case(1)
    base = measured(outputs_NEH, ids_NK, weights_NK)
    louder = measured(outputs_NEH * 7, ids_NK, weights_NK * 3)
    torch.testing.assert_close(louder["similarity_routed"], base["similarity_routed"])
    changed = outputs_NEH.clone()
    changed[~(ids_NK == 2).any(1)] *= torch.arange(5).unsqueeze(1)  # tokens that never reach expert 2
    other = measured(changed, ids_NK, weights_NK)
    torch.testing.assert_close(other["similarity_routed"][2], base["similarity_routed"][2])
    assert not torch.allclose(other["similarity_frobenius"][2], base["similarity_frobenius"][2])


def test_equal_experts_are_equal():
    outputs_NEH, ids_NK, weights_NK = case(2)
    outputs_NEH[:, 4] = outputs_NEH[:, 0]
    found = measured(10 + outputs_NEH, ids_NK, weights_NK)
    for name in ("similarity_frobenius", "similarity_cosine", "similarity_routed"):
        assert found[name][0, 4] == pytest.approx(1, abs=1e-6)
        assert found[name][4, 0] == pytest.approx(1, abs=1e-6)


def cka(outputs_ENH):
    running = CKA()
    for outputs_NH in outputs_ENH:
        running.add(outputs_NH)
    return running.result()


def unbiased_hsic(k, m):
    """Song et al. 2012, equation 5, from Gram matrices with their diagonals removed."""
    n = len(k)
    trace = sum(k[i][j] * m[j][i] for i in range(n) for j in range(n))
    k_rows, m_rows = [sum(row) for row in k], [sum(row) for row in m]
    both = sum(k_rows) * sum(m_rows) / ((n - 1) * (n - 2))
    return (trace + both - 2 / (n - 2) * dot(k_rows, m_rows)) / (n * (n - 3))


@given(seed=st.integers(0, 1000), n=st.integers(4, 9), hidden=st.integers(2, 4))
def test_cka_is_the_ratio_of_unbiased_hsic(seed, n, hidden):
    outputs_ENH = torch.randn(3, n, hidden, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 2
    rows = outputs_ENH.tolist()
    grams = [[[0.0 if i == j else dot(x[i], x[j]) for j in range(n)] for i in range(n)] for x in rows]
    self_hsic = [unbiased_hsic(k, k) for k in grams]
    found = cka(outputs_ENH)
    for u in range(3):
        for v in range(3):
            expected = unbiased_hsic(grams[u], grams[v]) / math.sqrt(self_hsic[u] * self_hsic[v])
            assert found[u, v] == pytest.approx(expected, abs=1e-4)


def test_cka_of_unrelated_outputs_is_near_zero_though_tokens_are_fewer_than_dimensions():
    outputs_ENH = torch.randn(4, 48, 256, generator=torch.Generator().manual_seed(0))
    found = cka(outputs_ENH)
    assert found[~torch.eye(4, dtype=torch.bool)].abs().max() < 0.1  # the plain estimator gives about 0.8


def test_cka_does_not_see_rotations():
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    assert cka(torch.stack([x, 3 * x @ rotation + 1]))[0, 1] == pytest.approx(1, abs=1e-5)


def test_cka_of_a_constant_expert_is_zero():
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    assert cka(torch.stack([x, torch.ones(16, 6)])).tolist() == [[1, 0], [0, 1]]
