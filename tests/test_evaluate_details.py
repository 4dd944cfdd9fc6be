"""Expert use by domain, the histogram of displaced mass and the worst rows, against loops over single rows."""

from collections import Counter

import pytest
import torch
from lockstep_tools import NumberTokenizer, noise, small_model

from carpool.evaluate import lockstep
from carpool.evaluate.details import BINS, CONTEXT, WORST
from carpool.evaluate.study import Settings, describe, sequences_for, study
from carpool.plans.grammar import parse
from carpool.routing.batch import Grouping

MODEL = small_model()
TEXTS = [noise(domain, 120, seed) for seed, domain in enumerate(("a", "b", "a", "b"))]
CHOSEN = Settings((parse("oea(k0=1)"),), Grouping.parse("batch"), (4,), sequence=17, prefill=3, batches=3)


def remember(seen):
    return lambda *told: seen.append(told)


def test_details_against_loops():
    (sequences,) = sequences_for(CHOSEN, TEXTS, NumberTokenizer())
    stock, shared = (result.measured.details for result in study(MODEL, CHOSEN, [sequences])[0])
    (layout,), batches, moe = CHOSEN.layouts(), 3, describe(MODEL)
    use, bins, rows = Counter(), Counter(), []
    for batch in range(batches):
        ids = sequences.ids_ST[batch * 4 : batch * 4 + 4, :-1]
        seen: list[tuple] = []
        lockstep.forward(MODEL, CHOSEN.plans[0], ids, layout, num_layers=moe.layers, observe=remember(seen))
        for row in range(4):
            for position in range(layout.prefill, layout.positions):
                total = 0.0
                for layer, _, outcome in seen:
                    index = row * layout.positions + position
                    for expert in set(outcome.routing.ids_NK[index].tolist()):
                        use[int(sequences.domain_S[batch * 4 + row]), layer, expert] += 1
                    displaced = float(outcome.displaced_N[index])
                    bins[min(int(displaced * BINS), BINS - 1)] += 1
                    total += displaced / moe.layers
                rows.append((total, ids[row, max(0, position + 1 - CONTEXT) : position + 1].tolist()))
    for (domain, layer, expert), count in use.items():
        assert shared.use_DLE[domain, layer, expert] == count
    assert shared.use_DLE.sum() == sum(use.values())
    assert shared.histogram_B.tolist() == [bins[index] for index in range(BINS)]
    rows.sort(key=lambda row: -row[0])
    assert [row.displaced for row in shared.worst] == pytest.approx([value for value, _ in rows[:WORST]], abs=1e-6)
    assert list(shared.worst[0].context) in [context for value, context in rows if value > rows[0][0] - 1e-6]
    assert all(row.kl >= 0 for row in shared.worst)
    # stock displaces nothing and reads K experts a row
    assert stock.histogram_B[0] == stock.histogram_B.sum() == batches * 4 * layout.decoded * moe.layers
    assert torch.equal(stock.use_DLE.sum((0, 2)), torch.full((moe.layers,), batches * 4 * layout.decoded * moe.top_k))
