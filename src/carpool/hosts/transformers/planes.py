"""Experts in planes inside a transformers model: computed by the kernels that serve them, never held as weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from carpool.artefacts.identity import SAMPLES, Sample
from carpool.errors import CarpoolError
from carpool.experts.stored import StoredExperts
from carpool.kernels.experts.activation import Activation
from carpool.kernels.experts.operation import Reader, reader
from carpool.routing.spec import ALL_BITS

BIASES = ("gate_up_proj_bias", "down_proj_bias")


class PlanesExperts(nn.Module):
    """A layer's experts, in the place of transformers' own module; its biases, if it has any, are the only parameters.

    Attributes:
        depths: offered depths, ascending; empty until `fill`.
        free_E: says which experts cost nothing to read now, bool `[E]`; None: all cost the same.
        sizes: see `StoredExperts.sizes`. expert_bytes: of one expert, read as deep as it is stored. numbers: weights of
            one expert. sample: of the weights at the deepest depth, as the file has it.
    """

    def __init__(self, original: nn.Module, activation: Activation) -> None:
        super().__init__()
        self._activation = activation
        self._read: Reader | None = None
        self.free_E: Callable[[], Tensor] | None = None
        self.device = torch.device("meta")
        self.depths: tuple[int, ...] = ()
        self.sizes = torch.zeros(0)
        self.expert_bytes = self.numbers = 0
        self.sample = Sample(hidden="planes that are not loaded")
        transposed = bool(getattr(original, "is_transposed", False))
        held = [one.mT if transposed else one for name, one in original.named_parameters() if name not in BIASES]
        self._shapes = [tuple(one.shape) for one in held]
        for name in BIASES:
            if (bias := getattr(original, name, None)) is not None:
                self.register_parameter(name, nn.Parameter(bias, requires_grad=False))

    def fill(self, tensors: Mapping[str, Tensor], device: torch.device, *, kernels: bool = True) -> None:
        """Take the experts from a layer's statistics.

        Args:
            kernels: where there are some; plain torch otherwise, which rounds no activation.

        Raises:
            CarpoolError: none are there, or they are not of this model's shapes.
        """
        stored = StoredExperts.of(tensors)
        for found, wanted in zip((stored.into, stored.out), self._shapes, strict=True):
            _, E, R, _ = found.planes_DERB.shape
            if (E, R, found.width) != wanted:
                raise CarpoolError(f"planes of {E} matrices [{R}, {found.width}]; the model has {list(wanted)}")
        self._describe(stored, tensors, device)
        self._read = reader(stored.to(device), self.activation, kernels=kernels)

    def leave_on_disk(self, tensors: Mapping[str, Tensor]) -> None:
        """Know the experts, of whose statistics the planes are left out; `read_by` says who reads them."""
        self._describe(StoredExperts.hollow(tensors, self._shapes), tensors, torch.device("cpu"))

    def _describe(self, stored: StoredExperts, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.depths, self.sizes, self.expert_bytes = stored.depths, stored.sizes, stored.bytes_read(stored.depths[-1])
        self.numbers = stored.numbers
        samples = {name: tensors[name] for name in SAMPLES if name in tensors}
        hidden = "" if samples else "planes of which the file has no sample"
        self.sample, self.device = Sample(samples, stored.into.width, hidden=hidden), device

    @property
    def activation(self) -> Activation:
        """What stands between the projections, with the biases."""
        held, biases = self._activation, (getattr(self, name, None) for name in BIASES)
        return Activation(held.interleaved, held.alpha, held.limit, *biases)

    def read_by(self, reader: Reader | None) -> Reader | None:
        """Let somebody else read these experts; returns who did."""
        before, self._read = self._read, reader
        return before

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, depth_NK: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of the experts' outputs, in the shape of `hidden_states`; every pair at its depth, or all as
        deep as they are stored."""
        if self._read is None:
            raise CarpoolError(
                "these experts in planes are on disk and were not loaded; read them there (with carpool.offload(model, "
                "memory=...)), or use carpool.hosts.transformers.load_model"
            )
        top_k = top_k_index.shape[-1]
        hidden_NH = hidden_states.reshape(-1, hidden_states.shape[-1])
        ids_NK = top_k_index.reshape(-1, top_k)
        if depth_NK is None:
            depth_NK = torch.full_like(ids_NK, ALL_BITS, dtype=torch.int32)
        if hidden_NH.dtype == torch.float64:
            hidden_NH = hidden_NH.float()
        made_NH = self._read(hidden_NH, ids_NK, top_k_weights.reshape(-1, top_k).float(), depth_NK)
        return made_NH.reshape(hidden_states.shape).to(hidden_states.dtype)

    def check_depths(self, depths: tuple[int, ...], plan: object) -> None:
        """Raises CarpoolError for depths, of which a plan chooses, that these experts do not have."""
        if lacking := sorted(set(depths) - set(self.depths)):
            raise CarpoolError(
                f"{plan} may read at {lacking[0]} bits, by the statistics that were named; this model's experts can be "
                f"read at {list(self.depths)}: leave out the statistics, which its folder has"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self._read is not None and fn(torch.empty(0, device=self.device)).device != self.device:
            raise CarpoolError(
                f"experts in planes stay where they were loaded ({self.device}); load with device_map=..."
            )
        return super()._apply(fn, recurse)


def activation_of(experts: nn.Module) -> Activation | None:
    """What stands between the projections of transformers' experts, found by trying; None for what no kernel knows."""
    gate = getattr(experts, "_apply_gate", None)
    matrices = [one for name, one in experts.named_parameters() if name not in BIASES]
    two = len(matrices) == 2 and all(one.dim() == 3 for one in matrices)
    if gate is None or not getattr(experts, "has_gate", False) or not two:
        return None
    with torch.device("cpu"):  # where the experts are a shell on the meta device
        wide = 8 * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
        found = gate(wide)
        return next((one for one in _candidates(experts) if torch.allclose(found, one(wide, 0), atol=1e-5)), None)


def _candidates(experts: nn.Module) -> Iterator[Activation]:
    yield Activation()
    alpha, limit = (
        getattr(experts, name, getattr(experts, f"swiglu_{name}", None)) for name in ("alpha", "limit")
    )  # fmt: skip
    if isinstance(alpha, float) and isinstance(limit, float):
        yield Activation(True, alpha, limit)
        yield Activation(False, alpha, limit)
