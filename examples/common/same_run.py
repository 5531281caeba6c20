"""What the result of a run depends on: written beside its checkpoints, and compared where a run goes on.

How long a run is, when it evaluates, logs and saves, and where it writes may change on the way; so they are not here.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .corpus import DataArguments
from .errors import InputError
from .history import write_whole
from .texts import local_files

FILE = "run.json"

_TRAINING = (
    *("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("train_sampling_strategy", "dataloader_drop_last", "accelerator_config", "ignore_data_skip"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("bf16", "fp16", "average_tokens_across_devices", "label_smoothing_factor", "neftune_noise_alpha"),
)
_DEEPSPEED = ("optimizer", "scheduler", "gradient_clipping", "bf16", "fp16", "data_types", "torch_autocast")
_LENGTHS = ("total_steps", "total_num_steps")  # HF compares them with the number of updates, which may grow

Options = dict[str, Any]
"""Name -> a value as JSON has it; null where it was not given."""


def options_of(model: str, model_args: Any, data: DataArguments, args: TrainingArguments) -> Options:
    """All that decides what a run of ``model`` comes to, but for the number of ranks, which its checkpoints tell."""
    found = {"model": model} | asdict(model_args) | _data(data)
    found |= {name: getattr(args, name, None) for name in _TRAINING}
    found |= _deepspeed(args)
    return dict(json.loads(json.dumps(found, default=_plain)))


class Writer(TrainerCallback):
    """Leaves ``options`` in the output directory when training begins: what is refused before leaves nothing."""

    def __init__(self, options: Options) -> None:
        self._options = options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            write_whole(Path(str(args.output_dir)) / FILE, json.dumps(self._options, indent=2) + "\n")


def refuse_another(checkpoint: Path, options: Options) -> None:
    """Raise where the run that ``checkpoint`` belongs to had other options.

    A checkpoint of an older version of the examples has none beside it, and is taken as it is.

    Raises:
        InputError: lists what differs.
    """
    file = checkpoint.absolute().parent / FILE
    if not file.exists():
        return
    try:
        begun = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error
    if told := "; ".join(_differences(begun, options)):
        raise InputError(
            f"{checkpoint} is of another run: {told}. Resume with the options that it was started with, or start "
            "anew in another --output_dir."
        )


def _differences(begun: Options, options: Options) -> Iterator[str]:
    for name in begun | options:
        then, now = (_shown(found.get(name)) for found in (begun, options))
        if then != now:
            yield f"{name}: then {then}, now {now}"


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    return value if isinstance(value, str) else json.dumps(value)


def _data(data: DataArguments) -> Options:
    """The options, whatever folder they were typed in, and the size of local texts: they may have been changed."""
    files = local_files(data.dataset)
    texts = data.dataset if data.dataset == "sotu" else _whole_path(data.dataset)
    tokenizer = data.tokenizer and _whole_path(data.tokenizer)
    size = sum(file.stat().st_size for file in files) if files else None
    return asdict(data) | {"dataset": texts, "bytes of the texts": size, "tokenizer": tokenizer}


def _whole_path(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _deepspeed(args: TrainingArguments) -> Options:
    """What the DeepSpeed config says, with HF's numbers for "auto"; flat, so that a difference is one number."""
    hf_config = getattr(args, "hf_deepspeed_config", None)
    if hf_config is None:
        return {}
    config = hf_config.config
    said = {name: config[name] for name in _DEEPSPEED if name in config}
    said |= {"zero_optimization": {"stage": hf_config.get_value("zero_optimization.stage", 0)}}
    return dict(_flat(said))


def _flat(entries: Mapping[str, Any], prefix: str = "deepspeed.") -> Iterator[tuple[str, Any]]:
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif name not in _LENGTHS and not (name == "enabled" and not value):  # what is off might as well be missing
            yield prefix + name, value


def _plain(value: Any) -> Any:
    """What JSON does not know: enumerations, and HF's own dataclasses."""
    return value.to_dict() if hasattr(value, "to_dict") else str(value)
