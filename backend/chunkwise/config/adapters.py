"""The grammar of ``--lora-adapters`` / ``LORA_ADAPTERS``: TGI's, item by item."""

from __future__ import annotations

from chunkwise.config.settings import AdapterSource
from chunkwise.core import ChunkwiseError


class InvalidAdapters(ChunkwiseError):
    """An adapter list that does not follow the grammar."""


def parse_lora_adapters(text: str) -> tuple[AdapterSource, ...]:
    """``id``, ``id@revision``, ``name=path``, ``name=path@revision``, separated by commas; blanks around items are cut.

    Raises:
        InvalidAdapters: an empty name or path, more than one ``=`` or ``@`` in an item, or a name given twice.
    """
    sources: list[AdapterSource] = []
    for item in (part.strip() for part in text.split(",")):
        if not item:
            continue
        if item.count("=") > 1 or item.count("@") > 1:
            raise InvalidAdapters(f"adapter {item!r} has more than one '=' or '@'; write name=path@revision")
        target, _, revision = item.partition("@")
        name, equals, source = target.partition("=")
        source = source if equals else name
        if not name or not source or ("@" in item and not revision):
            raise InvalidAdapters(f"adapter {item!r} has an empty part; write name=path@revision")
        if any(known.name == name for known in sources):
            raise InvalidAdapters(f"adapter name {name!r} is given twice; names must differ")
        sources.append(AdapterSource(name, source, revision or None))
    return tuple(sources)
