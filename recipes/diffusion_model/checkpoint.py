"""The model's form: the reference model with one embedding row more, for the mask token.

    python checkpoint.py WORK/last.pt MODEL WORK OUT     # OUT: the checkpoint in transformers' format (bf16)

Any checkpoint of `adapt.py` will do; MODEL is the reference model that it started from.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "reference_model"))

from corpus import END_OF_TEXT, PAD, load_config
from experts import register


def adapted(start: Path) -> PreTrainedModel:
    """The reference model in fp32 with a mask token, whose embedding is the mean of all others to begin with."""
    config = load_config(HERE / "config.toml")
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, experts_implementation=register())
    mask_id = model.config.vocab_size
    model.resize_token_embeddings(mask_id + 1, mean_resizing=False)
    with torch.no_grad():
        weight_VH = model.get_input_embeddings().weight
        weight_VH[mask_id] = weight_VH[:mask_id].mean(0)
    model.config.mask_token_id = mask_id
    model.config.block_size = config["train"]["default_block_size"]
    model.config.block_sizes = config["train"]["block_sizes"]
    return model


def export(checkpoint: Path, start: Path, work: Path, folder: Path) -> None:
    config = load_config(HERE / "config.toml")
    train, mask_token = config["train"], config["tokenizer"]["mask_token"]
    state = torch.load(checkpoint, weights_only=True)
    model = adapted(start)
    model.load_state_dict(state["model"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"), eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=PAD,
        mask_token=mask_token,
    )  # fmt: skip
    if tokenizer.mask_token_id != model.config.mask_token_id:
        raise SystemExit(f"the tokenizer gives {mask_token} the id {tokenizer.mask_token_id}")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    positions = state["step"] * train["batch"] * train["sequence"]
    facts = {
        "steps": state["step"],
        "noisy_tokens": positions * train["copies"],
        "masked_tokens": state["masked"],
        "text_tokens": positions,
        "config": config,
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    export(*map(Path, sys.argv[1:5]))
