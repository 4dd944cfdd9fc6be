"""A layer's experts in planes, as a file holds them, and what their weights give at a depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from carpool.artefacts.statistics import made_by
from carpool.errors import CarpoolError
from carpool.experts.planes import MIDDLE, Planes
from carpool.routing.lazy import lazy_property
from carpool.routing.spec import ALL_BITS

NAMES = ("planes_into", "planes_out")
SHAPE = "planes_shape"  # int64: group, width of either matrix, then the offered depths
MATRICES = ("gate_up_proj", "up_proj", "down_proj")  # of transformers' experts modules, in this order
CENTRE = "planes_centre"  # of a cell, where it is not the middle


@dataclass(frozen=True, eq=False)
class StoredExperts:
    """A layer's experts in planes.

    Attributes:
        into: gate and up projection, `[E, 2 I, H]`. out: down projection, `[E, H, I]`.
    """

    into: Planes
    out: Planes

    @property
    def depths(self) -> tuple[int, ...]:
        """The offered depths, ascending."""
        return self.into.depths

    def bytes_read(self, depth: int) -> int:
        """Bytes of one expert that reading it at a depth takes, scales included."""
        return self.into.bytes_read(depth) + self.out.bytes_read(depth)

    @property
    def bit_bytes(self) -> int:
        """Bytes of one bit of all of an expert's weights: what every depth takes more than the one before."""
        return sum(planes.planes_DERB[0, 0].numel() for planes in (self.into, self.out))

    @property
    def bytes_stored(self) -> int:
        """Bytes of one expert as it is stored."""
        return self.into.bytes_stored + self.out.bytes_stored

    @property
    def share_stored(self) -> float:
        """The same over its bytes in 16 bits."""
        return self.bytes_stored / self._whole

    @property
    def numbers(self) -> int:
        """Weights of one expert."""
        return self.into.planes_DERB.shape[2] * self.into.width + self.into.width * self.out.width

    @property
    def _whole(self) -> int:
        return 2 * self.numbers

    @lazy_property
    def sizes(self) -> Tensor:
        """What reading an expert at a depth takes over its bytes in 16 bits, float64 `[17]` by depth: 0 at depth 0, 1
        for the original; infinite where nothing is stored."""
        found = torch.full((ALL_BITS + 1,), torch.inf, dtype=torch.float64, device="cpu")
        found[0], found[ALL_BITS] = 0, 1
        for depth in self.depths:
            found[depth] = self.bytes_read(depth) / self._whole
        return found

    def tensors(self) -> dict[str, Tensor]:
        """What a statistics file holds of the layer, by name."""
        shape = torch.tensor([self.into.group, self.into.width, self.out.width, *self.depths], device="cpu")
        parts = zip(NAMES, (self.into, self.out), strict=True)
        centre = {} if self.into.centre == MIDDLE else {CENTRE: torch.tensor(self.into.centre, device="cpu")}
        return {
            SHAPE: shape,
            **centre,
            **{f"{name}_{key}": value for name, planes in parts for key, value in planes.tensors().items()},
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> StoredExperts:
        """From a layer's statistics.

        Raises:
            CarpoolError: they are missing, or do not fit together.
        """
        if SHAPE not in tensors:
            raise CarpoolError(f"the statistics hold no experts in planes; make them with `{made_by(SHAPE)}`")
        numbers = tensors[SHAPE].tolist()
        if len(numbers) < 4:
            raise CarpoolError(f"the statistics hold planes of no depth ({numbers}); compress the model again")
        group, *widths = numbers[:3]
        centre = float(tensors[CENTRE]) if CENTRE in tensors else MIDDLE
        parts = []
        for name, width in zip(NAMES, widths, strict=True):
            held = {key.removeprefix(f"{name}_"): value for key, value in tensors.items() if key.startswith(f"{name}_")}
            parts.append(Planes.from_tensors(held, tuple(numbers[3:]), width, group, centre).to(device))
        return cls(*parts)

    @classmethod
    def hollow(cls, tensors: Mapping[str, Tensor], shapes: Sequence[tuple[int, ...]]) -> StoredExperts:
        """Of the same sizes as in a layer's statistics, of whose planes none is there.

        Args:
            shapes: of both matrices, `[E, R, I]`.
        """
        group, _, _, *depths = tensors[SHAPE].tolist()
        parts = []
        for E, R, width in shapes:
            bits = torch.zeros((), dtype=torch.uint8).expand(depths[-1], E, R, -(-width // 8))
            scales = torch.zeros((), dtype=torch.float16).expand(len(depths), E, R, -(-width // group))
            parts.append(Planes(bits, scales, torch.zeros(E), tuple(depths), width, group))
        return cls(*parts)

    @staticmethod
    def depths_in(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """The offered depths, from a layer's statistics without its planes."""
        return tuple(tensors[SHAPE].tolist()[3:])

    def part(self, rank: int, parts: int, interleaved: bool = False) -> StoredExperts:
        """What one rank of tensor parallelism holds: some of every expert's inner neurons.

        Args:
            interleaved: gate and up rows alternate; otherwise all gate rows come first.

        Raises:
            CarpoolError: the ranks would split a group of inputs, whose scale they share.
        """
        inner, group = self.out.width, self.out.group
        if inner % (parts * group) or group % 8:
            raise CarpoolError(
                f"experts with {inner} neurons in groups of {group} cannot be split over {parts} ranks; use fewer "
                "ranks, or compress with smaller groups"
            )
        neurons = torch.arange(rank * inner // parts, (rank + 1) * inner // parts)
        rows = (
            torch.stack([2 * neurons, 2 * neurons + 1], 1).flatten()
            if interleaved
            else torch.cat([neurons, inner + neurons])
        )
        into, out = self.into, self.out
        first, last, width = int(neurons[0]), int(neurons[-1]) + 1, len(neurons)
        return StoredExperts(
            replace(into, planes_DERB=into.planes_DERB[:, :, rows], scale_LERG=into.scale_LERG[:, :, rows]),
            replace(
                out,
                planes_DERB=out.planes_DERB[..., first // 8 : last // 8],
                scale_LERG=out.scale_LERG[..., first // group : last // group],
                width=width,
            ),
        )

    def to(self, device: torch.device | str) -> StoredExperts:
        """The same on a device."""
        return StoredExperts(self.into.to(device), self.out.to(device))

    def output(
        self,
        module: nn.Module,
        hidden_NH: Tensor,
        ids_NK: Tensor,
        weights_NK: Tensor,
        depth_NK: Tensor,
        whole_NH: Tensor,
    ) -> Tensor:
        """The weighted sum of the experts' outputs with every pair computed at its depth, `[N, H]`.

        One call of the experts a depth, with their weights at that depth in place of their own for its length: the
        module's activation, biases and kernel stay, and no second copy of the model is kept.

        Args:
            module: the layer's experts. hidden_NH: their input.
            depth_NK: bits of each pair, `ALL_BITS` for the original.
            whole_NH: the module's own output, which rows that read no expert in planes get back.
        """
        shallow_NK = (depth_NK < ALL_BITS) & (weights_NK != 0)
        rows_N = shallow_NK.any(-1)
        result_NH = torch.where(rows_N.unsqueeze(-1), 0.0, whole_NH.float())
        for depth in (*self.depths, ALL_BITS):
            mine_NK = (depth_NK == depth) & (weights_NK != 0) & rows_N.unsqueeze(-1)
            some_C = mine_NK.any(-1).nonzero().squeeze(-1)
            if not len(some_C):
                continue
            first = mine_NK[some_C].int().sort(dim=-1, descending=True, stable=True)
            kept = int(first.values.sum(-1).max())
            order_CX = first.indices[:, :kept]
            own_CX = first.values[:, :kept].bool()
            ids_CX = ids_NK[some_C].gather(-1, order_CX)
            ids_CX = torch.where(own_CX, ids_CX, ids_CX[:, :1])
            weights_CX = weights_NK[some_C].gather(-1, order_CX) * own_CX
            state = {} if depth == ALL_BITS else self.weights(module, depth)
            made = torch.func.functional_call(module, state, (hidden_NH[some_C], ids_CX, weights_CX))
            result_NH.index_add_(0, some_C, made.float())
        return result_NH.to(whole_NH.dtype)

    def weights(self, module: nn.Module, depth: int) -> dict[str, Tensor]:
        """The module's two matrices at a depth, by the names and in the layout that it holds them in."""
        held = dict(module.named_parameters())
        names = [name for name in MATRICES if name in held]
        if len(names) != 2:
            raise CarpoolError(f"{type(module).__name__} does not hold its experts as two plain matrices")
        state: dict[str, Tensor] = {}
        for name, planes in zip(names, (self.into, self.out), strict=True):
            weight = planes.read(depth).to(held[name].dtype)
            weight = weight.mT if getattr(module, "is_transposed", False) else weight
            if weight.shape != held[name].shape:
                raise CarpoolError(f"planes of shape {list(weight.shape)} for {name} {list(held[name].shape)}")
            state[name] = weight
        return state
