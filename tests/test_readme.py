"""What the README says of keys, files and commands is what is there."""

import json
import re
from pathlib import Path

from ds_lena.config import KEYS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_of_keys_is_the_one_in_the_code():
    rows = dict(re.findall(r"^\| `(\w+)` \| (`.+?` \| .+?) \| ", README, flags=re.MULTILINE))
    expected = {}
    for name, key in KEYS.items():
        default = list(key.default) if isinstance(key.default, tuple) else key.default
        expected[name] = f"`{json.dumps(default)}` | {key.allowed}"
    assert rows == expected


def test_every_file_that_is_linked_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_make_target_that_is_named_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = set(re.findall(r"\bmake ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"demo", "test"} <= named <= set(targets)


def test_every_configuration_is_in_its_table():
    table = (ROOT / "configs" / "README.md").read_text()
    stages = {f"zero{stage}_bf16_fp32_accumulation" for stage in (2, 3)}  # "zero2_…" in the table
    missing = [f.stem for f in (ROOT / "configs").glob("*.json") if f.stem not in table and f.stem not in stages]
    assert missing == []


def test_no_placeholder_is_left():
    assert re.findall(r"\b[A-Z]+_TABLE\b|TODO|FIXME", README) == []
