"""What the tests of the documents share with those of the TEE worker."""

from tests.tee_worker.conftest import embedded

__all__ = ["embedded"]
