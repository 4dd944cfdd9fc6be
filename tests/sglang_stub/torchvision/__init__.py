"""See `absent`."""

from absent import attribute as __getattr__  # noqa: F401

__version__ = "0.0.0"
