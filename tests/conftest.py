"""What all tests share: hypothesis profiles, no network, and `close`.

HYPOTHESIS_PROFILE=thorough draws many more examples; CI, where set, makes them the same every time.
The tolerances of `close`, by dtype and with their reason, are in `scripts/op_table.py`.
"""

import os
import socket

import pytest
from hypothesis import settings
from op_table import TOLERANCE, error

settings.register_profile("dev", max_examples=20, deadline=None)
settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


def close(actual, expected, dtype, scale=0.0):
    """Assert that the arrays agree as well as computing in `dtype` allows."""
    found, allowed = error(actual, expected, scale), TOLERANCE[str(dtype)]
    assert found <= allowed, f"error {found:.1e}, allowed in {dtype}: {allowed:.0e}"


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """No test reaches for the network."""

    def refuse(self, address):
        raise AssertionError(f"a test tried to connect to {address}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket.socket, "connect_ex", refuse)
        yield
