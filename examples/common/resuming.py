"""What a run goes on from: the newest whole checkpoint, if it was made with the same options.

The options that the result depends on lie beside the checkpoints, in ``options.json``. How long a run is, when it
evaluates, logs and saves, and where it writes may change on the way; so they are not in it.
"""

import json
import re
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from .corpus import DataArguments
from .errors import InputError
from .history import write_whole
from .texts import local_files

FILE = "options.json"

_TRAINING = (
    *("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("train_sampling_strategy", "dataloader_drop_last", "accelerator_config", "ignore_data_skip"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("bf16", "fp16", "average_tokens_across_devices", "label_smoothing_factor", "neftune_noise_alpha"),
)
_DEEPSPEED = ("optimizer", "scheduler", "gradient_clipping", "data_types", "torch_autocast")

Options = dict[str, Any]
"""Name -> a value as JSON has it."""


def options_of(model: str, model_args: Any, data: DataArguments, args: TrainingArguments) -> Options:
    """All that decides what a run of ``model`` comes to, but for the number of ranks, which its checkpoints tell."""
    config = args.hf_deepspeed_config.config if getattr(args, "hf_deepspeed_config", None) else {}
    size = sum(file.stat().st_size for file in local_files(data.dataset))
    found = {"model": model, **asdict(model_args), **asdict(data), "bytes of local texts": size}
    found |= {name: getattr(args, name, None) for name in _TRAINING}
    found |= {f"DeepSpeed's {name}": config.get(name) for name in _DEEPSPEED}
    return dict(json.loads(json.dumps(found, default=lambda value: getattr(value, "to_dict", value.__str__)())))


def keep_options(output_dir: Path, options: Options) -> None:
    write_whole(output_dir / FILE, json.dumps(options, indent=2) + "\n")


def choose_checkpoint(args: TrainingArguments, options: Options) -> str | None:
    """What ``--resume_from_checkpoint`` stands for. All ranks take what the first one found.

    Raises InputError where no whole checkpoint of a run with these options is, and where ``output_dir`` holds another
    run's checkpoints: ``latest`` could later take one of them for this run's.
    """
    asked, output_dir = args.resume_from_checkpoint, Path(str(args.output_dir))
    checkpoint = None
    if asked is not None:
        # With `save_on_each_node` the other nodes' files are elsewhere.
        checkpoint = find_checkpoint(asked, output_dir, None if args.save_on_each_node else args.world_size)
        refuse_another(checkpoint, options)
    if numbered(output_dir) and (checkpoint is None or checkpoint.resolve().parent != output_dir.resolve()):
        raise InputError(
            f"{output_dir} holds {numbered(output_dir)[0].name} of an earlier run: go on with --resume_from_checkpoint "
            "latest, give another --output_dir, or delete its checkpoints"
        )
    return broadcast_object_list([checkpoint and str(checkpoint)])[0]


def refuse_another(checkpoint: Path, options: Options) -> None:
    """Raise InputError where the options beside ``checkpoint`` are others; it lists them."""
    file = checkpoint.absolute().parent / FILE
    begun = json.loads(file.read_text()) if file.exists() else options
    names = [name for name in begun | options if begun.get(name) != options.get(name)]
    if told := [f"{name}: then {json.dumps(begun.get(name))}, now {json.dumps(options.get(name))}" for name in names]:
        raise InputError(
            f"{checkpoint} is of another run: {'; '.join(told)}. Resume with the options that it was started with, or "
            "start anew in another --output_dir."
        )


def find_checkpoint(asked: str, output_dir: Path, ranks: int | None) -> Path:
    """``asked`` is a path, or ``latest`` for the newest whole one in ``output_dir``; ``ranks`` have written it."""
    for folder in numbered(output_dir) if asked == "latest" else [Path(asked)]:
        if _is_whole(folder, ranks):
            return folder
    by = f" of {ranks} rank(s)" if ranks else ""
    raise InputError(f"{output_dir if asked == 'latest' else asked}: no complete checkpoint{by} to resume from")


def numbered(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder, complete or not, the newest first."""
    found = [folder for folder in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(found, key=lambda folder: int(folder.name.split("-")[1]), reverse=True)


def _is_whole(folder: Path, ranks: int | None) -> bool:
    """Whether all ranks were done with writing this checkpoint.

    The first rank writes the Trainer's state last, but does not wait for the others' random states. What torch writes
    is a zip file, whose table of contents comes at its end.
    """
    random_states = len(list(folder.glob("rng_state*.pth")))
    if not (folder / TRAINER_STATE_NAME).is_file() or random_states != (ranks or random_states):
        return False
    return all(zipfile.is_zipfile(file) for file in folder.rglob("*") if file.suffix in (".pt", ".pth"))
