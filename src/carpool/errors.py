"""The one exception a user of Carpool has to know."""

from __future__ import annotations

LONGEST = 2000  # characters of a message; a value that it names may be of any length


class CarpoolError(ValueError):
    """Bad input or an unsupported set-up, in one sentence that names the value and the remedy."""

    def __init__(self, message: str) -> None:
        if len(message) > LONGEST:  # beginning and end stay: the cause and the remedy
            message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 3 :]}"
        super().__init__(message)
