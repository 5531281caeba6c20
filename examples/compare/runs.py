"""What has been run: a journal file of optuna's for each study, and in it a study of optuna's for each stage."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from ..common.errors import InputError
from .plan import Method, Study

RESULTS = Path(__file__).with_name("results")
_RANDOM_TRIALS = 5
optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Stage:
    """The trials of a method, with seed 0; or its runs with the other seeds, at the settings that trials chose."""

    study: Study
    method: Method
    tunes: bool

    @property
    def name(self) -> str:
        return f"{self.method.name}/{'trials' if self.tunes else 'seeds'}"

    @property
    def size(self) -> int:
        """How many runs it has when it is complete."""
        if not self.tunes:
            return len(self.study.seeds)
        return self.study.trials if self.method.search and self.study.settings_of is None else 0

    @property
    def split(self) -> str:
        return "validation" if self.tunes else self.study.split


def stages(studies: Iterable[Study]) -> list[Stage]:
    """The stages of these studies and of those that they depend on, in an order in which they can be run."""
    needed: dict[str, Study] = {}

    def add(study: Study | None) -> None:
        if study is not None:
            add(study.base)
            add(study.settings_of)
            needed[study.name] = study

    for study in studies:
        add(study)
    all_stages = (Stage(s, method, tunes) for s in needed.values() for method in s.methods for tunes in (True, False))
    return [stage for stage in all_stages if stage.size]


class Runs:
    """The runs in a folder. Several processes may share it: what one writes to a journal, the others read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._storages: dict[Path, JournalStorage] = {}

    def of(self, stage: Stage) -> list[FrozenTrial]:
        """The runs of a stage, in the order in which they began."""
        study = self._load(stage)
        return study.get_trials(deepcopy=False) if study else []

    def settings(self, stage: Stage) -> dict[str, Any] | None:
        """The task's settings, the single worker's lr and beta2, the method's, and what its trials chose.

        None while they depend on runs that have not ended. Those of trials lack what the trial itself tries.
        """
        study, method = stage.study, stage.method
        found = dict(study.task.settings)
        if study.base is not None:
            single = study.base.methods[0]
            tuned = self._choice(Stage(study.base, single, tunes=True))
            if tuned is None:
                return None
            tuned = {**single.settings, **tuned}
            found |= {key: tuned[key] for key in ("lr", "beta2") if key in tuned}
        found |= method.settings
        if stage.tunes:
            return {key: value for key, value in found.items() if key not in method.search}
        chosen = self._choice(Stage(study.chooser, method, tunes=True))
        return None if chosen is None else found | chosen

    def begin(self, stage: Stage, settings: dict[str, Any]) -> tuple[optuna.Study, optuna.Trial]:
        """Begin the next run of a stage. Optuna suggests what a trial tries; other runs have an attribute `seed`."""
        begun = self.of(stage)
        number = zlib.crc32(f"trial {len(begun)}".encode())  # seeds 0, 1, 2, … would draw alike
        sampler = TPESampler(seed=number, n_startup_trials=_RANDOM_TRIALS, multivariate=True, constant_liar=True)
        storage = self._storage(self._path(stage.study))
        study = optuna.create_study(study_name=stage.name, storage=storage, sampler=sampler, load_if_exists=True)
        if not begun:
            study.set_user_attr("made_with", _made_with(stage, settings))
        trial = study.ask(dict(stage.method.search) if stage.tunes else None)
        if not stage.tunes:
            seeds = {run.user_attrs["seed"] for run in begun}
            trial.set_user_attr("seed", next(seed for seed in stage.study.seeds if seed not in seeds))
        return study, trial

    def check(self, stage: Stage) -> None:
        """Raise InputError where the runs of a stage were made by another definition than the present one.

        So they are, too, where trials were added, or taken away, after what depends on their choice had been run.
        """
        runs, settings = self.of(stage), self.settings(stage)
        if not runs or settings is None:
            return
        then, now = self._load(stage).user_attrs["made_with"], _made_with(stage, settings)
        then["search"], now["search"] = runs[-1].distributions, dict(stage.method.search) if stage.tunes else {}
        old, new = ({key: told.get(key, "nothing") for key in {**then, **now}} for told in (then, now))
        changed = [f"{key} {old[key]}, which would be {new[key]} now" for key in old if old[key] != new[key]]
        if changed:
            raise InputError(
                f"{self._path(stage.study)}: {stage.name} was run with {changed[0]}; give the new definition another "
                "name, put the old one back, or delete the runs (optuna.delete_study, or the whole file)"
            )

    def tidy(self, study: Study) -> None:
        """Rewrite the file of a study, a line for each run that has ended.

        What an interrupted process left there goes, and its runs begin anew.
        """
        path = self._path(study)
        if not path.exists():
            return
        Path(f"{path}.lock").unlink(missing_ok=True)
        draft = path.with_suffix(".draft")
        draft.unlink(missing_ok=True)
        old, new = self._storage(path), JournalStorage(JournalFileBackend(str(draft)))
        for name in optuna.get_all_study_names(old):
            stage = optuna.load_study(study_name=name, storage=old)
            if ended := [run for run in stage.trials if run.state.is_finished()]:
                whole = optuna.create_study(study_name=name, storage=new)
                whole.set_user_attr("made_with", stage.user_attrs["made_with"])
                whole.add_trials(ended)
        text = draft.read_text()
        process = json.loads(text.partition("\n")[0])["worker_id"] if text else ""
        draft.write_text(text.replace(process, ""))  # so that the same runs make the same file
        draft.replace(path)
        del self._storages[path]

    def _choice(self, stage: Stage) -> dict[str, Any] | None:
        """What trials have chosen; None while some are missing, nothing where there are none."""
        ended = [run for run in self.of(stage) if run.state.is_finished()][: stage.size]
        if len(ended) < stage.size:
            return None
        return min(ended, key=lambda run: math.inf if loss(run) is None else loss(run)).params if ended else {}

    def _load(self, stage: Stage) -> optuna.Study | None:
        path = self._path(stage.study)
        try:
            return optuna.load_study(study_name=stage.name, storage=self._storage(path)) if path.exists() else None
        except KeyError:
            return None

    def _path(self, study: Study) -> Path:
        return self._folder / f"{study.name}.jsonl"

    def _storage(self, path: Path) -> JournalStorage:
        if path not in self._storages:
            try:
                self._storages[path] = JournalStorage(JournalFileBackend(str(path)))
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{path}: no journal of optuna's: {error}; mend it, or delete it") from error
        return self._storages[path]


def loss(run: FrozenTrial) -> float | None:
    """The last one; None where the run has not ended, or diverged, which is why it was pruned."""
    return run.value if run.state is TrialState.COMPLETE else None


def _made_with(stage: Stage, settings: dict[str, Any]) -> dict[str, Any]:
    study = stage.study
    told = {"task": str(study.task), "n": study.n, "split": stage.split, "optimizer": stage.method.optimizer}
    return json.loads(json.dumps(told | settings))
