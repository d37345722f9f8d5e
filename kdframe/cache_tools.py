"""What every cache backend needs: sealed JSON, and a manifest that says what the cache holds.

A sealed value is a JSON object with a checksum of its own, so that a flipped bit is noticed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from kdframe.cache_parts import CacheSpec
from kdframe.errors import DamagedError, InputError

FORMAT = "kdframe-cache"
_SHOWN = 12
_RESTORE = "restore it from a copy, or remove the cache to compute it again"


def checksum(value: Any) -> str:
    """blake2b, 8 bytes in hexadecimal, of a value as canonical JSON."""
    return _digest(value, 8)


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value with its checksum as `sum`."""
    return {**value, "sum": checksum(value)}


def opened(text: bytes) -> dict[str, Any] | None:
    """What was sealed, without `sum`; None where the checksum disagrees."""
    try:
        value = json.loads(text)
        seal = value.pop("sum")
        return value if seal == checksum(value) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def manifest(spec: CacheSpec, version: int) -> dict[str, Any]:
    """The sealed manifest of a cache in a backend's format `version`. Equal specs, equal bytes."""
    identity = dict(spec.identity)
    return sealed(
        {
            "format": FORMAT,
            "version": version,
            "identity": identity,
            "identity_digest": _digest(identity, 32),
            "codec": dict(spec.codec),
            "record_bytes": spec.record_bytes,
        }
    )


def check_manifest(text: bytes, spec: CacheSpec, version: int, *, cache: str, path: str) -> None:
    """Refuse a manifest that is not what `spec` says.

    Args:
        text: the manifest as it was found.
        version: the newest format version that the backend reads.
        cache: the cache in a message ("cache folder /here"); path: the manifest's place.

    Raises:
        InputError: another identity or record size (names the parts that differ), or a newer
            format.
        DamagedError: it is not what was written.
    """
    _check_version(text, version, path)
    value = opened(text)
    if value is None or value["format"] != FORMAT:
        raise DamagedError(f"{path} is damaged; {_RESTORE}")
    there = {**value["identity"], "record_bytes": str(value["record_bytes"])}
    wanted = {**spec.identity, "record_bytes": str(spec.record_bytes)}
    faults = [
        f"{cache} holds another {part} ({_versus(there.get(part), wanted.get(part))})"
        "; name another folder or remove it"
        for part in sorted(there.keys() | wanted.keys())
        if there.get(part) != wanted.get(part)
    ]
    if faults:
        raise InputError(*faults)


def newer(path: str, found: int, known: int) -> InputError:
    """The error for something that a newer kdframe wrote."""
    return InputError(
        f"{path} has format version {found}, this kdframe reads up to {known}; "
        "install a newer kdframe or name another folder"
    )


def _digest(value: Any, size: int) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return blake2b(text.encode(), digest_size=size).hexdigest()


def _check_version(text: bytes, known: int, path: str) -> None:
    """Newer formats may be sealed in another way, so this comes before the checksum."""
    try:
        version = json.loads(text)["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return  # damaged: the checksum says so
    if isinstance(version, int) and version > known:
        raise newer(path, version, known)


def _versus(there: Any, wanted: Any) -> str:
    words = [str(x) if x is not None else "nothing" for x in (there, wanted)]
    if words[0][:_SHOWN] != words[1][:_SHOWN]:
        words = [w if len(w) <= _SHOWN else w[:_SHOWN] + "…" for w in words]
    return f"{words[0]} there, {words[1]} wanted"
