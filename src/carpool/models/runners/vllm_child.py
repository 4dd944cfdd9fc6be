"""The engine's side of `runners.vllm_process`: reads a line of JSON, answers with one, ends with its input."""

from __future__ import annotations

import json
import os
import sys
from math import exp
from typing import Any

from carpool.models.pool import Expert
from carpool.models.questions import CUT_SHORT


def main() -> None:
    """Serve one engine; what it prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engine: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if "load" in asked:
                engine = _load(_expert(asked["load"]))
                made: dict[str, Any] = {"loaded": True}
            else:
                made = {"answers": _answer(engine, _expert(asked["expert"]), asked["questions"])}
        except Exception as error:  # whatever an engine raises
            made = {
                "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error) else ''}"
            }
        answers.write(json.dumps(made) + "\n")
        answers.flush()


def _expert(given: dict[str, Any]) -> Expert:
    return Expert(**given | {"stop": tuple(given["stop"])})


def _load(expert: Expert) -> Any:
    from vllm import LLM

    where = {} if os.path.isdir(expert.model) else {"revision": expert.revision or None}  # noqa: PTH112
    return LLM(model=expert.model, max_model_len=expert.context, seed=0, **where, **expert.settings)


def _answer(engine: Any, expert: Expert, questions: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    from vllm import SamplingParams

    tokenizer = engine.get_tokenizer()
    writing = SamplingParams(temperature=0, max_tokens=expert.max_tokens, logprobs=2, stop=list(expert.stop))
    weighing = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    prompts: list[dict[str, list[int]]] = []
    params, starts, owners = [], [], []
    made: list[dict[str, Any] | None] = [None] * len(questions)
    for place, one in enumerate(questions):
        put = _put(expert, tokenizer, one["question"])
        texts = [put + choice for choice in one["choices"]] or [put]
        told = tokenizer(texts, add_special_tokens=not expert.chat, return_offsets_mapping=True)
        room = 1 if one["choices"] else expert.max_tokens
        if max(map(len, told["input_ids"])) + room > expert.context:
            continue
        made[place] = {"logprobs": [], "read": 0} if one["choices"] else {}
        for ids, offsets in zip(told["input_ids"], told["offset_mapping"], strict=True):
            prompts.append({"prompt_token_ids": ids})
            params.append(weighing if one["choices"] else writing)
            starts.append([start >= len(put) for start, _ in offsets])
            owners.append(place)
    found = engine.generate(prompts, params, use_tqdm=False) if prompts else []
    for place, counted, output in zip(owners, starts, found, strict=True):
        record = made[place]
        assert record is not None
        if questions[place]["choices"]:
            record["read"] += len(output.prompt_token_ids)
            told = zip(output.prompt_token_ids, output.prompt_logprobs, counted, strict=True)
            record["logprobs"].append([tops[token].logprob for token, tops, own in told if own and tops is not None])
        else:
            made[place] = _written(output, tokenizer)
    return made


def _put(expert: Expert, tokenizer: Any, question: str) -> str:
    text = expert.put(question)
    if not expert.chat:
        return text
    messages = [{"role": "system", "content": expert.system}] if expert.system else []
    messages.append({"role": "user", "content": text})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **expert.template)


def _written(output: Any, tokenizer: Any) -> dict[str, Any]:
    one = output.outputs[0]
    ids = list(one.token_ids)
    if ids and one.finish_reason == "stop" and one.stop_reason is None:
        ids = ids[:-1]  # the end-of-text token
    tops = [sorted((top.logprob for top in told.values()), reverse=True) for told in one.logprobs[: len(ids)]]
    return {
        "text": one.text,
        "finish": CUT_SHORT if one.finish_reason == "length" else "stop",
        "read": len(output.prompt_token_ids),
        "tokens": [tokenizer.decode([token]) for token in ids],
        "logprobs": [told[token].logprob for token, told in zip(ids, one.logprobs, strict=False)],
        "margins": [exp(top[0]) - exp(top[1]) if len(top) > 1 else 1.0 for top in tops],
    }


if __name__ == "__main__":
    main()
