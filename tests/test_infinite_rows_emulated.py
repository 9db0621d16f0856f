"""The tests of test_infinite_rows.py once more, with the CUDA kernels, emulated on the CPU, as the backend."""

import pytest
from test_infinite_rows import *  # noqa: F403 - its tests become tests of this file
from test_infinite_rows import Backend

pytestmark = pytest.mark.check


@pytest.fixture(scope="module")
def backend() -> Backend:
    return Backend("emulated")
