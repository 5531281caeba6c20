"""How the dataclasses of the command line give each option its help."""

from dataclasses import field
from typing import Any


def option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})
