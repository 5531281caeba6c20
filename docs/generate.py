"""Makes docs/keys.md and docs/support.md from the tables in the code: `make docs`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from ds_lena.integrations.deepspeed.support import FEATURES, REFUSED, SUPPORTED, WITHOUT_EFFECT
from ds_lena.integrations.deepspeed.support.feature import PRECISIONS, Feature
from ds_lena.keys import KEYS

DOCS = Path(__file__).parent
STAGES = (0, 1, 2, 3)

KEYS_PAGE = """# Keys of the optimizer entry

Made from `KEYS` in [`keys.py`](../ds_lena/keys.py) by `make docs`. Do not edit this page.

The keys stand in the DeepSpeed JSON under `"optimizer": {{"type": "LENA", "params": {{…}}}}`. `ds_lena.LENA` takes the
same keys as keyword arguments. [`guide.md`](guide.md) says how to choose them.

{table}

A parameter group may set its own `lr`, `weight_decay`, `betas`, `eps`, `momentum` and `nesterov`, if its base rule has
them, and `"lena": false`: factor 1 and no statistics. LENA leaves other entries of a group, such as a name, alone.

A key or value that is not allowed is an error inside `deepspeed.initialize`, on every rank. The error names the key,
the value and what is allowed. LENA checks a group's values in the same way.
"""

SUPPORT_PAGE = """# What is supported

Made from the table in [`support/`](../ds_lena/integrations/deepspeed/support) by `make docs`. Do not edit this page.
Every key of DeepSpeed's JSON is supported, refused or without effect on LENA.
[`test_every_key`](../tests/integrations/test_every_key.py) asks DeepSpeed for its keys.

## ZeRO stages and precisions

{matrix}

Each supported cell links to the file that supports it. The tests train every cell, and compare it after each update
with a float64 reference in a single process: all parameters and the whole report.
[`test_matrix`](../tests/parity/test_matrix.py) combines the cells with 1, 2 and 4 ranks, accumulation, clipping, the
base rules and the kinds of layer.

{areas}

## Refused

LENA refuses these by an error: inside `deepspeed.initialize` or the constructor, or at the first call that shows them.
The error names the nearest supported choice.

{refused}

## Without effect on LENA

LENA measures, decides and moves the same with these keys of DeepSpeed's JSON. `*` stands for what follows.

{without_effect}
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("|  |", "| |")


def link(path: str, to: str) -> str:
    return f"[{Path(path).stem}]({to}/{path})"


def shown_by(feature: Feature) -> str:
    return link(feature.test.partition("::")[0], "..")


def keys_page() -> str:
    rows = []
    for name, key in KEYS.items():
        default = list(key.default) if isinstance(key.default, tuple) else key.default
        rows.append([f"`{name}`", f"`{json.dumps(default)}`", key.allowed, key.meaning])
    return KEYS_PAGE.format(table=table(["key", "default", "allowed", "meaning"], rows))


def matrix(link_to: str = "") -> str:
    """The table of ZeRO stages and precisions. `link_to`: the path to the package, for cells that are links."""
    rows = {feature.what: feature for feature in FEATURES}

    def cell(stage: int, precision: str) -> str:
        feature = rows.get(f"ZeRO {stage}, {precision}") or rows.get(precision)
        if feature is None:
            return "DeepSpeed has none"
        if not feature.by:
            return "refused"
        return f"[yes]({link_to}/{feature.by})" if link_to else "yes"

    lines = [[f"ZeRO {stage}", *(cell(stage, precision) for precision in PRECISIONS)] for stage in STAGES]
    return table(["", *PRECISIONS], lines)


def support_page() -> str:
    parts = []
    for area in dict.fromkeys(feature.area for feature in SUPPORTED if feature.area):
        rows = [
            [feature.what, link(feature.by, "../ds_lena"), shown_by(feature), feature.note]
            for feature in SUPPORTED
            if feature.area == area
        ]
        parts.append(f"## {area}\n\n{table(['feature', 'supported by', 'test', 'note'], rows)}")
    refused = [[feature.what.format(predivide="N"), feature.instead, shown_by(feature)] for feature in REFUSED]
    without_effect = [[", ".join(f"`{key}`" for key in row.keys), row.because] for row in WITHOUT_EFFECT]
    return SUPPORT_PAGE.format(
        matrix=matrix("../ds_lena"),
        areas="\n\n".join(parts),
        refused=table(["feature", "nearest supported choice", "test"], refused),
        without_effect=table(["keys", "why"], without_effect),
    )


def pages() -> dict[Path, str]:
    """The text of each page that is made."""
    return {DOCS / "keys.md": keys_page(), DOCS / "support.md": support_page()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
