"""What a model's weights are: a hash of the files' content, remembered where nothing changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kdframe import durable
from kdframe.errors import InputError
from kdframe.experiment import Teacher, fingerprint
from kdframe.locating import explained, locate

_PIECE = 8 << 20
# A file changed twice within one tick of the file system's clock keeps its times.
_TICK_NS = 100_000_000
_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors")
_OLD_WEIGHTS = ("pytorch_model*.bin", "adapter_model*.bin")
_CONFIGS = ("config.json", "adapter_config.json", "*.index.json")
# Not part of what the model computes.
_REMARKS = ("_name_or_path", "transformers_version", "use_cache", "base_model_name_or_path")


def weights_fingerprint(teacher: Teacher) -> str:
    """Hash of all that decides the teacher's logits: weights, configuration, type, adapter.

    Content counts, not names: a copy of a folder has the same fingerprint. A hub id is downloaded
    first (or found in the hub's cache).

    Raises:
        InputError: the model or the adapter cannot be found, or holds no weights.
    """
    found = locate(teacher.model)
    if found.kind == "gguf":
        config: dict[str, Any] = {"dtype": "float32"}
        files = [Path(found.path, found.file or "")]
    else:
        folder = _folder("teacher.model", teacher.model, teacher.revision, "config.json")
        config, files = _config(folder / "config.json"), _weight_files(folder)
        if teacher.trust_remote_code:
            files += sorted(folder.glob("*.py"))
    if teacher.dtype != "auto":
        config["dtype"] = teacher.dtype
    return fingerprint(
        {
            "weights": _digests(files),
            "config": config,
            "quantize": teacher.quantize,
            "adapter": _adapter(teacher.adapter),
        }
    )


def _adapter(adapter: str | None) -> dict[str, Any] | None:
    if adapter is None:
        return None
    folder = _folder("teacher.adapter", adapter, None, "adapter_config.json")
    config = _config(folder / "adapter_config.json")
    return {"weights": _digests(_weight_files(folder)), "config": config}


def _folder(field: str, model: str, revision: str | None, holds: str) -> Path:
    """The folder that holds a model's files, downloaded if it is on the hub."""
    found = locate(model, holds)
    if found.kind == "folder":
        return Path(found.path)
    from huggingface_hub import snapshot_download

    patterns = [*_CONFIGS, *_WEIGHTS, "*.py"]
    with explained(field, model):
        folder = Path(snapshot_download(found.path, revision=revision, allow_patterns=patterns))
        if not _matching(folder, _WEIGHTS):
            patterns += _OLD_WEIGHTS
            snapshot_download(found.path, revision=revision, allow_patterns=patterns)
    return folder


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _weight_files(folder: Path) -> list[Path]:
    files = _matching(folder, _WEIGHTS) or _matching(folder, _OLD_WEIGHTS)
    if not files:
        raise InputError(
            f"model {str(folder)!r} holds no weights ({', '.join(_WEIGHTS)}); add them"
        )
    return files


def _config(path: Path) -> dict[str, Any]:
    """A model's configuration without remarks; older files call `dtype` `torch_dtype`."""
    with explained("configuration of model", str(path)):
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if "torch_dtype" in config:
        config.setdefault("dtype", config.pop("torch_dtype"))
    return {name: value for name, value in config.items() if name not in _REMARKS}


def _memory_file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "kdframe", "hashes.json")


def _remembered(path: Path) -> dict[str, str]:
    try:
        memory = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return memory if isinstance(memory, dict) else {}


def _digests(files: Iterable[Path]) -> list[str]:
    """Content hash of each file. One whose inode, size and times are known is not read again."""
    path = _memory_file()
    memory = _remembered(path)
    digests, new = [], {}
    for file in files:
        before = _key(file)
        digest = memory.get(before)
        if digest is None:
            digest = _digest(file)
            settled = time.time_ns() - file.stat().st_ctime_ns > _TICK_NS
            if settled and _key(file) == before:
                new[before] = digest
        digests.append(digest)
    if new:
        _remember(path, new)
    return digests


def _remember(path: Path, new: dict[str, str]) -> None:
    # Only a speed-up: a home that cannot be written is no fault.
    with contextlib.suppress(OSError), durable.lock(path.with_suffix(".lock")):
        durable.write_json(path, _remembered(path) | new)


def _key(file: Path) -> str:
    stat = file.stat()
    parts = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return ":".join(map(str, parts))


def _digest(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with open(file, "rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
