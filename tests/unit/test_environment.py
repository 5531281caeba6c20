"""What `make` sets up: versions from a lock, and torch's extensions beside them."""

import os
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from torch.utils.file_baton import FileBaton

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / ".ci").glob("lock-py*.txt"))


def run(*command, **environment):
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=60
    )


# -- locks ------------------------------------------------------------------------------------------------------------


def pinned(lock):
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "a line that is not NAME==VERSION"
    return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_has_a_version_within_the_range_of_every_requirement(lock):
    versions = pinned(lock)
    for requirement in map(Requirement, requires("ds_lena")):
        assert requirement.specifier.contains(versions[requirement.name]), requirement
    assert {"pip", "setuptools", "wheel", "fairscale", "timm"} <= set(versions)


def make_with_python(tmp_path, version):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {version}\n")
    python.chmod(0o755)
    return run(
        "make", "--no-print-directory", "--dry-run", "lint", f"PYTHON={python}", f"VENV={tmp_path}/env", MAKEFLAGS=""
    )


def test_a_python_without_a_lock_is_refused_in_one_line(tmp_path):
    done = make_with_python(tmp_path, "3.4")
    (line,) = done.stderr.splitlines()
    assert done.returncode != 0 and "Python 3.4" in line
    assert f"PYTHON=python{LOCKS[-1].stem.removeprefix('lock-py')}" in line


def test_a_python_with_a_lock_gets_its_versions(tmp_path):
    done = make_with_python(tmp_path, "3.11")
    installs = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert done.returncode == 0 and installs
    assert all("--constraint .ci/lock-py3.11.txt" in line for line in installs)


# -- torch's extensions -----------------------------------------------------------------------------------------------


@pytest.fixture
def lock(tmp_path):
    """Where torch puts the lock of an extension, in an environment whose name a shell or a pattern could misread."""
    folder = tmp_path / "an [env]*" / "torch_extensions" / "some_op"
    folder.mkdir(parents=True)
    return folder / "lock"


def in_env(lock, *command):
    return run(".ci/in-env", str(lock.parents[2]), *command)


def test_a_lock_that_nobody_holds_is_said_and_removed(lock):
    build = f"import os, torch.utils.file_baton as file; file.FileBaton({str(lock)!r}).try_acquire(); os._exit(1)"
    run(sys.executable, "-c", build)
    assert lock.exists()
    done = in_env(lock, "true")
    assert done.returncode == 0 and str(lock) in done.stderr
    assert not lock.exists()


def test_a_lock_of_a_build_that_runs_stays(lock):
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    done = in_env(lock, "true")
    assert lock.exists()
    assert done.returncode == 0 and done.stderr == ""
    baton.release()


def test_a_command_finds_its_environment_and_extensions_inside_of_it(lock):
    folder = lock.parents[2]
    done = in_env(lock, "sh", "-c", 'echo "$PATH"; echo "$TORCH_EXTENSIONS_DIR"; exit 3')
    path, extensions = done.stdout.splitlines()
    assert path.split(os.pathsep)[0] == str(folder / "bin")
    assert extensions == str(folder / "torch_extensions")
    assert done.returncode == 3
