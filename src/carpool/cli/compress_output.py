"""What `carpool compress` writes: a file of planes, or a checkpoint with its experts as planes or in another format."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from carpool.artefacts.statistics import Statistics
    from carpool.experts.export import Format
    from carpool.hosts.transformers import Opened

OF_FILES = (".json", ".txt", ".bin", ".pt", ".gguf")  # nobody means a folder with these
PLANES_FILE = "experts.planes"  # no engine takes it for a file of weights


@dataclass(frozen=True)
class Output:
    """Where to write, and in which form; None is a file of planes beside the model."""

    path: Path
    form: Format | None

    @classmethod
    def of(cls, path: Path, form: str | None, bits: int | None) -> Output:
        """From what the command was given.

        Raises:
            CarpoolError: options that do not go together, or a path that cannot be written.
        """
        from carpool.artefacts.checkpoint import require_new_folder
        from carpool.artefacts.files import require_writable
        from carpool.experts.export import PACKED_BITS, Format

        if bits is not None and not 1 <= bits <= 8:
            raise CarpoolError(f"--bits {bits}: give 1 to 8")
        if form is not None and form not in get_args(Format):
            raise CarpoolError(f"--format {form}: use one of {', '.join(get_args(Format))}")
        if path.suffix in OF_FILES:
            raise CarpoolError(f"-o {path}: name a file .safetensors, or a folder")
        if path.suffix == ".safetensors":
            if form not in (None, "planes") or bits is not None:
                raise CarpoolError(f"-o {path} is a file of planes; name a folder for --format or --bits")
            require_writable(path)
            return cls(path, None)
        if form is None:
            form = "planes" if bits is None else "compressed-tensors" if bits in PACKED_BITS else "rounded"
        if (form == "planes") != (bits is None):
            wanted = "--depths, not --bits" if form == "planes" else "--bits, such as 4"
            raise CarpoolError(f"--format {form} takes {wanted}")
        if form == "compressed-tensors" and bits not in PACKED_BITS:
            raise CarpoolError(f"--format compressed-tensors --bits {bits}: engines read 4 and 8; else use rounded")
        require_new_folder(path)
        return cls(path, form)  # type: ignore[arg-type]  # one of them

    @property
    def centre(self) -> float:
        """Of a cell of the quantiser: other formats have signed integers."""
        from carpool.experts.planes import MIDDLE

        return 0.0 if self.form == "compressed-tensors" else MIDDLE

    def check(self, opened: Opened, group: int) -> None:
        """Raises CarpoolError, before weights are read, for a model that cannot be written in this form."""
        from carpool.artefacts.weights import Weights

        if self.form is None:
            return
        if opened.quantised:
            raise CarpoolError(
                f"this model's weights are quantised already ({opened.quantised}); compress the one that it was made "
                "from, or write its planes into a file (-o experts.safetensors)"
            )
        if opened.folder is None:
            raise CarpoolError("this model's files are not on this machine; download them first")
        Weights.of(opened.folder)
        if self.form == "compressed-tensors":
            if find_spec("compressed_tensors") is None:
                raise CarpoolError("--format compressed-tensors needs a package: pip install compressed-tensors")
            for layer in opened.layers:
                widths = {one.shape[-1] for name, one in layer.experts.named_parameters() if "bias" not in name}
                odd = sorted(width for width in widths if width % group)
                if odd:
                    raise CarpoolError(f"--group {group} does not divide a matrix of {odd[0]} inputs; use a divisor")

    def write(self, opened: Opened, model: Any, stats: Statistics, method: str, parameters: dict[str, Any]) -> None:
        """Write the file, or the folder in one piece.

        Raises:
            CarpoolError: it cannot be written; nothing is left then.
        """
        if self.form is None:
            stats.save(self.path)
            return
        from carpool.artefacts.checkpoint import METHOD, Recipe, new_folder
        from carpool.artefacts.files import write_text
        from carpool.artefacts.weights import Weights, copy_beside
        from carpool.calibrate.compress import lost
        from carpool.experts.export import Export, compressed_tensors_config, planes_config
        from carpool.experts.stored import StoredExperts

        source = opened.folder
        assert source is not None  # checked
        weights, original = Weights.of(source), _originals(model)
        layers = {index: StoredExperts.of(tensors) for index, tensors in stats.layers.items()}
        first = next(iter(layers.values()))
        depths = first.depths
        with new_folder(self.path) as folder:
            copy_beside(source, folder)
            # stock transformers would load the rest and make the experts up, with a warning
            weights.copy(folder, Export(layers, original, self.form), METHOD if self.form == "planes" else "")
            config = json.loads((source / "config.json").read_text())
            if self.form == "planes":
                _as_they_are_read(stats, layers).save(folder / PLANES_FILE)
                config["quantization_config"] = planes_config(PLANES_FILE, first)
                sizes: dict[str, Any] = {"stored": first.share_stored}
                sizes["read"] = {str(depth): float(first.sizes[depth]) for depth in depths}
            else:
                sizes = {"stored": _share(Weights.of(folder).expert_bytes(), model)}
            if self.form == "compressed-tensors":
                names = [name for tensors in weights.files.values() for name in tensors]
                config["quantization_config"] = compressed_tensors_config(depths[-1], first.into.group, names)
            write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
            Recipe(
                method=method, parameters={"format": self.form, **parameters}, fingerprint=stats.fingerprint,
                architecture=stats.architecture, data=stats.data,
                errors={"lost_energy": {
                    str(depth): {str(index): float(lost(tensors)[place]) for index, tensors in stats.layers.items()}
                    for place, depth in enumerate(depths)
                }},
                sizes=sizes,
            ).save(folder)  # fmt: skip


def _originals(model: Any) -> dict[int, Any]:
    from carpool.calibrate.moments import Projections
    from carpool.experts.export import Original
    from carpool.hosts.transformers import find_layers

    found = {}
    for layer in find_layers(model):
        held = Projections(layer)
        found[layer.index] = Original(held.into_ERH, held.out_EHI)
    return found


def _as_they_are_read(stats: Statistics, layers: dict[int, Any]) -> Statistics:
    """With the sample of the weights that whoever loads the checkpoint has, in place of the source's."""
    from carpool.artefacts.identity import Held, sample

    changed = {}
    for index, stored in layers.items():
        deepest = stored.depths[-1]
        held = Held(stored.into.read(deepest), stored.out.read(deepest), stored.out.width)
        changed[index] = {**stats.layers[index], **sample(index, held).tensors}
    return replace(stats, layers=changed)


def _share(stored: dict[int, int], model: Any) -> float:
    """Bytes of the experts' tensors over those of their weights in 16 bits."""
    from carpool.hosts.transformers import find_layers

    layers = find_layers(model)
    whole = sum(2 * parameter.numel() for layer in layers for parameter in layer.experts.parameters())
    return sum(stored.get(layer.index, 0) for layer in layers) / whole
