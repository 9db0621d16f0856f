"""The parser of the command line: one line for a wrong option, with what may have been meant; completion in a shell."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

OK, MISUSED = 0, 2  # exit codes
NO_CLASS = "none"  # of a label
SHELLS = ("bash", "zsh", "tcsh")


class Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"deq-ddim: error: {message}{self._meant(message)} (see {self.prog} --help)\n")
        raise SystemExit(MISUSED)

    def _meant(self, message: str) -> str:
        """What the mistaken word of a message resembles."""
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice:
            return guess(choice[1], re.findall(r"[\w-]+", choice[2]))
        unknown = re.search(r"unrecognized arguments: (--?[^\s=]+)", message)
        return guess(unknown[1], self._option_string_actions) if unknown else ""


def guess(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean …?" for the known word that a mistyped one is nearest to, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line; called bare it prints the help.

    Raises:
        SystemExit: there is nothing to do, or the options are wrong, which is said.
    """
    if not argv:
        parser.print_help()
        raise SystemExit(OK)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        commands(parser)[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def commands(parser: argparse.ArgumentParser) -> dict[str, Parser]:
    """Return the parsers of the commands, by name."""
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


class Version(argparse.Action):
    """Prints the version, which is only looked up then: that imports torch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, help="print the version and exit", **options)

    def __call__(self, *_: object) -> NoReturn:
        from pydeqsolve import __version__

        print(f"deq-ddim {__version__}")
        raise SystemExit(OK)


class Completion(argparse.Action):
    """Prints a script with which a shell completes commands, options and paths."""

    def __init__(self, **options: Any) -> None:
        text = f"print a script that completes this command in {', '.join(SHELLS)}, and exit"
        super().__init__(choices=SHELLS, metavar="SHELL", help=text, **options)

    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: Any, __: object = None) -> NoReturn:
        try:
            import shtab
        except ImportError:
            parser.error("--completion: shtab writes the script: pip install 'pydeqsolve[completion]'")
        for command in commands(parser).values():
            for action in command._actions:
                if action.metavar in ("FOLDER", "PATH"):
                    action.complete = shtab.DIRECTORY if action.metavar == "FOLDER" else shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell))
        raise SystemExit(OK)


def whole(least: int) -> Callable[[str], int]:
    """Return a reader of integers from `least` to 2^62."""

    def integer(text: str) -> int:
        value = int(text)
        if not least <= value <= 2**62:
            raise argparse.ArgumentTypeError(f"an integer of at least {least} is required, got {text}")
        return value

    return integer


def positive(text: str) -> float:
    """Return the positive number that a text says."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a positive number is required, got {text}")
    return value


def share(text: str) -> float:
    """Return the number from 0 to 1, both excluded, that a text says."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"a number between 0 and 1 is required, got {text}")
    return value


def share_or_all(text: str) -> float:
    """Return the number above 0, to 1, that a text says."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"a number above 0, to 1, is required, got {text}")
    return value


def finite_number(text: str) -> float:
    """Return the finite number that a text says."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"a finite number is required, got {text}")
    return value


def label(text: str) -> int | None:
    """Return the class that a text names by its number; None is no class."""
    if text != NO_CLASS and not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"a class by its number, from 0 on, or {NO_CLASS} is required, got {text}")
    return None if text == NO_CLASS else int(text)


def numbers(text: str) -> list[float]:
    """Return the numbers that a text lists, with commas between them; integers where all are."""
    parts = [part.strip() for part in text.split(",")]
    try:
        return [int(part) for part in parts]
    except ValueError:
        pass
    try:
        return [float(part) for part in parts]
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers with commas between them are required, got {text!r:.60}") from None
