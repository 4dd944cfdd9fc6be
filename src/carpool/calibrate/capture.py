"""What a model's experts see: their inputs, the native routing and the residual stream, from one forward pass.

`B` sequences, `T` tokens each, `N` rows of a batch, `E` experts, `K` experts per token, `H` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from carpool.artefacts.identity import Sample
from carpool.errors import CarpoolError

PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # what experts may be stored as
SUM_TOLERANCE = 2e-2  # relative, of a decoder layer's output to residual stream plus block in bf16


class Layer(Protocol):
    """What calibration needs to know of an MoE layer; `hosts.transformers.MoELayer` has it."""

    @property
    def name(self) -> str: ...
    @property
    def index(self) -> int: ...
    @property
    def weight_EH(self) -> Tensor: ...
    @property
    def block(self) -> nn.Module: ...
    @property
    def experts(self) -> nn.Module: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    def sample(self) -> Sample: ...


class Routed(NamedTuple):
    """What one layer's experts were called with, and the residual stream that their sum is added to (None where the
    model adds it otherwise)."""

    hidden_NH: Tensor
    ids_NK: Tensor
    weights_NK: Tensor
    residual_NH: Tensor | None


class Seen(NamedTuple):
    """A chunk of tokens in one layer: what was captured, every expert's output, the domain of each token, and which
    tokens are kept out of fits, to measure them."""

    hidden_NH: Tensor
    outputs_NEH: Tensor
    ids_NK: Tensor
    weights_NK: Tensor
    residual_NH: Tensor | None
    domain_N: Tensor
    held_N: Tensor


class Collector(Protocol):
    """Running sums of one layer; what calibration can be extended with."""

    def update(self, seen: Seen) -> None: ...

    def result(self) -> dict[str, Tensor]:
        """Statistics by name, on the CPU; the same names in every layer (others are left out of the file)."""
        ...


def capture(model: Any, layers: Sequence[Layer], ids_BT: Tensor) -> list[Routed]:
    """Run the model once and return what each layer's experts were called with, in the order of `layers`.

    Raises:
        CarpoolError: a layer's experts were not called exactly once with a row per token.
    """
    calls: list[list[Routed]] = [[] for _ in layers]
    residuals = [Residual(model, layer) for layer in layers]

    def record(position: int) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden, ids, weights = (*args, *kwargs.values())[:3]
            calls[position].append(Routed(hidden.reshape(-1, hidden.shape[-1]), ids, weights, None))

        return hook

    handles = [
        layer.experts.register_forward_pre_hook(record(position), with_kwargs=True)
        for position, layer in enumerate(layers)
    ]
    try:
        # the head's logits over the whole vocabulary are not needed
        model.base_model(input_ids=ids_BT.to(layers[0].weight_EH.device), use_cache=False)
    finally:
        for handle in (*handles, *(handle for residual in residuals for handle in residual.handles)):
            handle.remove()
    for layer, seen in zip(layers, calls, strict=True):
        shapes = [list(call.ids_NK.shape) for call in seen]
        if shapes != [[ids_BT.numel(), layer.top_k]]:
            raise CarpoolError(
                f"layer {layer.index}: its experts were called with choices of shape {shapes}, not once with "
                f"{[ids_BT.numel(), layer.top_k]}: something bypasses or rewrites this model's routing"
            )
    return [
        seen[0]._replace(residual_NH=residual.found(len(seen[0].hidden_NH)))
        for seen, residual in zip(calls, residuals, strict=True)
    ]


class Residual:
    """Finds the residual stream of one MoE layer in a forward pass.

    The MoE block's input is the output of a norm beside the block; that norm's input is the residual stream, if the
    decoder layer's output then is that stream plus the block's output. Layers that scale or normalise the block's
    output fail this check, and nothing is found.
    """

    def __init__(self, model: nn.Module, layer: Layer) -> None:
        self._near: list[tuple[Tensor, Tensor]] = []  # input and output of the block's siblings
        self._stream: Tensor | None = None
        self._block: Any = None
        parent = model.get_submodule(layer.name.rpartition(".")[0])
        self.handles = [
            *(child.register_forward_hook(self._sibling) for child in parent.children() if child is not layer.block),
            layer.block.register_forward_pre_hook(self._before),
            layer.block.register_forward_hook(self._after),
            parent.register_forward_hook(self._sum),
        ]

    def found(self, rows: int) -> Tensor | None:
        """`[N, H]`, or None."""
        return None if self._stream is None else self._stream.reshape(rows, -1)

    def _sibling(self, module: nn.Module, args: tuple, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and args[0].shape == output.shape:
            self._near.append((args[0], output))

    def _before(self, module: nn.Module, args: tuple) -> None:
        self._stream = next((given for given, made in self._near if args and made is args[0]), None)
        self._near.clear()

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._block = output[0] if isinstance(output, tuple) else output

    def _sum(self, module: nn.Module, args: tuple, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        block, self._block = self._block, None
        tensors = isinstance(output, Tensor) and isinstance(block, Tensor)
        if self._stream is None or not tensors or output.shape != self._stream.shape:
            self._stream = None
            return
        error = (output.float() - self._stream.float() - block.reshape(output.shape).float()).norm()
        if not error <= SUM_TOLERANCE * block.float().norm():
            self._stream = None


class Experts:
    """A layer's experts, run one at a time on all rows in fp32 whatever they are stored in."""

    def __init__(self, layer: Layer) -> None:
        """Raises CarpoolError if the experts are quantised, or offloaded."""
        self.layer = layer
        tensors = [*layer.experts.parameters(), *layer.experts.buffers()]
        odd = {type(one).__name__ for one in tensors if type(one) not in (nn.Parameter, Tensor)}
        odd |= {str(one.dtype) for one in tensors if one.dtype not in PLAIN}
        if not tensors:
            odd = {f"something that {type(layer.experts).__name__} keeps to itself"}
        if odd:
            kinds = ", ".join(sorted(odd))
            raise CarpoolError(f"layer {layer.index}: experts stored as {kinds}; calibrate the unquantised model")
        if any(one.is_meta for one in tensors):
            raise CarpoolError(
                f"layer {layer.index}: experts that are not in memory (offloaded); calibrate where all of them fit"
            )
        self._cast = any(one.dtype != torch.float32 for one in tensors)

    @contextmanager
    def ready(self) -> Iterator[Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """The experts as a function of fp32 `(hidden_NH, ids_NK, weights_NK)`; cast once for the whole block."""
        module = self.layer.experts
        if not self._cast:
            yield module
            return
        state = {name: tensor.float() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
        yield lambda *args: torch.func.functional_call(module, state, args)

    def each(self, run: Callable[[Tensor, Tensor, Tensor], Tensor], hidden_NH: Tensor) -> Iterator[Tensor]:
        """Every expert's output `[N, H]` in turn, unweighted."""
        ones_N1 = torch.ones(len(hidden_NH), 1, device=hidden_NH.device)
        for expert in range(self.layer.num_experts):
            output_NH = run(hidden_NH, torch.full_like(ones_N1, expert, dtype=torch.int64), ones_N1)
            yield output_NH


@contextmanager
def calm(model: Any) -> Iterator[None]:
    """Evaluation mode and the plain expert kernel: others copy an expert's weights for every row."""
    training, switch = model.training, getattr(model, "set_experts_implementation", None)
    before = getattr(model.config, "_experts_implementation", None)
    model.eval()
    try:
        if switch is not None and before is not None:
            switch("eager")
        yield
    finally:
        model.train(training)
        if switch is not None and before is not None:
            switch(before)
