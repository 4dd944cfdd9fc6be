"""Runners: grouped answers equal those one by one, choices go by likelihood, and what fails says so in a sentence."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_experts import write_expert

from carpool import CarpoolError
from carpool.models.ledger import Ledger
from carpool.models.pool import Expert, Pool
from carpool.models.questions import Answer, Answers, Question
from carpool.models.recruit import Assignment
from carpool.models.runners import open_runner
from carpool.models.runners.records import Written, written
from carpool.models.schedule import answer

QUESTIONS = [
    Question(str(place), text)
    for place, text in enumerate(["one", "two and a half", "", "three hundred and thirty-three", "four", "a\nb"])
]
CHOICES = [
    Question("c0", "this is", choices=(" a test", " not", "x")),
    Question("c1", "und das", choices=(" auch", " nicht mehr lange, denn es ist spaet"), answer=1),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experts")
    for seed, name in enumerate("ab"):
        write_expert(root / name, seed, ends=name == "b")
    return root


def expert(folder: Path, name: str = "a", **settings: Any) -> Expert:
    return Expert(name, "transformers", str(folder / name), max_tokens=12, context=200, **settings)


def ask(one: Expert, questions: list[Question]) -> list[Answer]:
    with open_runner(one) as runner:
        return runner.answer(one, questions)


def test_grouped_answers_equal_those_one_by_one(folder: Path) -> None:
    pool = Pool((expert(folder, "a"), expert(folder, "b")))
    questions = [*QUESTIONS[:2], CHOICES[0], *QUESTIONS[3:]]
    ids_NK = torch.tensor([[0, 1]] * len(questions))
    both = Assignment(ids_NK, torch.ones(ids_NK.shape), torch.zeros(len(questions), dtype=torch.bool))
    ledger, together = Ledger(), Answers()
    list(answer(pool, questions, both, open_runner, together, ledger))
    assert ledger.loads == 2
    assert ledger.bytes == sum(one.bytes for one in pool.experts) > 0
    assert {together.of(one, "a").text for one in questions} != {together.of(one, "b").text for one in questions}
    for one in pool.experts:
        with open_runner(one) as runner:
            for question in questions:
                (alone,) = runner.answer(one, [question])
                grouped = together.of(question, one.name)
                assert grouped.confidence == pytest.approx(alone.confidence, abs=1e-4)
                assert Answer(**vars(grouped) | {"confidence": {}}) == Answer(**vars(alone) | {"confidence": {}})


def test_a_written_answer_is_the_models_own(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "a").requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder / "a")
    ids = tokenizer("one", return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=257)[0, 3:].tolist()
    (found,) = ask(expert(folder), QUESTIONS[:1])
    assert found.text == tokenizer.decode(new, skip_special_tokens=True).rstrip("\ufffd").strip()
    assert (found.read, found.finish) == (3, "length" if 256 not in new else "stop")
    p_TV = model(torch.cat([ids, torch.tensor([new])], 1)).logits[0, 2:-1].float().softmax(-1)
    p_T = p_TV[range(len(new)), new][: found.written]
    assert found.confidence["mean"] == pytest.approx(float(p_T.log().mean().exp()), rel=1e-4)
    assert found.confidence["least"] == pytest.approx(float(p_T.min()), rel=1e-4)


def test_choices_go_by_their_mean_likelihood(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "a").requires_grad_(False)
    for question, found in zip(CHOICES, ask(expert(folder), CHOICES), strict=True):
        means = []
        for choice in question.choices:
            ids = tokens(folder, question.question + choice)
            logprobs_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            own = range(len(question.question), len(ids))
            means.append(sum(float(logprobs_TV[place - 1, ids[place]]) for place in own) / len(own))
        assert found.choice == max(range(len(means)), key=means.__getitem__)
        assert found.finish == "choice"
        p_C = torch.tensor(means).softmax(-1)
        assert found.confidence["margin"] == pytest.approx(float(p_C.topk(2).values.diff().abs()), abs=1e-4)


def tokens(folder: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "a")(text)["input_ids"]


def test_modes_are_put_differently(folder: Path) -> None:
    from carpool.models.runners.in_transformers import loaded

    fast = expert(folder, chat=True, system="be brief", prompt="{question} /no_think")
    slow = expert(folder, chat=True, template={"enable_thinking": True})
    with loaded(fast) as runner:
        assert runner.put(fast, Question("1", "why?")) == "[system]be brief[user]why? /no_think[say]"
        assert runner.put(slow, Question("1", "why?")) == "[user]why?[think]"


def test_a_stop_text_ends_an_answer(folder: Path) -> None:
    (whole,) = ask(expert(folder), QUESTIONS[:1])
    mark = whole.text[4]
    (cut,) = ask(expert(folder, stop=(mark,)), QUESTIONS[:1])
    assert cut.text == whole.text.split(mark)[0].strip()
    assert cut.finish == "stop"
    assert cut.written <= whole.written


def test_what_does_not_fit_is_not_asked(folder: Path) -> None:
    long, short = Question("l", "x" * 300), QUESTIONS[0]
    found = ask(expert(folder), [long, short, Question("c", "y" * 300, choices=("a", "b"))])
    assert [one.finish for one in found] == ["too_long", "length", "too_long"]
    assert not found[0].confidence


def test_confidence_is_of_the_answer_proper() -> None:
    one = Expert("a", "vllm", "m", answer_after="</think>")
    logprobs = [-3.0, -3.0, -3.0, -0.1, -0.1]
    made = Written("well</think>4 2", "stop", 3, ["we", "ll", "</think>", "4", " 2"], logprobs, [0, 0, 0, 0.8, 0.6])
    found = written(one, QUESTIONS[0], made)
    assert found.text == "4 2"
    assert found.confidence == pytest.approx({"mean": 0.904837, "least": 0.904837, "margin": 0.7}, abs=1e-5)
    never = written(one, QUESTIONS[0], Written("well", "length", 3, ["we", "ll"], [-0.1, -0.1], [1, 1]))
    assert set(never.confidence.values()) == {0.0}


def test_models_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CarpoolError, match=r"a: .*empty does not load"):
        ask(Expert("a", "transformers", str(tmp_path / "empty")), QUESTIONS)
    with pytest.raises(CarpoolError, match="begin it with a space"):
        ask(expert(folder), [Question("1", "?", choices=("a", ""))])
    with pytest.raises(CarpoolError, match=r"no server answers at http://127.0.0.1:9/v1 .*; start it"):
        ask(Expert("s", "server", "m", url="http://127.0.0.1:9/v1"), QUESTIONS)


class Stand(BaseHTTPRequestHandler):
    """A server that answers with the prompt's last word, token by token of one letter."""

    def do_GET(self) -> None:
        self.reply({"data": [{"id": "m"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)  # type: ignore[attr-defined]
        assert asked["temperature"] == 0
        if "messages" in asked:
            token = {"token": "h", "logprob": -0.5, "top_logprobs": [{"logprob": -0.5}, {"logprob": -1.5}]}
            one = {"message": {"content": "h"}, "finish_reason": "stop", "logprobs": {"content": [token]}}
            return self.reply({"choices": [one], "usage": {"prompt_tokens": 7}})
        if asked["prompt"] == "boom":
            return self.reply({"error": "engine dead"}, 500)
        if asked["prompt"] == "long":
            return self.reply({"error": "This model's maximum context length is 8 tokens"}, 400)
        if asked.get("echo"):
            found = []
            for place, text in enumerate(asked["prompt"]):
                told = {
                    "token_logprobs": [None] + [-float(len(text))] * (len(text) - 1),
                    "text_offset": list(range(len(text))),
                }
                found.append({"index": place, "logprobs": told})
            return self.reply({"choices": found[::-1], "usage": {"prompt_tokens": 9}})
        told = {
            "tokens": ["a", "b"],
            "token_logprobs": [-0.5, -0.5],
            "top_logprobs": [{"a": -0.5, "c": -1.0}, {"b": -0.5}],
        }
        one = {"text": "ab", "finish_reason": "length", "logprobs": told}
        return self.reply({"choices": [one], "usage": {"prompt_tokens": len(asked["prompt"])}})

    def reply(self, content: dict[str, Any], status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def stand() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stand)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_server_is_asked(stand: ThreadingHTTPServer) -> None:
    url = f"http://127.0.0.1:{stand.server_port}/v1/"
    one = Expert("s", "server", "m", url=url, stop=(".",))
    first, second, third = ask(one, [Question("1", "hello"), CHOICES[1], Question("3", "long")])
    assert (first.text, first.finish, first.read, first.written) == ("ab", "length", 5, 2)
    assert first.confidence["mean"] == pytest.approx(0.60653, abs=1e-4)
    assert first.confidence["margin"] == pytest.approx((0.60653 - 0.36788 + 2 * 0.60653 - 1) / 2, abs=1e-4)
    assert (second.choice, second.finish) == (0, "choice"), "the shorter one is likelier here"
    assert third.finish == "too_long"
    chat = Expert("s", "server", "m", url=url, chat=True, template={"enable_thinking": False})
    (said,) = ask(chat, QUESTIONS[:1])
    assert (said.text, said.read) == ("h", 7)
    assert stand.asked[-1]["chat_template_kwargs"] == {"enable_thinking": False}  # type: ignore[attr-defined]
    with pytest.raises(CarpoolError, match="after a chat template"):
        ask(chat, CHOICES)
    with pytest.raises(CarpoolError, match=r"refuses \(500\): .*engine dead"):
        ask(one, [Question("1", "boom")])
    with pytest.raises(CarpoolError, match="serves m, not 'n'"):
        ask(Expert("s", "server", "n", url=url), QUESTIONS)
