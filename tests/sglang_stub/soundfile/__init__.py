"""See `absent`."""

from absent import attribute as __getattr__  # noqa: F401
