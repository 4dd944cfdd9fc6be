"""Where the bytes of experts lie in an offload file, and how many there are.

A record is one expert of one layer: the scales of every offered depth, then its planes, the most significant first. So
an expert is read down to a depth in two pieces, and deepened by the planes that follow. What is read in one piece is
padded to `PAGE` bytes, which direct reads ask for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from carpool.errors import CarpoolError
from carpool.kernels.experts.layout import INPUTS, LINE, OUTPUTS

PAGE = 4096


def padded(size: int) -> int:
    """In whole pages."""
    return -(-size // PAGE) * PAGE


@dataclass(frozen=True)
class Geometry:
    """What all layers of an offload file have in common.

    Attributes:
        layers: numbers of the MoE layers, in order. experts: `E`. hidden, inner: `H` and `I` of an expert.
        group: inputs that share a scale. depths: offered, ascending; the last is all that is stored.
    """

    layers: tuple[int, ...]
    experts: int
    hidden: int
    inner: int
    group: int
    depths: tuple[int, ...]

    @property
    def deepest(self) -> int:
        return self.depths[-1]

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of outputs of both projections."""
        return -(-2 * self.inner // OUTPUTS), -(-self.hidden // OUTPUTS)

    @property
    def groups(self) -> tuple[int, int]:
        """Groups of inputs of both projections."""
        return -(-self.hidden // self.group), -(-self.inner // self.group)

    @property
    def plane_bytes(self) -> tuple[int, int]:
        """One plane of both projections, without what pads it."""
        widths = (self.hidden, self.inner)
        return tuple(o * -(-width // INPUTS) * LINE for o, width in zip(self.blocks, widths, strict=True))  # type: ignore[return-value]

    @property
    def scale_bytes(self) -> tuple[int, int]:
        """One depth's scales of both projections."""
        return tuple(2 * OUTPUTS * o * g for o, g in zip(self.blocks, self.groups, strict=True))  # type: ignore[return-value]

    @property
    def plane(self) -> int:
        """Bytes of a plane of both in the file."""
        return sum(map(padded, self.plane_bytes))

    @property
    def scale(self) -> int:
        """Bytes of a depth's scales of both in the file."""
        return padded(sum(self.scale_bytes))

    @property
    def record(self) -> int:
        """Bytes of an expert in the file."""
        return len(self.depths) * self.scale + self.deepest * self.plane

    def scale_at(self, depth: int) -> int:
        """Where a depth's scales begin in a record."""
        return self.depths.index(depth) * self.scale

    def plane_at(self, plane: int) -> int:
        """Where a plane begins in a record."""
        return len(self.depths) * self.scale + plane * self.plane

    def read(self, start: int, stop: int) -> int:
        """Bytes that are read to have an expert `stop` deep of which `start` planes are there."""
        return self.scale + (stop - start) * self.plane

    def offered(self, depth: int) -> int:
        """The least offered depth that is no shallower; the deepest for what is not stored."""
        return next((one for one in self.depths if one >= depth), self.deepest)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def parse(cls, found: Any) -> Geometry:
        """Raises CarpoolError unless it is what `as_json` gives."""
        names = list(cls.__dataclass_fields__)
        if not isinstance(found, dict) or sorted(found) != sorted(names):
            raise CarpoolError("its header does not say which experts it holds")
        lists = {name: found[name] for name in ("layers", "depths")}
        numbers = [found[name] for name in names if name not in lists]
        flat = [*numbers, *(one for part in lists.values() if isinstance(part, list) for one in part)]
        if not all(type(one) is int and one >= 0 for one in flat) or not all(map(bool, [*numbers, *lists.values()])):
            raise CarpoolError("its header holds odd numbers")
        return cls(**{**found, **{name: tuple(part) for name, part in lists.items()}})
