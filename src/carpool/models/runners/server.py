"""Experts behind OpenAI's API on loopback, such as `vllm serve`: requests run side by side, the server batches them."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from math import exp
from typing import Any

from carpool.artefacts.json_text import parse_json
from carpool.errors import CarpoolError
from carpool.models.pool import Expert
from carpool.models.questions import CUT_SHORT, Answer, Question
from carpool.models.runners.records import Written, chosen, too_long, written

TOGETHER = 32  # requests under way
PATIENCE = 900  # seconds for an answer
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback is never asked through a proxy


@contextmanager
def served(expert: Expert) -> Iterator[Server]:
    """A running server; raises CarpoolError unless it answers and serves the model."""
    server = Server(expert.url.rstrip("/"))
    names = [str(one.get("id")) for one in server.get("/models").get("data", []) if isinstance(one, dict)]
    if expert.model not in names:
        raise CarpoolError(f"{expert.name}: the server at {expert.url} serves {', '.join(names)}, not {expert.model!r}")
    with ThreadPoolExecutor(TOGETHER) as server.threads:
        yield server


class Server:
    """A server's completions."""

    threads: ThreadPoolExecutor

    def __init__(self, url: str) -> None:
        self.url = url

    def answer(self, expert: Expert, questions: Sequence[Question]) -> list[Answer]:
        """See `models.schedule.Runner`; a question that does not fit the model's context gets an empty answer."""
        return list(self.threads.map(lambda one: self._one(expert, one), questions))

    def get(self, path: str) -> dict[str, Any]:
        return self._ask(urllib.request.Request(self.url + path), 30)

    def _one(self, expert: Expert, question: Question) -> Answer:
        text = expert.put(question.question)
        try:
            if question.choices:
                return self._choose(expert, question, text)
            return written(expert, question, self._chat(expert, text) if expert.chat else self._plain(expert, text))
        except _TooLongError:
            return too_long(expert, question)

    def _plain(self, expert: Expert, text: str) -> Written:
        found = self._post("/completions", expert, prompt=text, max_tokens=expert.max_tokens, logprobs=2)
        one = found["choices"][0]
        told = one["logprobs"]
        best = [sorted(map(float, top.values()), reverse=True) for top in told["top_logprobs"]]
        margins = [_margin(top) for top in best]
        return Written(
            one["text"], _finish(one), found["usage"]["prompt_tokens"], told["tokens"], told["token_logprobs"], margins
        )

    def _chat(self, expert: Expert, text: str) -> Written:
        messages = [{"role": "system", "content": expert.system}] if expert.system else []
        messages.append({"role": "user", "content": text})
        more = {"chat_template_kwargs": dict(expert.template)} if expert.template else {}
        found = self._post(
            "/chat/completions", expert, messages=messages, max_tokens=expert.max_tokens, logprobs=True, top_logprobs=2,
            **more,
        )  # fmt: skip
        one = found["choices"][0]
        told = one["logprobs"]["content"]
        tops = [sorted((top["logprob"] for top in token["top_logprobs"]), reverse=True) for token in told]
        return Written(
            one["message"]["content"] or "", _finish(one), found["usage"]["prompt_tokens"],
            [token["token"] for token in told], [token["logprob"] for token in told],
            [_margin(top) for top in tops],
        )  # fmt: skip

    def _choose(self, expert: Expert, question: Question, text: str) -> Answer:
        if expert.chat:
            raise CarpoolError(f"{expert.name}: a server cannot weigh choices after a chat template; set chat = false")
        prompts = [text + choice for choice in question.choices]
        found = self._post("/completions", expert, prompt=prompts, max_tokens=0, echo=True, logprobs=1)
        logprobs = []
        for one in sorted(found["choices"], key=lambda one: one["index"]):
            told = one["logprobs"]
            pairs = zip(told["token_logprobs"], told["text_offset"], strict=True)
            logprobs.append([value for value, start in pairs if value is not None and start >= len(text)])
        return chosen(expert, question, logprobs, found["usage"]["prompt_tokens"])

    def _post(self, path: str, expert: Expert, **content: Any) -> dict[str, Any]:
        content = {"model": expert.model, "temperature": 0, "seed": 0, **content}
        if expert.stop:
            content["stop"] = list(expert.stop)
        request = urllib.request.Request(
            self.url + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        return self._ask(request, PATIENCE)

    def _ask(self, request: urllib.request.Request, patience: int) -> dict[str, Any]:
        where = request.full_url
        try:
            with OPENER.open(request, timeout=patience) as answer:
                found = parse_json(answer.read(), f"what {where} answers", any_number=True)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())
            if error.code == 400 and "context length" in said:
                raise _TooLongError from None
            raise CarpoolError(f"{where} refuses ({error.code}): {said[:300]}") from None
        except (OSError, HTTPException) as error:
            raise CarpoolError(
                f"no server answers at {self.url} ({getattr(error, 'reason', error)}); start it, or correct the url"
            ) from None
        if not isinstance(found, dict):
            raise CarpoolError(f"{where} is no API of OpenAI's kind; correct the url")
        return found


class _TooLongError(Exception):
    """A prompt beyond the model's context."""


def _finish(one: dict[str, Any]) -> str:
    return CUT_SHORT if one.get("finish_reason") == "length" else "stop"


def _margin(best: list[float]) -> float:
    """Of the two best log-probabilities. Completions name them by their text, under which two may fall together: of one
    alone it is at least this."""
    return exp(best[0]) - exp(best[1]) if len(best) > 1 else max(0.0, 2 * exp(best[0]) - 1)
