"""Block diffusion: decoding that fills the masked positions of a block in parallel, stock or under a policy."""

from carpool.diffusion.block import Block, Decoding, Forward, Generation
from carpool.diffusion.loop import generate, step_by_threshold
from carpool.diffusion.session import Session
from carpool.diffusion.team import Team, TeamCold

__all__ = [
    "Block", "Decoding", "Forward", "Generation", "Session", "Team", "TeamCold", "generate", "step_by_threshold",
]  # fmt: skip
