"""A pool: which models there are, where each lies and how it is asked, as a TOML file.

    [[expert]]
    name = "math"
    engine = "transformers"      # or "vllm" (an engine in a process of its own), or "server" (OpenAI's API, loopback)
    model = "models/math"        # a folder beside the pool's file, or a name on the hub
    prompt = "{question}"        # how a question is put
    max_tokens = 64

Two experts may be one model asked in two ways (modes); it is loaded once for both.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from carpool.artefacts.files import require_file
from carpool.errors import CarpoolError

ENGINES = ("transformers", "vllm", "server")
MAX_BYTES = 1 << 20  # of a pool's file
SAMPLES, SAMPLE_BYTES = 16, 1 << 14  # of a file of weights, for its fingerprint


@dataclass(frozen=True)
class Expert:
    """A model and how it is asked.

    Attributes:
        name: in profiles, answers and reports.
        engine: `transformers`, `vllm` or `server`.
        model: a folder, or a name on the hub or of the server.
        revision: of a model on the hub; what a server serves under the name, in your own words.
        url: of a server's API, on loopback: `http://127.0.0.1:8000/v1`.
        prompt: how a question is put; `{question}` is replaced by it.
        system: the system message; only with `chat`.
        chat: use the model's chat template.
        template: further arguments of the chat template, such as `{enable_thinking = false}`.
        max_tokens: the most that an answer may have.
        stop: texts at which an answer ends.
        context: tokens that prompt and answer may have together.
        answer_after: what stands before the answer proper, such as `</think>`; confidences look at what follows it.
        weight_bytes: of the model's weights, where they cannot be counted.
        settings: further arguments of `from_pretrained` or `vllm.LLM`, such as `{dtype = "float32"}`.
    """

    name: str
    engine: str
    model: str
    revision: str = ""
    url: str = ""
    prompt: str = "{question}"
    system: str = ""
    chat: bool = False
    template: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    context: int = 1024
    answer_after: str = ""
    weight_bytes: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"expert {self.name!r}"
        _require(bool(self.name.strip()), "an expert without a name; give each one of its own")
        _require(self.engine in ENGINES, f"{where}: engine {self.engine!r} is none of {', '.join(ENGINES)}")
        _require("{question}" in self.prompt, f"{where}: its prompt has no {{question}}; put it in")
        _require(self.chat or not (self.system or self.template), f"{where}: system and template need chat = true")
        for name in ("max_tokens", "context"):
            _require(getattr(self, name) >= 1, f"{where}: {name}={getattr(self, name)}; give 1 or more")
        _require(self.weight_bytes >= 0, f"{where}: weight_bytes={self.weight_bytes}; give 0 or more")
        _require((self.engine == "server") == bool(self.url), f"{where}: a server, and nothing else, has a url")
        if self.url:
            _require(
                _loopback(self.url), f"{where}: {self.url!r} is no address on loopback; use http://127.0.0.1:PORT/v1"
            )

    @property
    def weights(self) -> tuple[str, ...]:
        """What is loaded: experts with equal weights share one load."""
        settings = json.dumps(dict(self.settings), sort_keys=True) if self.settings else ""
        return self.engine, self.model, self.revision, self.url, settings

    def put(self, question: str) -> str:
        """The question as this expert is asked it, before any chat template."""
        return self.prompt.replace("{question}", question)

    @cached_property
    def bytes(self) -> int:
        """Of the model's weights: as declared, or as its folder's files have; 0 where nobody knows."""
        return self.weight_bytes or sum(path.stat().st_size for path in self._files)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the weights, the revision and how the model is asked."""
        asked = {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if one.name not in ("weight_bytes", "url", "model")
        }
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
        for path in self._files:
            digest.update(_sample(path))
        if not self._files:
            digest.update(self.model.encode())
        return digest.hexdigest()[:16]

    @property
    def _files(self) -> list[Path]:
        return sorted(Path(self.model).glob("*.safetensors")) if self.engine != "server" else []


@dataclass(frozen=True)
class Pool:
    """The experts, in the order of their ids."""

    experts: tuple[Expert, ...]

    def __post_init__(self) -> None:
        _require(len(self.experts) > 0, "a pool without experts; give an [[expert]] for each model")
        names = self.names
        twice = next((name for name in names if names.count(name) > 1), None)
        _require(twice is None, f"two experts named {twice!r} in one pool; names are unique")

    @property
    def names(self) -> list[str]:
        return [expert.name for expert in self.experts]

    def __len__(self) -> int:
        return len(self.experts)

    def index(self, name: str) -> int:
        """Raises CarpoolError with the known names if there is no such expert."""
        if name not in self.names:
            raise CarpoolError(f"no expert {name!r} in the pool; it has {', '.join(self.names)}")
        return self.names.index(name)

    def __getitem__(self, name: str) -> Expert:
        return self.experts[self.index(name)]

    @cached_property
    def fingerprint(self) -> str:
        """Of all experts and their order."""
        told = [f"{expert.name}:{expert.fingerprint}" for expert in self.experts]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]

    @classmethod
    def load(cls, path: str | Path) -> Pool:
        """Raises CarpoolError for a file that is no pool. Folders are looked for beside it first."""
        path = require_file(path, "the pool")
        try:
            _require(path.stat().st_size <= MAX_BYTES, f"{path} is too large for a pool ({MAX_BYTES} bytes)")
            found = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            said = str(error).splitlines()[0]
            raise CarpoolError(f"{path} is no pool in TOML ({said}); see docs/models.md") from None
        entries: Any = found.get("expert")
        _require(
            set(found) == {"expert"} and isinstance(entries, list),
            f"{path} holds something else than [[expert]] tables",
        )
        return cls(tuple(_expert(entry, path) for entry in entries))


def _expert(entry: Any, path: Path) -> Expert:
    _require(isinstance(entry, dict), f"{path}: an expert is a table [[expert]]")
    shown = f"{path}, expert {entry.get('name')!r}"
    kinds: dict[str, type] = {one.name: _kind(one) for one in fields(Expert)}
    for name, value in entry.items():
        _require(name in kinds, f"{shown}: unknown setting {name!r}; there are {', '.join(kinds)}")
        _require(type(value) is kinds[name], f"{shown}: {name} = {value!r} should be of type {kinds[name].__name__}")
    missing = [one.name for one in fields(Expert) if one.name not in entry and _required(one)]
    _require(not missing, f"{shown}: it needs {', '.join(missing)}")
    given = dict(entry)
    if "stop" in given:
        _require(all(isinstance(one, str) for one in given["stop"]), f"{shown}: stop is a list of texts")
        given["stop"] = tuple(given["stop"])
    beside = path.parent / given["model"]
    if given["engine"] != "server" and beside.is_dir():
        given["model"] = str(beside)
    return Expert(**given)


def _kind(one: Any) -> type:
    if one.name in ("stop", "template", "settings"):
        return list if one.name == "stop" else dict
    return {"str": str, "int": int, "bool": bool}[one.type]


def _required(one: Any) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


def _loopback(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        return parts.scheme == "http" and (host == "localhost" or ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return False


def _sample(path: Path) -> bytes:
    """The size of a file and pieces of it, evenly spread: training changes them all."""
    size = path.stat().st_size
    with path.open("rb") as file:
        pieces = [str(size).encode()]
        for piece in range(SAMPLES):
            file.seek(max(0, (size - SAMPLE_BYTES) * piece // (SAMPLES - 1)))
            pieces.append(file.read(SAMPLE_BYTES))
    return b"".join(pieces)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CarpoolError(message)
