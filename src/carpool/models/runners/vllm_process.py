"""Experts in vLLM, one engine at a time, each in a process of its own: its end frees all that the engine held.

An engine that is taken down inside a process leaves memory and process groups behind.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from carpool.artefacts.json_text import parse_json
from carpool.errors import CarpoolError
from carpool.models.pool import Expert
from carpool.models.questions import Answer, Question
from carpool.models.runners.records import Written, chosen, too_long, written

CHILD = "carpool.models.runners.vllm_child"
ENDING = 60  # seconds


@contextmanager
def in_a_process(expert: Expert) -> Iterator[InAProcess]:
    """The engine, ready. Raises CarpoolError where vLLM is not installed or the engine does not start."""
    if importlib.util.find_spec("vllm") is None:
        raise CarpoolError(f"{expert.name} needs vLLM: pip install 'carpool[vllm]'")
    with subprocess.Popen([sys.executable, "-m", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        runner = InAProcess(expert, process)
        try:
            runner.ask({"load": asdict(expert)})
            yield runner
        finally:
            assert process.stdin is not None
            process.stdin.close()  # its end
            try:
                process.wait(ENDING)
            except subprocess.TimeoutExpired:
                process.kill()


class InAProcess:
    """The engine's process: one line of JSON asks, one answers."""

    def __init__(self, expert: Expert, process: subprocess.Popen[bytes]) -> None:
        self.expert, self.process = expert, process

    def answer(self, expert: Expert, questions: Sequence[Question]) -> list[Answer]:
        """See `models.schedule.Runner`; a question that does not fit the expert's context gets an empty answer."""
        made = self.ask({"expert": asdict(expert), "questions": [asdict(one) for one in questions]})
        answers = []
        for one, found in zip(questions, made["answers"], strict=True):
            if found is None:
                answers.append(too_long(expert, one))
            elif one.choices:
                answers.append(chosen(expert, one, found["logprobs"], found["read"]))
            else:
                answers.append(written(expert, one, Written(**found)))
        return answers

    def ask(self, content: dict[str, Any]) -> dict[str, Any]:
        """Raises CarpoolError if the process has ended or says why it cannot."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(content).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = b""
        if not line:
            code = self.process.wait(ENDING)
            raise CarpoolError(
                f"{self.expert.name}: the engine of {self.expert.model} ended (exit code {code}); its own messages say "
                "why, and finished answers are kept"
            )
        found = parse_json(line, "what the engine's process says", any_number=True)
        if "error" in found:
            raise CarpoolError(f"{self.expert.name}: {self.expert.model} does not run in vLLM ({found['error']})")
        return found
