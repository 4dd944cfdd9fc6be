"""A newer vLLM's Python over the compiled parts of the installed CPU build, in a folder of its own.

    python tests/vllm_overlay.py 0.33.0 .venv/vllm-0.33

`make test-next` builds it and runs the plugin's tests with the folder on `PYTHONPATH`. PyPI has the GPU wheel of a
release long before there is a CPU build; its Python is the same.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

COMPILED = (".so", "/vllm-rs")
ADDED = ("orjson",)  # what newer releases import and the installed one does not


def main(version: str, folder: Path) -> None:
    import torch

    installed = importlib.util.find_spec("vllm")
    if installed is None or installed.origin is None:
        raise SystemExit("vLLM's CPU build is not installed")
    if folder.exists():
        shutil.rmtree(folder)
    with TemporaryDirectory() as scratch:
        pip("download", f"vllm=={version}", "--no-deps", "--dest", scratch)
        [wheel] = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as content:
            names = [name for name in content.namelist() if name.startswith("vllm/") and not name.endswith(COMPILED)]
            content.extractall(folder, names)
    compiled = Path(installed.origin).parent
    for library in compiled.rglob("*.so"):
        target = folder / "vllm" / library.relative_to(compiled)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, target)
    metadata = folder / f"vllm-{version}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    pip("install", *ADDED, "--no-deps", "--target", str(folder))
    print(
        f"The Python of vLLM {version} over the compiled parts of the installed CPU build, torch {torch.__version__}.\n"
        "Tests that pass on it prove that the plugin finds and follows this release's Python, on a CPU. They prove "
        "nothing about its kernels and graphs on GPUs, nor about the version of torch that it asks for."
    )


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
