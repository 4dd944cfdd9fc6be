"""Tests are the same on every run: hypothesis draws from a fixed seed and has no deadline."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "fixed", derandomize=True, deadline=None, max_examples=15, suppress_health_check=list(HealthCheck), database=None
)
settings.load_profile("fixed")
