"""The one exception a user of Carpool has to know."""

from __future__ import annotations


class CarpoolError(ValueError):
    """Bad input or an unsupported set-up, in one sentence that names the value and the remedy."""
