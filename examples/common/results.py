"""What a run prints at its end, and leaves in ``results.json`` and ``training.png``."""

import json
from pathlib import Path
from statistics import median
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_model_param_count
from transformers.training_args import OptimizerNames

import ds_lena

from .arguments import RunArguments
from .history import History, finite, reached_at, write_whole
from .plot import draw


def optimizer_name(args: TrainingArguments) -> str:
    """The optimizer that the DeepSpeed config asks for, the Trainer's where it asks for none."""
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    asked = deepspeed.get_value("optimizer.type") if deepspeed else None
    return asked or OptimizerNames(args.optim).value


def conclude(
    model: str, trainer: Trainer, history: History, run: RunArguments, tokens_per_update: int, unigram: float
) -> None:
    """Print and keep what a run of ``model`` came to. ``unigram``: loss of a unigram model, nats per token."""
    args, logs, output_dir = trainer.args, trainer.state.log_history, Path(str(trainer.args.output_dir))
    held_out = [log["eval_loss"] for log in logs if "eval_loss" in log]
    results: dict[str, Any] = {
        "optimizer": optimizer_name(args),
        "preset": run.optimizer_preset,
        "learning_rate": args.learning_rate,
        "parameters": get_model_param_count(trainer.model),
        "ranks": args.world_size,
        "updates": trainer.state.global_step,
        "tokens_per_update": tokens_per_update,
        "tokens_per_second": tokens_per_update / median(history.seconds) if history.seconds else None,
        "losses": {"held_out_before": held_out[0], "held_out_end": held_out[-1], "unigram": unigram},
    }
    if results["optimizer"] == "LENA":
        results["lena"] = ds_lena.report(trainer)
        print(f"\n{layer_table(results['lena'])}")
    print(f"\nheld-out loss, nats per token: {held_out[0]:.3f} before training, {held_out[-1]:.3f} at the end")
    print(f"loss of a unigram model: {unigram:.3f}")
    if run.target_loss is not None:
        update = reached_at(logs, run.target_loss)
        results["target"] = {"loss": run.target_loss, "reached_at": update}
        print(f"target of {run.target_loss:g} {'not reached' if update is None else f'reached at update {update}'}")
    write_whole(output_dir / "results.json", json.dumps(finite(results), indent=2) + "\n")
    what = f"{model} of {results['parameters'] / 1e6:.1f} M parameters"
    how = f"{run.optimizer_preset or results['optimizer']}, {tokens_per_update:,} tokens per update"
    draw(history.records, unigram, f"{what} with {how}", output_dir / "training.png")
    print(f"\nin {output_dir}: training.png, history.jsonl, results.json, the model")


def layer_table(report: dict[str, Any]) -> str:
    """A ``ds_lena.report`` as text, one line per layer.

    ``factor`` is what the lr is multiplied by (gain x warm-up), ``state`` is in base-batch
    iterations, ``noise scale`` in micro-batches. A warm-up with ``*`` was ended by its cap.
    """
    width = max(len(name) for name in report["layers"])
    lines = [
        f"update {report['update']}: {report['n']} micro-batches averaged, {report['skipped']} updates skipped",
        f"{'layer':{width}}    gain  factor  warm-up    state  noise scale",
        f"{'whole model':{width}}  {report['gain']:6.2f}{report['noise_scale']:38.1f}",
    ]
    for name, layer in report["layers"].items():
        warmup = f"{layer['warmup']:6.2f}{'*' if layer['capped'] else ' '}"
        rates = f"{layer['gain']:6.2f}  {layer['factor']:6.2f}  {warmup}"
        lines.append(f"{name:{width}}  {rates}  {layer['state']:7.0f}  {layer['noise_scale']:11.1f}")
    return "\n".join(lines)
