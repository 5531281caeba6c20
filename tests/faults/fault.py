"""One fault of one rank, drawn at random."""

from __future__ import annotations

import random
from dataclasses import dataclass

PLACES = ("backward", "all-reduce", "step", "save", "after a file", "load", "anywhere")


@dataclass(frozen=True)
class Fault:
    """Rank `rank` of `world` is killed by SIGKILL in an update of number `update`, at `place`. None: it is not.

    At "save" it dies within its first file, and at "after a file" right after that. At "full disk" it is not killed: it
    cannot write its files any more, at "read-only" no rank may write into the folder, and at "stall" it stops for good.

    `one_tag`: each checkpoint overwrites the one before. The run goes on with `next_world` ranks at `next_stage`.
    """

    stage: int = 2
    precision: str = "fp32"
    world: int = 2
    place: str | None = None
    update: int = 5
    rank: int = 1
    one_tag: bool = False
    next_world: int = 2
    next_stage: int = 2
    seed: int = 0

    @property
    def moves(self) -> bool:
        """Whether the run goes on in another layout."""
        return (self.stage, self.world) != (self.next_stage, self.next_world)


def draw(seed: int) -> Fault:
    """The fault that a seed decides. Every second run goes on elsewhere."""
    chosen = random.Random(seed)
    stage, place = chosen.randrange(4), PLACES[seed % len(PLACES)]
    elsewhere = (chosen.choice([1, 2, 4]), chosen.randrange(4)) if chosen.random() < 0.5 else (2, stage)
    writes = place in ("save", "after a file")
    return Fault(
        stage=stage,
        place=place,
        update=chosen.choice([3, 5]) if writes else chosen.randrange(2, 6),
        rank=0 if writes and stage == 0 else chosen.randrange(2),  # rank 1 writes nothing there
        one_tag=chosen.random() < 0.4,
        next_world=elsewhere[0],
        next_stage=elsewhere[1],
        seed=seed,
    )
