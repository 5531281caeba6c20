"""What a run prints at its end and leaves in ``results.json``."""

from typing import Any


def losses(logs: list[dict[str, Any]], unigram_loss: float) -> dict[str, float]:
    """Held-out losses in nats per token: before training, at the end, and of a unigram model.

    ``logs`` is the Trainer's ``state.log_history``, which a checkpoint carries from the very start.
    """
    held_out = [record["eval_loss"] for record in logs if "eval_loss" in record]
    return {
        "held_out_before": held_out[0],
        "held_out_end": held_out[-1],
        "unigram": unigram_loss,
    }


def loss_lines(losses: dict[str, float]) -> str:
    """The losses as text, the way they are compared."""
    below = losses["unigram"] - losses["held_out_end"]
    where = "below" if below > 0 else "ABOVE"
    return (
        f"held-out loss before training  {losses['held_out_before']:.3f} nats per token\n"
        f"loss of a unigram model        {losses['unigram']:.3f}\n"
        f"held-out loss at the end       {losses['held_out_end']:.3f}"
        f"  ({abs(below):.3f} {where} the unigram model)"
    )


def layer_table(report: dict[str, Any]) -> str:
    """A ``ds_lena.report`` as text, one line per layer.

    ``factor`` is what the lr is multiplied by (gain x warm-up), ``state`` is in base-batch
    iterations, ``noise scale`` in micro-batches. A warm-up with ``*`` was ended by its cap.
    """
    width = max(len(name) for name in report["layers"])
    lines = [
        f"update {report['update']}: n = {report['n']} micro-batches averaged, "
        f"base = {report['base']:g}, {report['skipped']} updates skipped",
        f"{'layer':{width}}    gain  factor  warm-up    state  noise scale",
        f"{'whole model':{width}}  {report['gain']:6.2f}{report['noise_scale']:38.1f}",
    ]
    for name, layer in report["layers"].items():
        lines.append(
            f"{name:{width}}  {layer['gain']:6.2f}  {layer['factor']:6.2f}"
            f"  {layer['warmup']:6.2f}{'*' if layer['capped'] else ' '}"
            f"  {layer['state']:7.0f}  {layer['noise_scale']:11.1f}"
        )
    return "\n".join(lines)
