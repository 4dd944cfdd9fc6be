"""llama.cpp beside vLLM on planes: decoding in one process, at nearly equal bits of an expert's weights.

    pip install --target peers --no-deps llama-cpp-python gguf diskcache      # builds llama.cpp for this processor
    PYTHONPATH=peers python benchmarks/llama_peer.py --output docs/results/llama-peer.json

A few layers of Qwen3-30B-A3B with random weights. Routers, attention and head are the same numbers in both: 32 bits in
vLLM, whose bf16 is emulated on processors without instructions for it, F16 in llama.cpp, which its kernels prefer.
Experts are random planes here and random weights there, quantised by the library itself (`ggml_quantize_chunk`, which
`llama_model_quantize` calls), so that nothing but experts is small.
In every round all states decode as many steps with as many sequences; medians over rounds. Bits include scales.
`choosing_ms` is what choosing depths takes of vLLM's step, all layers together.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import numpy as np
from engines import GEOMETRIES, Geometry, as_json, machine
from random_planes import WEIGHTS_FILE, write_checkpoint
from vllm_planes import Chosen, planes_engine, took

DEPTHS, GROUP, SEED, PROMPT, VOCABULARY = (2, 3, 4), 64, 0, 8, 8192
DISTINCT = 8  # experts that are made; the others are copies, in memory of their own
KINDS = {"Q4_0": 4.5, "Q4_K": 4.5, "Q2_K": 2.625}  # bits of a weight, scales included
NAMES = {  # of a layer's tensors
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(weights: Path, geometry: Geometry, layers: int, kind: str, path: Path) -> Path:
    """The model with its experts in a format of llama.cpp's."""
    import gguf
    from safetensors.torch import load_file

    writer, config = gguf.GGUFWriter(path, "qwen3moe", use_temp_file=True), geometry.config
    writer.add_context_length(1024)
    writer.add_embedding_length(geometry.hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(geometry.intermediate)
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(geometry.experts)
    writer.add_expert_used_count(geometry.top_k)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    for name, tensor in load_file(weights).items():
        stem = name.removesuffix(".weight")
        if stem in WHOLE:
            target = WHOLE[stem]
        else:
            _, _, number, part = stem.split(".", 3)
            target = f"blk.{number}.{NAMES[part]}"
        # llama.cpp wants norms and routers in 32 bits
        wide = tensor.dim() == 1 or target.endswith("ffn_gate_inp")
        writer.add_tensor(f"{target}.weight", tensor.float().numpy().astype(np.float32 if wide else np.float16))
    generator = np.random.default_rng(SEED)
    for layer in range(layers):
        for part, rows, width in (
            ("gate", geometry.intermediate, geometry.hidden), ("up", geometry.intermediate, geometry.hidden),
            ("down", geometry.hidden, geometry.intermediate),
        ):  # fmt: skip
            made = np.stack([
                quantised(generator.standard_normal((rows, width), dtype=np.float32) * width**-0.5, kind)
                for _ in range(DISTINCT)
            ])  # fmt: skip
            made = np.concatenate([made] * (geometry.experts // DISTINCT))
            writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", made, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantised(rows_RI: Any, kind: str) -> Any:
    """A matrix in a format of llama.cpp's, bytes `[R, B]`."""
    import gguf
    from llama_cpp import llama_cpp

    base = _library(Path(llama_cpp.__file__).parent / "lib", "ggml-base")
    rows, width = rows_RI.shape
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    made = np.empty((rows, width // block * size), dtype=np.uint8)
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    base.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p,
    ]  # fmt: skip
    base.ggml_quantize_chunk(
        int(gguf.GGMLQuantizationType[kind]), rows_RI.ctypes.data, made.ctypes.data, 0, rows, width, None
    )
    return made


def _library(folder: Path, name: str) -> Any:
    return ctypes.CDLL(str(next(iter(sorted(folder.glob(f"lib{name}.*"))))))


class Llama:
    """A model in llama.cpp that decodes several sequences beside each other."""

    def __init__(self, path: Path, threads: int, mapped: bool = False) -> None:
        """Mapped: all weights stay in the file as they are, in no other order, and memory beside them is small."""
        from llama_cpp import llama_cpp as api

        self.api, self._quiet = api, api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self._quiet, None)
        api.llama_backend_init()
        weights = api.llama_model_default_params()
        if mapped:
            weights.load_mode, weights.use_extra_bufts = api.LLAMA_LOAD_MODE_MMAP, False
        self.model = api.llama_model_load_from_file(str(path).encode(), weights)
        how = api.llama_context_default_params()
        rows, most = (16, 16) if mapped else (64, 512)
        how.n_ctx, how.n_batch, how.n_ubatch, how.n_seq_max = 64 * rows, most, most, rows
        how.n_threads = how.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, how)
        if not self.context:
            raise SystemExit(f"llama.cpp does not load {path}")

    def step(self, tokens: list[int], position: int) -> None:
        """One token of every sequence."""
        api = self.api
        batch = api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for row, token in enumerate(tokens):
            batch.token[row], batch.pos[row], batch.n_seq_id[row] = token, position, 1
            batch.seq_id[row][0], batch.logits[row] = row, 1
        if api.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp could not decode")
        api.llama_get_logits(self.context)  # waits for what was computed
        api.llama_batch_free(batch)

    def decode(self, batch: int, steps: int, generator: Any) -> float:
        """Seconds a step, after a prompt."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        tokens = generator.integers(3, VOCABULARY, (PROMPT + steps, batch)).tolist()
        for position in range(PROMPT):
            self.step(tokens[position], position)
        begin = time.perf_counter()
        for position in range(PROMPT, PROMPT + steps):
            self.step(tokens[position], position)
        return (time.perf_counter() - begin) / steps


def in_vllm(engine: Any, chosen: Chosen, depth: int, batch: int, steps: int, generator: Any) -> float:
    """Seconds a step of vLLM, everything read at a depth; `chosen` has those that choosing took of the steps."""
    change = {"policy": f"depth(price=0, levels=[0, {depth}])", "enabled": True, "compile": True}
    engine.collective_rpc("carpool_set", kwargs=change)
    prompts = [{"prompt_token_ids": generator.integers(3, VOCABULARY, PROMPT).tolist()} for _ in range(batch)]
    chosen.seconds = 0.0
    first = took(engine, prompts, 1)
    chosen.seconds *= -1
    return (took(engine, prompts, 1 + steps) - first) / steps


def states(engine: Any, chosen: Chosen, peers: dict[str, Llama]) -> Iterator[tuple[str, float, Any]]:
    """Every state's name, its bits and what decodes in it."""
    for depth in DEPTHS:
        yield f"vLLM, depth {depth}", depth + 16 / GROUP, partial(in_vllm, engine, chosen, depth)
    for kind, peer in peers.items():
        yield f"llama.cpp, {kind}", KINDS[kind], peer.decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", default="float32", help="of vLLM's weights beside experts, and of its activations")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    geometry, threads = GEOMETRIES["qwen3-30b-a3b"], int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    folder = Path(tempfile.mkdtemp(prefix="carpool-llama-"))
    write_checkpoint(geometry, given.layers, folder, DEPTHS, GROUP, SEED)
    peers = {
        kind: Llama(write_gguf(folder / WEIGHTS_FILE, geometry, given.layers, kind, folder / f"{kind}.gguf"), threads)
        for kind in KINDS
    }
    limits = {"max_model_len": 128, "max_num_batched_tokens": 512, "max_num_seqs": 64}
    engine, chosen = planes_engine(folder, limits, DEPTHS[-1], given.dtype), Chosen()
    import llama_cpp

    content: dict[str, Any] = {
        "machine": machine(), "llama_cpp_python": llama_cpp.__version__, "geometry": "qwen3-30b-a3b",
        "layers": given.layers, "dtype": given.dtype,
        "vocabulary": VOCABULARY, "threads": threads, "seed": SEED, "rounds": given.rounds,
        "steps": given.steps, "cells": [],
    }  # fmt: skip
    for batch in given.batches:
        seconds: dict[str, list[float]] = {}
        bits: dict[str, float] = {}
        choosing: dict[str, list[float]] = {}
        for turn in range(given.rounds + 1):
            generator = np.random.default_rng(turn)
            for name, weight_bits, decode in states(engine, chosen, peers):
                one = decode(batch, given.steps, generator)
                bits[name] = weight_bits
                if turn:
                    seconds.setdefault(name, []).append(one)
                    choosing.setdefault(name, []).append(chosen.seconds / given.steps)
        content["cells"].append({"batch": batch, "states": {
            name: {"bits": bits[name], "step_ms": 1e3 * statistics.median(times),
                   "quartiles_ms": [1e3 * one for one in statistics.quantiles(times, n=4)[::2]],
                   "tokens_s": batch / statistics.median(times)}
            | ({"choosing_ms": 1e3 * statistics.median(choosing[name])} if name.startswith("vLLM") else {})
            for name, times in seconds.items()
        }})  # fmt: skip
        print({name: round(one["step_ms"], 2) for name, one in content["cells"][-1]["states"].items()}, flush=True)
        if given.output:
            given.output.write_text(as_json(content))


if __name__ == "__main__":
    main()
