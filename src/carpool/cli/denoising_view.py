"""What `carpool diffuse` shows: two runs of the same prompts beside each other, while the second one denoises."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor

from carpool.diffusion import Block, Generation

MASKED = "░"
HEIGHTS = " ▁▂▃▄▅▆▇█"
BARS = 32  # of a picture
Decode = Callable[[list[int]], str]
Frame = list[list[int | None]]


class Film:
    """The tokens of every request after every forward of a run.

    Attributes:
        frames: one list of tokens a request, without the prompt; None is a masked position.
        forwards: that had run by then.
    """

    def __init__(self, prompts: Sequence[Tensor], max_new: int) -> None:
        self.frames: list[Frame] = []
        self.forwards: list[int] = []
        self._prompts, self._max_new = prompts, max_new
        self._number = -1
        self._done: Frame = [[] for _ in prompts]
        self._latest = self._done

    def take(self, block: Block) -> None:
        """One frame more: before a block's first forward, and after each."""
        begins = block.number != self._number
        if begins:
            self._done, self._number = self._latest, block.number
        self._latest = [list(tokens) for tokens in self._done]
        rows = zip(block.request_A.tolist(), block.tokens_AL.tolist(), block.masked_AL.tolist(), strict=True)
        for request, tokens, masked in rows:
            tail = len(self._prompts[request]) % len(tokens) if block.number == 0 else 0
            self._latest[request] += [None if m else token for token, m in zip(tokens, masked, strict=True)][tail:]
        self.frames.append([tokens[: self._max_new] for tokens in self._latest])
        self.forwards.append((self.forwards[-1] if self.forwards else 0) + (not begins))

    def end(self, made: Generation) -> None:
        """The last frame without what came after an end token."""
        self.frames[-1] = [list(tokens.tolist()) for tokens in made.tokens]


def text_of(tokens: Sequence[int | None], decode: Decode, other: Sequence[int | None] | None = None) -> Text:
    """Tokens as text, masked positions as blocks; those that differ from the `other` run's are marked."""
    made, run, style = Text(), list[int](), ""

    def flush() -> None:
        if run:
            made.append(decode(run), style)
            run.clear()

    for place, token in enumerate(tokens):
        differs = other is not None and token is not None and place < len(other) and other[place] not in (None, token)
        wanted = "bold underline" if differs else ""
        if token is None or wanted != style:
            flush()
        style = wanted
        if token is None:
            made.append(MASKED, "dim")
        else:
            run.append(token)
    flush()
    return made


def view(
    names: Sequence[str], prompts: Sequence[str], frames: Sequence[Frame | None],
    counts: Sequence[int], decode: Decode,
) -> RenderableType:  # fmt: skip
    """Both runs side by side: one panel a run, one paragraph a request."""
    grid = Table.grid(expand=True, padding=(0, 1))
    panels = []
    for side, (name, frame) in enumerate(zip(names, frames, strict=True)):
        grid.add_column(ratio=1)
        parts: list[RenderableType] = []
        for request, prompt in enumerate(prompts):
            shown = Text.assemble((prompt, "dim"))
            if frame is not None:
                other = frames[0][request] if side and frames[0] is not None else None
                shown += text_of(frame[request], decode, other)
            parts.append(shown)
        title = f"{name}: {counts[side]} forwards" if frame is not None else f"{name}: waits"
        panels.append(Panel(Group(*parts), title=Text(title), title_align="left"))
    grid.add_row(*panels)
    return grid


def block_lines(made: Generation) -> list[str]:
    """A picture of every block: a bar a forward, as high as the tokens that it accepted."""
    blocks = [
        [int(forward.accepted_RL.sum()) for forward in made.forwards if forward.block == number]
        for number in sorted({forward.block for forward in made.forwards})
    ]
    most = max([1, *(count for own in blocks for count in own)])
    widest = max([0, *map(len, blocks)])
    return [
        f"  block {number:>{len(str(len(blocks)))}}  {picture(own, most).ljust(min(widest, BARS))}  "
        f"{len(own)} forwards accept {sum(own)}{f', at most {max(own)} at once' if max(own) > 1 else ' one by one'}"
        for number, own in enumerate(blocks, start=1)
    ]


def picture(counts: Sequence[int], most: int) -> str:
    """Bars of these heights; of more than fit, each stands for several forwards and is as high as their highest."""
    size = -(-len(counts) // BARS)
    highest = [max(counts[start : start + size]) for start in range(0, len(counts), size or 1)]
    return "".join(HEIGHTS[-(-count * (len(HEIGHTS) - 1) // most)] for count in highest)
