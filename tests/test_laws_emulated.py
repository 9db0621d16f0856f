"""The laws of test_laws.py once more, with the CUDA kernels, emulated on the CPU, as the backend."""

import pytest
from emulation.backend import emulated_backend
from test_laws import *  # noqa: F403 - its tests become tests of this file

pytestmark = pytest.mark.check


@pytest.fixture(autouse=True, scope="module")
def on_the_emulated_kernels():
    with emulated_backend() as kernels:
        before = kernels.launches
        yield
        assert kernels.launches > before
