"""Joining a broker: what is said where there is none."""

from __future__ import annotations

import os

import pytest

import shmbroker


def test_a_private_broker_that_has_ended_is_not_to_be_started_by_hand() -> None:
    with shmbroker.local_broker() as broker:
        pass
    with pytest.raises(
        shmbroker.BrokerUnreachable, match=rf"the private broker of process {os.getpid()} does not answer .* begin a new one"
    ) as caught:
        broker.connect()
    assert "shmbroker serve" not in str(caught.value)
