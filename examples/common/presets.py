"""`--optimizer-preset`: the optimizer entry of the DeepSpeed config, swapped for a rival's."""

import json
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = ("lena", "adascale", "linear-scaling", "sqrt-scaling", "lamb", "lars", "lena-lamb", "adamw")

_WITH_BETAS = ("adamw", "lamb")  # base rules that have betas and eps
_KEPT = ("no_decay", "exclude", "base_batch_size")  # what belongs to the model and the batch, not to the method
_FROM_ARGUMENTS = {"lr": "learning_rate", "weight_decay": "weight_decay"}

HELP = (
    "Train with this optimizer instead of the one in the DeepSpeed config: torch's adamw, or that of "
    "configs/NAME.json. With lamb, lars and adamw the learning rate is for the whole batch of an update."
)


def entry(preset: str, replaced: dict[str, Any], no_decay: list[str]) -> dict[str, Any]:
    """The optimizer entry of ``preset``, with "auto" for all that HF fills from its arguments.

    Args:
        replaced: the entry whose place it takes; of LENA's, what it says of the model and the batch is kept.
        no_decay: patterns of the names that are not decayed, where ``replaced`` has none.
    """
    params = _params(preset)
    autos = ("lr", "weight_decay", *(("betas", "eps") if params.get("base", "adamw") in _WITH_BETAS else ()))
    if preset == "adamw":  # DeepSpeed's own name for torch's; it decays all that HF hands over, which is one flat list
        return {"type": "AdamW", "params": {"torch_adam": True} | dict.fromkeys(autos, "auto")}
    params.pop("total_steps", None)  # HF's count
    kept = (replaced.get("params") or {}) if replaced.get("type") == "LENA" else {}
    kept = {"no_decay": no_decay} | {key: kept[key] for key in _KEPT if key in kept}
    return {"type": "LENA", "params": params | dict.fromkeys(autos, "auto") | kept}


def defaults(preset: str) -> dict[str, float]:
    """What configs/NAME.json says of HF's arguments."""
    params = _params(preset)
    return {name: params[key] for key, name in _FROM_ARGUMENTS.items() if key in params}


def _params(preset: str) -> dict[str, Any]:
    if preset == "adamw":
        return {}
    return dict(json.loads((CONFIGS / f"{preset}.json").read_text())["optimizer"]["params"])
