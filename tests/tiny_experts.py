"""Tiny dense models with a byte-level tokenizer, as folders: experts of pools in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 258
END, PAD = 256, 257


def write_expert(folder: Path, seed: int = 0, scale: float = 0.4, ends: bool = True, **config: Any) -> Path:
    """A Llama of one layer with random weights, large enough for its answers to differ between seeds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    made = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=scale,
        bos_token_id=END, eos_token_id=END, pad_token_id=PAD, **config,
    )  # fmt: skip
    model = LlamaForCausalLM(made).float()
    if not ends:
        model.lm_head.weight.data[END] = 0.0  # of random logits some are above 0
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """One byte a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate(letters)} | {"<end>": END, "<pad>": PAD}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    made.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[{% if enable_thinking %}think{% else %}say{% endif %}]{% endif %}"
    )
    made.save_pretrained(folder)
