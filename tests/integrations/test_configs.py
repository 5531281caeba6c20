"""Every file in configs/ trains: one update on two ranks. The HF ones are filled in as HF Trainer would.

Stock optimizers take torch's AdamW, since DeepSpeed would compile its own.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_lena
from tests.integrations._engines import engine
from tests.integrations._ranks import Ranks

CONFIGS = Path(__file__).parents[2] / "configs"
FILLED_BY_HF = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "enabled": True,
    "lr": 1e-3,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "weight_decay": 0.1,
}


def filled(entries: dict[str, Any]) -> dict[str, Any]:
    """The configuration with each "auto" replaced."""
    return {
        key: filled(value) if isinstance(value, dict) else FILLED_BY_HF[key] if value == "auto" else value
        for key, value in entries.items()
    }


def one_update(entries: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The report, and whether the base rule took in the gradient."""
    with engine(entries) as made:
        for _ in range(made.gradient_accumulation_steps()):
            x = torch.randn(made.train_micro_batch_size_per_gpu(), 4)
            made.backward(made(x, x))
            made.step()
        buffers = [
            value for state in made.basic_optimizer.state.values() for key, value in state.items() if key != "step"
        ]
        return ds_lena.report(made), any(bool(buffer.any()) for buffer in buffers)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.json")), ids=lambda file: file.stem)
def test_a_configuration_trains(file: Path, ranks: Ranks, tmp_path: Path) -> None:
    entries = filled(json.loads(file.read_text()))
    if file.stem.startswith("hf_"):
        entries["optimizer"]["params"]["total_steps"] = 100  # HF Trainer knows it
    if entries["optimizer"]["type"] != "LENA":
        entries["optimizer"]["params"]["torch_adam"] = True
        entries["noise_scale"]["log"] = str(tmp_path / "noise.jsonl")
    results = ranks.run(one_update, entries)
    assert all(took_gradient for _, took_gradient in results)
    reports = [report for report, _ in results]
    assert reports[0] == reports[1]
    assert reports[0]["update"] == 1
