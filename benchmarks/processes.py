"""Runs of the command line in processes of their own, whose words go to a log."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

Threads = Annotated[int | None, typer.Option(min=1, help="Of each; default the cores, shared out.")]
"""The option for how many threads each of the processes has."""


def shared_out(jobs: int) -> int:
    """Threads of each of `jobs` processes that run at once."""
    return max(1, (os.cpu_count() or 1) // jobs)


def run_commands(commands: Sequence[Sequence[str]], log: Path, threads: int, mode: str = "w") -> str:
    """Run commands one after the other until one fails.

    Args:
        log: where their output goes. threads: of each. mode: `w` begins the log anew, `a` goes on with it.

    Returns:
        What went wrong in a line, empty if nothing did.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open(mode, encoding="utf-8") as stream:
        for command in commands:
            done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
            if done.returncode:
                return f"failed with exit code {done.returncode}, see {log}"
    return ""
