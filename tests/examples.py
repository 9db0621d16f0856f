"""How many random cases a property is tried with: all in `make check` and in .ci/run, a quarter in `make test`."""

import os

from hypothesis import settings

ALL = os.environ.get("RANDOM_CASES") == "all" or bool(os.environ.get("CI"))


def examples(number: int) -> settings:
    """Hypothesis settings with `number` cases, a quarter of them where not all are asked for."""
    return settings(max_examples=number if ALL else max(1, number // 4))
