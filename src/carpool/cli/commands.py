"""The command line with all its commands, each of which registers itself when its module is imported."""

from carpool.cli import (  # noqa: F401
    calibrate,
    compress,
    demo,
    diffuse,
    doctor,
    evaluate,
    lm_eval,
    models,
    models_cascade,
    models_fuse,
    place,
    policies,
    policy_files,
    report,
    sample_text,
    top,
    trace,
    trace_show,
    tune,
)
from carpool.cli.app import app

__all__ = ["app"]
