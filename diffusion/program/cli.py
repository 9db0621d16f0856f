"""The command deq-ddim: runs what its options ask for, and turns every failure into one line and an exit code."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .options import build_parser
from .parser import MISUSED, OK, parse

FAILED, INTERRUPTED = 1, 130
MEMORY = (
    r"(can't|cannot|unable to) allocate memory|Storage size calculation overflowed|out of memory"  # as torch has it
)
MISTAKES = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError)  # of what the user gave
FAILURES = (OSError, ImportError, RuntimeError, ArithmeticError, MemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; argv None is the command line."""
    try:
        args = parse(build_parser(), sys.argv[1:] if argv is None else argv)
    except SystemExit as end:
        return int(end.code or OK)
    if argv is None and args.threads != 1 and args.command != "doctor":  # which shows the settings it finds
        _wait_passively()
    try:
        return _run(args)
    except KeyboardInterrupt as interrupt:
        return _end(f"interrupted {interrupt}".rstrip(), INTERRUPTED)
    except BrokenPipeError:  # whoever read the summary is gone; nor can Python's own last flush write it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (*MISTAKES, *FAILURES) as error:
        if args.debug:
            raise
        code = MISUSED if isinstance(error, MISTAKES) else FAILED
        return _end(f"error: {_line(error)}", code)
    except Exception as error:  # a fault of the program's own
        if args.debug:
            raise
        return _end(f"error: {type(error).__name__}: {_line(error)} (--debug shows where)", FAILED)


def _run(args: argparse.Namespace) -> int:
    from .machine import threads
    from .summary import table

    with threads(args.threads):
        summary = _commands()[args.command](args)
    from .output import finite

    print(json.dumps(finite(summary), indent=1) if args.json else table(summary), flush=True)
    if summary.get("agrees", True):
        return OK
    return _end("error: parallel and sequential sampling differ by more than they may", FAILED)


def _commands() -> dict[str, Callable[[argparse.Namespace], dict[str, Any]]]:
    """Return the commands by name; imported here, because they import torch."""
    from .commands import run_sample
    from .demo import run_demo
    from .doctor import run_doctor
    from .editing import run_edit
    from .fitting import run_classifier, run_fit
    from .inversion import run_invert
    from .reproduction.command import run_report

    return {
        "demo": run_demo, "sample": run_sample, "invert": run_invert, "edit": run_edit, "fit": run_fit,
        "report": run_report, "classifier": run_classifier, "doctor": run_doctor,
    }  # fmt: skip


def _wait_passively() -> None:
    """Have idle OpenMP threads sleep: those that spin starve other work, and on a busy machine each other.

    The variable is read when torch is loaded. Where that has happened, the program starts once more in its place.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        if "torch" in sys.modules:
            os.execv(sys.executable, sys.orig_argv)


def _end(line: str, code: int) -> int:
    sys.stderr.write(f"deq-ddim: {line}\n")
    return code


def _line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    allocators = isinstance(error, RuntimeError) and re.search(MEMORY, str(error))
    if isinstance(error, MemoryError) or allocators:
        return "the memory is full: fewer images (--count), or fewer at a time (--batch), need less"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
