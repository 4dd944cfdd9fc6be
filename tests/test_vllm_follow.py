"""Following vLLM's V2 model runner, with a stand-in that calls what the real one calls, in its order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from carpool.hosts.engine.request_keys import SAMPLES
from carpool.hosts.engine.step_rows import Rows
from carpool.hosts.vllm.follow import drafter, follow

OFF = SimpleNamespace(extra_args={"carpool": "off"})
ON = SimpleNamespace(extra_args=None)


class Runner:
    """The parts of `vllm.v1.worker.gpu.model_runner.GPUModelRunner` that matter: a step adds requests, prepares inputs,
    and then runs the model or replays a graph, which reads the buffers and nothing else."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.seen = rows, list[dict[str, list[Any]]]()

    def add_requests(self, scheduled: Any) -> None:
        pass

    def prepare_inputs(self, scheduled: Any, *_: Any) -> Any:
        return scheduled.batch

    def execute_model(self, scheduled: Any, dummy_run: bool = False) -> None:
        if not dummy_run:
            self.add_requests(scheduled)
            if not scheduled.total_num_scheduled_tokens:
                return
            size = self.prepare_inputs(scheduled, None).num_tokens_after_padding
        else:
            size = scheduled.total_num_scheduled_tokens
        if scheduled.fails:
            raise RuntimeError
        rows = self.rows.batch(size)
        self.seen.append(
            {
                "group": rows.group_N.tolist(),
                "request": rows.request_N.tolist(),
                "real": rows.real_N.tolist(),
                "voter": rows.voter_N.tolist(),
                "exempt": rows.exempt_N.tolist(),
                "expected": [self.rows.expected, self.rows.sharing],
            }
        )


def a_step(
    requests: dict[str, tuple[int, bool, int]],
    padded: int,
    new: dict[str, Any] | None = None,
    finished: tuple[str, ...] = (),
    fails: bool = False,
) -> Any:
    """`requests`: rows, whether they are prompt or computed again, and draft tokens of each."""
    lengths = [length for length, _, _ in requests.values()]
    drafts = np.array([drafts for _, _, drafts in requests.values()], np.int32)
    batch = SimpleNamespace(
        req_ids=[*requests], num_reqs=len(requests), num_tokens_after_padding=padded,
        query_start_loc_np=np.cumsum([0, *lengths, 0, 0]), num_draft_tokens_per_req=drafts if drafts.any() else None,
        is_prefilling_np=np.array([prefill for _, prefill, _ in requests.values()], bool),
    )  # fmt: skip
    added = [SimpleNamespace(req_id=name, sampling_params=given) for name, given in (new or {}).items()]
    return SimpleNamespace(
        batch=batch, scheduled_new_reqs=added, finished_req_ids=set(finished), fails=fails,
        total_num_scheduled_tokens=sum(lengths),
    )  # fmt: skip


@pytest.fixture
def followed() -> tuple[Runner, Rows, dict[str, Any]]:
    rows = Rows(32, 8, "batch", torch.device("cpu"))
    runner, state = Runner(rows), {"on": True, "after": 0}
    follow(runner, rows, lambda: state["on"], lambda: state.update(after=state["after"] + 1))
    return runner, rows, state


def test_rows_are_there_before_the_graph_is_replayed(followed: tuple[Runner, Rows, dict[str, Any]]) -> None:
    runner, rows, state = followed
    runner.execute_model(
        a_step({"a": (1, False, 0), "b": (3, True, 0), "c": (1, False, 0)}, 8, new={"a": ON, "b": ON, "c": OFF})
    )
    [seen] = runner.seen
    assert seen["request"][:5] == [0, 1, 1, 1, 2]
    assert seen["real"] == [True] * 5 + [False] * 3
    assert seen["voter"] == [True] + [False] * 7
    assert seen["exempt"] == [False] + [True] * 7
    assert seen["expected"] == [8, 1]
    assert rows.expected == 0
    assert not rows.batch(8).real_N.any()  # what is forwarded outside of a step is padding
    assert state["after"] == 1


def test_drafts_decode_and_more_rows_are_computed_again(followed: tuple[Runner, Rows, dict[str, Any]]) -> None:
    runner, _, _ = followed
    runner.execute_model(
        a_step({"a": (4, False, 3), "b": (4, False, 1), "c": (1, True, 0)}, 9, new=dict.fromkeys("abc", ON))
    )
    assert runner.seen[0]["voter"] == [True] * 4 + [False] * 5


def test_parameters_are_kept_while_a_request_lives(followed: tuple[Runner, Rows, dict[str, Any]]) -> None:
    runner, _, _ = followed
    one = {"a": (1, False, 0)}
    runner.execute_model(a_step({"a": (2, True, 0)}, 2, new={"a": OFF}))
    runner.execute_model(a_step(one, 1))
    assert runner.seen[-1]["voter"] == [False]
    runner.execute_model(a_step(one, 1, new={"a": ON}, finished=("a",)))  # another request of the same name
    assert runner.seen[-1]["voter"] == [True]
    runner.execute_model(a_step({}, 0, finished=("a",)))
    with pytest.raises(KeyError):
        runner.execute_model(a_step(one, 1))


def test_siblings_are_known_by_the_parameters_that_they_came_with() -> None:
    rows = Rows(32, 8, "prompt", torch.device("cpu"))
    runner = Runner(rows)
    follow(runner, rows, lambda: True, lambda: None)
    one, other = (SimpleNamespace(extra_args={SAMPLES: key}) for key in ("one", "other"))
    new = {"0_a": one, "b": ON, "1_a": one, "0_c": other}
    runner.execute_model(a_step({"0_a": (2, True, 0), "b": (1, True, 0), "1_a": (2, True, 0)}, 5, new=new))
    runner.execute_model(
        a_step({"b": (1, False, 0), "0_c": (1, False, 0), "1_a": (3, False, 2), "0_a": (1, False, 0)}, 8)
    )
    assert [seen["group"] for seen in runner.seen] == [[0, 0, 1, 0, 0], [0, 1, 2, 2, 2, 2, 0, 0]]
    assert runner.seen[1]["voter"] == [True] * 6 + [False] * 2


def test_dummy_runs_failures_and_the_switch_leave_padding(followed: tuple[Runner, Rows, dict[str, Any]]) -> None:
    runner, rows, state = followed
    runner.execute_model(a_step({"x": (4, False, 0)}, 4), dummy_run=True)
    assert runner.seen[-1]["real"] == [False] * 4
    assert state["after"] == 0
    with pytest.raises(RuntimeError):
        runner.execute_model(a_step({"a": (1, False, 0)}, 1, new={"a": ON}, fails=True))
    assert rows.expected == 0
    assert not rows.batch(4).voter_N.any()
    state["on"] = False
    runner.execute_model(a_step({"a": (1, False, 0)}, 1))
    assert runner.seen[-1]["voter"] == [False]
    assert runner.seen[-1]["expected"] == [0, 0]


def test_the_real_runner_has_what_is_followed() -> None:
    pytest.importorskip("vllm", reason="vLLM is an extra")
    import inspect

    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as OldRunner

    new_runner: Any = pytest.importorskip("vllm.v1.worker.gpu.model_runner", reason="of vLLM").GPUModelRunner
    assert all(callable(getattr(new_runner, name)) for name in ("add_requests", "prepare_inputs", "execute_model"))
    assert not hasattr(new_runner, "_model_forward")
    assert hasattr(OldRunner, "_model_forward")
    needed = {"req_ids", "num_reqs", "query_start_loc_np", "num_draft_tokens_per_req", "is_prefilling_np",
              "num_tokens_after_padding"}  # fmt: skip
    assert needed <= set(inspect.signature(InputBatch).parameters)


def test_draft_models_are_found_in_both_runners() -> None:
    assert drafter(SimpleNamespace(drafter="one")) == "one"
    assert drafter(SimpleNamespace(speculator="two")) == "two"
    assert drafter(SimpleNamespace()) is None
