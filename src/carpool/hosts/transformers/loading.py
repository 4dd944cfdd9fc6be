"""Load a model and its tokenizer, or say in one sentence why not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from carpool.artefacts.checkpoint import METHOD, planes_in
from carpool.artefacts.model_source import folder_of, source_of
from carpool.errors import CarpoolError
from carpool.hosts.transformers.as_stored import fill, matrices
from carpool.hosts.transformers.layers import MoELayer, find_layers
from carpool.hosts.transformers.planes import activation_of

PLAIN = {torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True, eq=False)
class Opened:
    """A model whose weights are not read yet.

    Attributes:
        layers: its MoE layers, without weights.
        tokenizer: the model's.
        planes: the file that holds its experts, where they are planes of bits.
    """

    layers: list[MoELayer]
    tokenizer: Any
    planes: Path | None
    _source: str
    _config: Any
    _where: dict[str, Any]

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self._config

    @property
    def folder(self) -> Path | None:
        """Where its files are, if they are on this machine."""
        return folder_of(self._source)

    @property
    def quantised(self) -> str:
        """How its configuration calls the quantisation of its weights; empty for weights as usual."""
        if self.planes is not None:
            return METHOD
        given = getattr(self._config, "quantization_config", None)
        held = given if isinstance(given, dict) else vars(given or object)
        return str(held.get("quant_method", "")) if given else ""

    @property
    def in_planes(self) -> bool:
        """Whether its experts stay planes in memory: kernels, or plain torch, read them there. Those of a family with
        an activation that no kernel knows become usual weights, at the deepest depth."""
        return self.planes is not None and all(activation_of(layer.experts) for layer in self.layers)

    def weights(
        self,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        *,
        usual: bool = False,
        resident: bool = True,
    ) -> Any:
        """The model in evaluation mode; arguments as of `load_model`.

        Args:
            usual: experts in planes become usual weights, for what looks at weights.
            resident: whether experts in planes are read; `carpool.offload` reads them where they are.

        Raises:
            CarpoolError: no weights, or weights that do not fit.
        """
        source = self._source
        if dtype is None:
            dtype = torch.float32 if device_map is None else "auto"
        config, filled = self._config, self.planes if usual or not self.in_planes else None
        if self.planes is not None and filled is None:
            import carpool.hosts.transformers.quantizer  # noqa: F401  # which transformers finds by the method's name

            config = copy.deepcopy(config)
            method = {"quant_method": METHOD, "file": self.planes.name, "resident": resident}
            config.quantization_config = method
        given = {"config": config, "dtype": dtype, "device_map": device_map, "output_loading_info": True}
        if self.planes is not None:
            given["variant"] = METHOD
        kind = auto_class(self._config)
        with _quiet() if filled else nullcontext():  # which says that the experts are not in the usual file
            model, info = _try(source, "weights", lambda: kind.from_pretrained(source, **given, **self._where))
        missing = set(map(str, info.get("missing_keys", ()))) - (matrices(model) if filled else set())
        lacking = sorted(missing) + sorted(map(str, info.get("mismatched_keys", ())))
        if lacking:
            raise CarpoolError(
                f"{source}: the weights lack {lacking[0]} and {len(lacking) - 1} more; download them again"
            )
        if filled is not None:
            fill(model, filled)
        if self.quantised and isinstance(dtype, torch.dtype) and {one.dtype for one in model.parameters()} <= PLAIN:
            for parameter in model.parameters():  # what transformers has dequantised keeps the checkpoint's
                parameter.data = parameter.data.to(dtype)
        return model.eval()


def open_model(
    path: str | Path | None = None, *, check: Callable[[list[MoELayer]], None] = lambda layers: None
) -> Opened:
    """A model's layers and tokenizer, before any weight is read.

    Args:
        path: a folder in transformers format, or a name `organisation/model` on the Hugging Face hub; None is the
            reference model (`carpool[demo]`).
        check: is shown the model's MoE layers, and may raise.

    Raises:
        CarpoolError: no such folder or model, no configuration or tokenizer in it, a family without a class that
            predicts text, one that denoises canvases, a dense model, or a router Carpool does not know.
    """
    from transformers import AutoConfig, AutoTokenizer

    source, local = source_of(path)
    where: dict[str, Any] = {"local_files_only": local}
    config = _try(source, "configuration", lambda: AutoConfig.from_pretrained(source, **where))
    folder = folder_of(source)
    planes = None if folder is None else planes_in(config, folder)
    if planes is not None:
        del config.quantization_config  # no method of transformers: the experts are filled in after it
    require_known(source, config)
    kind = auto_class(config)
    if kind.__name__ == "AutoModel":
        raise CarpoolError(
            f"{source}: transformers has no class of the family {config.model_type} that predicts text from text; "
            "use it in code of your own, with carpool.share(model, ...)"
        )
    if getattr(config, "canvas_length", None) is not None:
        raise CarpoolError(
            f"{source} denoises canvases of random tokens ({config.model_type}), which no command here measures; use "
            "carpool.share(model, ..., group='request') around model.generate (docs/diffusion.md)"
        )
    with torch.device("meta"):  # the architecture alone, before gigabytes are read
        shell = _try(source, "configuration", lambda: kind.from_config(config))
    layers = find_layers(shell)
    check(layers)
    tokenizer = _try(source, "tokenizer", lambda: AutoTokenizer.from_pretrained(source, **where))
    return Opened(layers, tokenizer, planes, source, config, where)


def load_model(
    path: str | Path | None = None, *, dtype: torch.dtype | str | None = None, device_map: Any = None
) -> tuple[Any, Any]:
    """A language model with MoE layers, in evaluation mode, and its tokenizer.

    Args:
        path: as of `open_model`.
        dtype: of the weights; default fp32, or the checkpoint's own where a `device_map` is given.
        device_map: passed on to transformers; default: the CPU.

    Raises:
        CarpoolError: what `open_model` raises; no weights, or weights that do not fit.
    """
    opened = open_model(path)
    return opened.weights(dtype, device_map), opened.tokenizer


def auto_class(config: Any) -> Any:
    """What builds a model from a configuration: the class for causal language models, else the one for images and
    text (it takes text alone, too), else the one that predicts nothing."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModel)
    return next((kind for kind in kinds if type(config) in kind._model_mapping), AutoModelForCausalLM)


def require_known(source: str, config: Any) -> None:
    """Raises CarpoolError for a quantisation that transformers does not know: it would take the codes for weights."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    given = getattr(config, "quantization_config", None)
    method = given.get("quant_method") if isinstance(given, dict) else None
    if method is not None and method not in AUTO_QUANTIZATION_CONFIG_MAPPING and method != "bitsandbytes":
        raise CarpoolError(
            f"{source} is quantised by {method!r}, which this version of transformers does not know; use the model "
            "that it was made from, or a newer transformers"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _try(source: str, what: str, load: Any) -> Any:
    try:
        return load()
    except CarpoolError:
        raise
    except Exception as error:  # transformers, hub and safetensors each raise their own kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CarpoolError(f"cannot load the {what} of {source}: {reason}") from None
