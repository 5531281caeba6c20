"""The documents are true of the code: pages made from tables, links, commands, and the snippets of the README."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from ds_lena.config import LenaConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"))
PAGES = GENERATE["pages"]()


def snippets(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_is_what_its_table_makes(path):
    assert path.read_text() == PAGES[path], "run `make docs`"


def test_the_readme_has_the_matrix():
    assert GENERATE["matrix"]() in README


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130


def anchors(document):
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        path, _, anchor = link.partition("#")
        to = (document.parent / path) if path else document
        if not link.startswith("http") and not (to.exists() and (not anchor or anchor in anchors(to))):
            broken.append(link)
    assert broken == []


def test_every_make_target_that_is_named_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = set(re.findall(r"\bmake ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"demo", "test"} <= named <= set(targets)


def test_every_file_on_the_map_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    names = re.findall(r"`([\w/.]+\.py|[\w/]+/)`", text)
    assert len(names) > 30
    roots = (ROOT, ROOT / "ds_lena", ROOT / "ds_lena" / "integrations" / "deepspeed")
    assert [name for name in names if not any((root / name).exists() for root in roots)] == []


def test_every_configuration_is_in_its_table():
    table = (ROOT / "configs" / "README.md").read_text()
    stages = {f"zero{stage}_bf16_fp32_accumulation" for stage in (2, 3)}  # "zero2_…" in the table
    missing = [f.stem for f in (ROOT / "configs").glob("*.json") if f.stem not in table and f.stem not in stages]
    assert missing == []


def test_the_json_that_the_readme_adds_is_allowed():
    (diff,) = snippets("diff")
    added = "".join(line[1:] for line in diff.splitlines() if line.startswith("+"))
    entry = json.loads("{" + added.strip().rstrip(",") + "}")["optimizer"]
    assert entry["type"] == "LENA"
    LenaConfig.from_keys(entry["params"])


def test_the_readme_s_plain_pytorch_trains():
    (code,) = [code for code in snippets("python") if "ds_lena.LENA(" in code]
    model = torch.nn.Linear(2, 1)
    before = model.weight.detach().clone()
    windows = [[torch.randn(4, 2) for _ in range(3)] for _ in range(2)]
    names = {"model": model, "windows": windows, "loss_of": lambda batch: model(batch).square().mean()}
    exec(code, names)
    assert names["optimizer"].state_dict()["lena"]["update"] == 2
    assert not torch.equal(model.weight, before)
