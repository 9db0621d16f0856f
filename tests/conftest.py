"""One thread, quiet waiting, and a Hypothesis profile: set before the first test imports torch."""

import os

# Worker threads that spin between parallel regions starve whatever else runs on a small machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from examples import ALL
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

NO_DEVICE = "no CUDA device: run on a machine with one"

# A solve may take long on a busy machine, so no deadline; in CI a failure must come again from the same commit.
settings.register_profile(
    "local", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=100 if ALL else 25
)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=NO_DEVICE))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = sum(NO_DEVICE in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    if skipped:
        terminalreporter.section("NO CUDA DEVICE", sep="!", red=True)
        terminalreporter.line(f"{skipped} tests of the CUDA kernels did not run; emulated on the CPU, the kernels were")
        terminalreporter.line(
            "tested by test_cuda_emulation.py and test_laws_emulated.py, where those run: make check."
        )
