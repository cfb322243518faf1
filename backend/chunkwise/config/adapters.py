"""The grammar of ``--lora-adapters`` / ``LORA_ADAPTERS``: TGI's, item by item."""

from __future__ import annotations

import json

from chunkwise.config.settings import AdapterSource
from chunkwise.core import ChunkwiseError


class InvalidAdapters(ChunkwiseError):
    """An adapter list that does not follow the grammar."""


def parse_lora_adapters(text: str) -> tuple[AdapterSource, ...]:
    """``id``, ``id@revision``, ``name=path``, ``name=path@revision``, separated by commas; blanks around items are cut.
    Or, for paths that hold one of these characters, a JSON object of paths by name.

    Raises:
        InvalidAdapters: an empty name or path, more than one ``=`` or ``@`` in an item, or a name given twice.
    """
    if text.lstrip().startswith("{"):
        return _parse_json(text)
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


def _parse_json(text: str) -> tuple[AdapterSource, ...]:
    try:
        paths = json.loads(text)
    except ValueError as error:
        raise InvalidAdapters(f"adapters {text!r} are not valid JSON: {error}") from error
    if not all(name and isinstance(path, str) and path for name, path in paths.items()):
        raise InvalidAdapters(f"adapters {text!r} must map names to paths, none of them empty")
    return tuple(AdapterSource(name, path) for name, path in paths.items())
