"""Options that several commands take alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None, typer.Argument(help="Folder or hub name of a transformers model; default: the reference model.")
]
Texts = Annotated[
    list[Path] | None,
    typer.Option("--text", help=".txt or .jsonl, a domain each; may be repeated; default: embedded texts."),
]
ShowJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else on standard output.")]
SequenceLength = Annotated[int, typer.Option(help="Tokens of a sequence, prompt included.")]
WindowLength = Annotated[int, typer.Option(help="Tokens per sequence.")]
Prefill = Annotated[int, typer.Option(help="Tokens of the prompt, which keeps its native routing.")]
Seed = Annotated[int, typer.Option(help="Seed of the choice of text.")]
PolicyFileToWrite = Annotated[Path, typer.Option("--output", "-o", help="Policy file to write.")]
BlockSize = Annotated[int | None, typer.Option(help="Positions of a diffusion block; default: the model's.")]
MaskToken = Annotated[int | None, typer.Option(help="Id of a diffusion model's mask token; default: the model's.")]

SEQUENCE, PREFILL = 128, 32  # defaults
