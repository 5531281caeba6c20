"""The one error of the examples that is the user's to mend."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class InputError(ValueError):
    """What was asked for cannot be done; the message is one line that says why."""


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Make an ``InputError`` of what a library says of ``what`` the user gave."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{what}: {' '.join(str(error).split())}") from error


def give_up(program: str, error: object) -> NoReturn:
    """End this rank with exit code 1; the first rank says why."""
    first = os.environ.get("RANK", "0") == "0"
    sys.exit(f"{program}: error: {error}" if first else 1)
