"""What all parts of a policy are refused with."""

from __future__ import annotations

from chunkwise.core import ChunkwiseError


class InvalidPolicy(ChunkwiseError):
    """A policy file with an unknown key, a wrong type, a value out of range, or ranks for other weights."""


def require(condition: bool, message: str) -> None:
    """Raises InvalidPolicy with ``message`` unless ``condition`` holds."""
    if not condition:
        raise InvalidPolicy(message)
