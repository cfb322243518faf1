"""Everything this package raises on purpose. It knows nothing of requests or processes.

Error tree::

    AdapterError
    ├── AdapterNotFound         no such directory, or no resident adapter of that name
    ├── AdapterConflict         the name is taken by an adapter with other content
    ├── BrokenAdapter           the files cannot be read, or contradict themselves or the base model
    ├── UnsupportedAdapter      a well-formed adapter that computes something other than plain LoRA
    ├── InvalidRung             a rung that the adapter does not have, or cannot have
    ├── InvalidCalibration      moments of another adapter, of no tokens, or that are not finite
    ├── BrokenLadder            a saved ladder that cannot be read, or contradicts itself or its adapter
    └── ForeignLadder           a saved ladder that was made for another adapter or another base model
"""

from __future__ import annotations


class AdapterError(Exception):
    """Base of all errors of this package. Messages name the adapter, the value, the limit and the remedy."""


class AdapterNotFound(AdapterError):
    """A directory without an adapter, or a name that is not resident."""


class AdapterConflict(AdapterError):
    """A name that is already resident with other weights or another ladder."""


class BrokenAdapter(AdapterError):
    """Files that cannot be read or are malformed, weights that are not finite, shapes that do not fit."""


class UnsupportedAdapter(AdapterError):
    """An adapter that needs more than ``y += s·B(A x)`` on the supported modules; it would be served wrongly."""


class InvalidRung(AdapterError):
    """A rung outside the adapter's ladder."""


class InvalidCalibration(AdapterError):
    """Second moments that a ladder cannot be fitted to."""


class BrokenLadder(AdapterError):
    """A saved ladder that is unreadable or malformed, or whose factors do not multiply to the adapter's update."""


class ForeignLadder(AdapterError):
    """A saved ladder of other weights than those to be served: its order of ranks would mean nothing for them."""
