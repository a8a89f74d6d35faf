"""Clients: what they place is what can be placed."""

from __future__ import annotations

import pytest

import shmbroker


@pytest.mark.parametrize("shape", [(2.5,), (-1,), (1 << 62, 4), ("3",)])
def test_shapes_that_are_none_are_refused(client: shmbroker.Client, shape: tuple[int, ...]) -> None:
    with pytest.raises(shmbroker.BadInput, match="shape"):
        client.empty(shape)
    assert client.empty(5).shape == (5,)
