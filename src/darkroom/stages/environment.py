"""Numbers that a machine sets for itself, in environment variables: they change no result and invalidate nothing."""

import math
import os

from darkroom.errors import InputError


def seconds(name: str, default: float) -> float:
    """The non-negative number in the variable `name`. Raises InputError."""
    text = os.environ.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise InputError(f"{name} = {text!r}: expected a number of seconds, 0 or more")
    return value


def count(name: str) -> int | None:
    """The positive whole number in the variable `name`; None if it is not set. Raises InputError."""
    text = os.environ.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise InputError(f"{name} = {text!r}: expected a whole number, 1 or more")
    return int(text)
