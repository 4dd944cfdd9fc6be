"""What is vLLM's about the metrics: their labels, and how they reach its server's /metrics."""

from __future__ import annotations

import functools
import os
import tempfile
from typing import Any

from carpool.hosts.engine.metrics import Labels


def labels_of(config: Any) -> Labels:
    """Values of `carpool.hosts.engine.metrics.LABELS` for an engine, from vLLM's configuration."""
    return str(config.model_config.served_model_name), str(config.parallel_config.data_parallel_rank)


@functools.cache  # until the process ends, which removes it
def _shared_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="carpool-metrics-", ignore_cleanup_errors=True)


def collect_from_workers() -> None:
    """In the front end of a server: let the metrics of worker processes reach /metrics.

    Prometheus' own way across processes is a shared directory, which has to be named before the workers start. vLLM
    does the same itself when it runs several front ends; but what it does at the end fails on a directory of its own.
    """
    from vllm import envs

    if "PROMETHEUS_MULTIPROC_DIR" in os.environ or not envs.VLLM_ENABLE_V1_MULTIPROCESSING:
        return
    import prometheus_client.values

    os.environ["PROMETHEUS_MULTIPROC_DIR"] = _shared_folder().name
    prometheus_client.values.ValueClass = prometheus_client.values.MultiProcessValue()
