"""Experts in transformers: greedy answers of a batch, and choices by their likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.models.pool import Expert
from carpool.models.questions import CUT_SHORT, Answer, Question
from carpool.models.runners.records import Written, chosen, too_long, written

ROWS = 32  # of a forward pass


@contextmanager
def loaded(expert: Expert) -> Iterator[InTransformers]:
    """The model and its tokenizer; freed at the block's end. Raises CarpoolError where it cannot be loaded."""
    yield InTransformers(*load(expert))


def load(expert: Expert) -> tuple[Any, Any]:
    """Model and tokenizer. Raises CarpoolError where they cannot be loaded."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise CarpoolError("experts in transformers need it: pip install 'carpool[transformers]'") from None
    where = {} if Path(expert.model).is_dir() else {"revision": expert.revision or "main"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(expert.model, padding_side="left", **where)
        model = AutoModelForCausalLM.from_pretrained(
            expert.model, **({"dtype": "auto"} | where | dict(expert.settings))
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CarpoolError(f"{expert.name}: {expert.model} does not load ({said[:300]})") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), tokenizer


class InTransformers:
    """A loaded model."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.ends = set(_as_list(model.generation_config.eos_token_id) + _as_list(tokenizer.eos_token_id))
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self.ends, default=0)

    def answer(self, expert: Expert, questions: Sequence[Question]) -> list[Answer]:
        """See `models.schedule.Runner`; a question that does not fit the expert's context gets an empty answer."""
        made: dict[str, Answer] = {}
        writing = []
        for one in questions:
            if one.choices:
                made[one.id] = self._choose(expert, one)
            else:
                ids = self.tokenizer(self.put(expert, one), add_special_tokens=not expert.chat)["input_ids"]
                if len(ids) + expert.max_tokens > expert.context:
                    made[one.id] = too_long(expert, one)
                else:
                    writing.append((one, ids))
        for start in range(0, len(writing), ROWS):
            part = writing[start : start + ROWS]
            for (one, _), text in zip(part, self._write(expert, [ids for _, ids in part]), strict=True):
                made[one.id] = written(expert, one, text)
        return [made[one.id] for one in questions]

    def put(self, expert: Expert, question: Question) -> str:
        """The text that the model reads."""
        text = expert.put(question.question)
        if not expert.chat:
            return text
        messages = [{"role": "system", "content": expert.system}] if expert.system else []
        messages.append({"role": "user", "content": text})
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **expert.template
        )

    @torch.inference_mode()
    def _write(self, expert: Expert, prompts: list[list[int]]) -> list[Written]:
        width = max(map(len, prompts))
        ids_BT = torch.tensor([[self.pad] * (width - len(ids)) + ids for ids in prompts], device=self.model.device)
        mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=self.model.device)
        made = self.model.generate(
            input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=expert.max_tokens, do_sample=False, num_beams=1,
            pad_token_id=self.pad, eos_token_id=sorted(self.ends) or None, stop_strings=list(expert.stop) or None,
            tokenizer=self.tokenizer, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        p_BTV = torch.stack(made.logits, dim=1).float().log_softmax(-1)
        best_BT2 = p_BTV.topk(2, dim=-1).values.exp()
        new_BT = made.sequences[:, width:]
        logprobs_BT = p_BTV.gather(-1, new_BT.unsqueeze(-1)).squeeze(-1)
        rows = zip(new_BT.tolist(), logprobs_BT.tolist(), (best_BT2[..., 0] - best_BT2[..., 1]).tolist(), strict=True)
        return [self._cut(expert, len(ids), *row) for ids, row in zip(prompts, rows, strict=True)]

    def _cut(self, expert: Expert, read: int, ids: list[int], logprobs: list[float], margins: list[float]) -> Written:
        """A row of the batch up to its own end; what follows is padding."""
        finish = CUT_SHORT
        for place, token in enumerate(ids):
            if token in self.ends:
                ids, finish = ids[:place], "stop"
                break
        texts = [self.tokenizer.decode([token]) for token in ids]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        ends = [found for stop in expert.stop if (found := text.find(stop)) >= 0]
        if ends:
            text, finish, length = text[: min(ends)], "stop", 0
            for place, piece in enumerate(texts):
                length += len(piece)
                if length > min(ends):
                    ids = ids[: place + 1]
                    break
        return Written(text, finish, read, texts[: len(ids)], logprobs[: len(ids)], margins[: len(ids)])

    @torch.inference_mode()
    def _choose(self, expert: Expert, question: Question) -> Answer:
        put = self.put(expert, question)
        told = self.tokenizer(
            [put + choice for choice in question.choices],
            add_special_tokens=not expert.chat,
            return_offsets_mapping=True,
        )
        rows = told["input_ids"]
        if max(map(len, rows)) > expert.context:
            return too_long(expert, question)
        width = max(map(len, rows))
        ids_CT = torch.tensor([ids + [self.pad] * (width - len(ids)) for ids in rows], device=self.model.device)
        mask_CT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows], device=self.model.device)
        own = [[start >= len(put) for start, _ in offsets] for offsets in told["offset_mapping"]]
        first = max(1, min((one.index(True) for one in own if True in one), default=width))
        kept = torch.arange(first - 1, width - 1, device=self.model.device)  # the head is costly: not for the prompt
        logits_CTV: Tensor = self.model(input_ids=ids_CT, attention_mask=mask_CT, logits_to_keep=kept).logits
        told_CT = logits_CTV.float().log_softmax(-1).gather(-1, ids_CT[:, first:].unsqueeze(-1)).squeeze(-1)
        logprobs = [
            [value for value, counted in zip(values, one[first:], strict=False) if counted]
            for values, one in zip(told_CT.tolist(), own, strict=True)
        ]
        return chosen(expert, question, logprobs, sum(map(len, rows)))


def _as_list(value: Any) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
