"""Two hosts, and ranks that die: the numbers are those of one host, and a job without one of its ranks ends."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.command import free_port, remove_buffers
from tests.helpers.marks import rest
from tests.integrations._programs import ON_CPU, SCRIPTS, attempt, environment, launcher_of_a_host
from tests.integrations._ranks import WORLD, Ranks
from tests.integrations.scripts.over_ranks import STAGES, main

AXES = tuple(STAGES)
PLACES = ("backward", "statistics", "step")
BOUND = 30.0  # seconds from the death of a rank to the end of the job; without load it is about two
PATIENCE = 300.0
SCRIPT = str(SCRIPTS / "over_ranks.py")


@dataclass(frozen=True)
class Host:
    """`inside`: what a command that runs there begins with."""

    address: str
    inside: Sequence[str] = ()
    interface: str = "lo"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Two network namespaces with a cable between them. Where that is not allowed, this machine under two launchers."""
    names = [f"lena{os.getpid() % 10_000}{end}" for end in "ab"]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for number, name in enumerate(names, start=1):
            _ip("-n", name, "addr", "add", f"10.77.77.{number}/24", "dev", name)
            _ip("-n", name, "link", "set", name, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        hosts = [Host(f"10.77.77.{i}", ("ip", "netns", "exec", name), name) for i, name in enumerate(names, start=1)]
    except (OSError, subprocess.CalledProcessError):
        hosts = [Host("127.0.0.1")] * 2
    try:
        yield hosts
    finally:
        for name in names:
            with suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def run_on(hosts: Sequence[Host], folder: Path, *arguments: str) -> list[tuple[int, str]]:
    """The exit status and the output of the launcher on each host, with one rank there."""
    hostfile, port = folder / "hostfile", free_port()
    hostfile.write_text("".join(f"host{number} slots=1\n" for number in range(len(hosts))))
    processes = []
    for number, host in enumerate(hosts):
        command = launcher_of_a_host(hostfile, number, hosts[0].address, port)
        processes.append(
            subprocess.Popen(
                [*host.inside, *command, SCRIPT, str(folder), *arguments],
                env=environment(ON_CPU | {"GLOO_SOCKET_IFNAME": host.interface}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        return [(process.wait(PATIENCE), process.communicate()[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        remove_buffers(port)


def one_host(folder: str) -> None:
    for axis in AXES:
        main(Path(folder), axis, place=None)


def test_two_hosts_come_to_the_numbers_of_one(ranks: Ranks, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    ranks.run(one_host, str(one))
    with two_hosts() as hosts:
        for status, output in run_on(hosts, two, ",".join(AXES)):
            assert status == 0, output[-4000:]
    files = sorted(one.glob("*.pt"))
    assert len(files) == len(AXES) * WORLD
    for file in files:
        (wanted, wanted_weights), (report, weights) = torch.load(file), torch.load(two / file.name)
        assert report == wanted and report["update"] == 3, file.name
        assert all(torch.equal(a, b) for a, b in zip(weights, wanted_weights, strict=True)), file.name


DEATHS = [("zero2", "backward"), ("tensor", "statistics"), ("pipeline", "step")]


@pytest.mark.parametrize(("axis", "place"), rest([(a, p) for a in AXES for p in PLACES], DEATHS))
def test_a_job_ends_soon_after_a_rank_has_died(tmp_path: Path, axis: str, place: str) -> None:
    ended = attempt(SCRIPT, str(tmp_path), axis, place)
    assert time.time() - (tmp_path / "died").stat().st_mtime < BOUND
    assert ended.returncode != 0 and "exits with return code = 1" in ended.stdout + ended.stderr
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.full
def test_a_job_on_two_hosts_ends_soon_after_a_rank_of_one_has_died(tmp_path: Path) -> None:
    with two_hosts() as hosts:
        (first, told), (second, _) = run_on(hosts, tmp_path, "zero2", "statistics")
    assert time.time() - (tmp_path / "died").stat().st_mtime < BOUND
    assert first != 0 and second != 0
    assert "Connection closed by peer" in told
