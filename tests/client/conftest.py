"""What the tests of this room share."""

from tests.peers import broker, channel, client, worker

__all__ = ["broker", "channel", "client", "worker"]
