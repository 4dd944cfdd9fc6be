"""Write a checkpoint of a training run as a model, to measure how something changes while a model is trained.

python export.py WORK stable.pt OUT          # OUT: a folder in transformers' format
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from corpus import CONFIG, load_config
from train import build_model, save_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("checkpoint", help="its name in WORK")
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", type=Path, default=CONFIG)
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    model = build_model(config["model"], config["tokenizer"]["vocab_size"])
    state = torch.load(arguments.work / arguments.checkpoint, weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    tokens = state["step"] * config["train"]["batch"] * config["train"]["sequence"]
    save_model(model, arguments.work, arguments.out, tokens=tokens, steps=state["step"], config=config)


if __name__ == "__main__":
    main()
