"""The records of runs: JSON lines, one file per study. A record is a run that has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..common.history import finite, read, write
from .plan import Study

RESULTS = Path(__file__).with_name("results")
Record = dict[str, Any]


class Records:
    """What has been run so far.

    Raises:
        InputError: a record was made by another definition of its method.
    """

    def __init__(self, folder: Path, studies: dict[str, Study]) -> None:
        self._folder = folder
        self._by_study: dict[str, dict[str, Record]] = {}
        for study in studies.values():
            records = read(self._path(study.name))
            self._by_study[study.name] = {record["job"]: record for record in records}
            self._refuse_stale(study, records)

    def of(self, study: str) -> dict[str, Record]:
        """The records of a study by the name of the job."""
        return self._by_study[study]

    def add(self, study: str, record: Record) -> None:
        """Keep a record. The file is written as a whole: a torn last line of a killed run goes."""
        record = finite(record)
        self._by_study[study][record["job"]] = record
        self._folder.mkdir(parents=True, exist_ok=True)
        write(self._path(study), self._by_study[study].values())

    def _path(self, study: str) -> Path:
        return self._folder / f"{study}.jsonl"

    def _refuse_stale(self, study: Study, records: list[Record]) -> None:
        digests = {method.name: study.digest(method) for method in study.methods}
        stale = {r["method"] for r in records if digests.get(r["method"], r["digest"]) != r["digest"]}
        if stale:
            raise InputError(
                f"{self._path(study.name)}: the records of {', '.join(sorted(stale))} were made by another definition "
                "than that of studies.yaml; give the new one another name, or delete the records"
            )
