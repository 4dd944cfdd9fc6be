"""The command line with all its commands, each of which registers itself when its module is imported."""

from carpool.cli import calibrate, demo, diffuse, doctor, evaluate, lm_eval, policies, policy_files, report, tune  # noqa: F401
from carpool.cli.app import app

__all__ = ["app"]
