"""Places in the server: taken on arrival, kept to the end of the response, given back whatever happens."""

from __future__ import annotations

import pytest

from chunkwise.core import Overloaded
from chunkwise.router.permits import Permits


def test_a_full_server_refuses_and_an_error_gives_the_place_back() -> None:
    permits = Permits(1)
    with pytest.raises(RuntimeError, match="boom"), permits.hold():
        with pytest.raises(Overloaded, match="1 requests are in flight, the limit is 1"), permits.hold():
            pytest.fail("a second place was given")
        raise RuntimeError("boom")
    with permits.hold():
        assert permits.taken == 1
    assert permits.taken == 0
