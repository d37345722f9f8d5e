"""What each codec costs and what it gives back, on a real teacher's predictions.

    python benchmarks/codecs.py --teacher FOLDER --texts FILE... [--codec '{kind: topk, k: 41}']...

Bytes and microseconds a token, and at each temperature the KL to the teacher and the relative
error of the gradient that the late stand-in student gets (`stand_ins.py`), with the 95 % interval
of a bootstrap over rows. A codec that is fitted is fitted on rows that are not measured. Times
are CPU seconds on one thread; encoding is timed without the teacher's output layer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import stand_ins
import torch
from ruamel.yaml import YAML

from kdframe.api import Codec, CodecConfig, TeacherOutputs, TeacherShape, TeacherTargets
from kdframe.fidelity import Fidelity, compare
from kdframe.plugins import installed
from kdframe.targets import met

Given = TypeVar("Given")
Found = TypeVar("Found")

TEMPERATURES = (1.0, 2.0, 4.0)
FIT_ROWS = 8
SLICE = 32  # positions that are compared at once
DRAWS = 2000  # of the bootstrap
USUAL: list[dict[str, Any]] = [
    {"kind": "dense", "precision": "float16"},
    {"kind": "dense", "precision": "bfloat16"},
    {"kind": "dense", "precision": "int8"},
    {"kind": "topk", "for_bytes": 115},
    {"kind": "topk", "k": 64},
    {"kind": "topk", "for_bytes": 312},
]


@dataclass
class Tried:
    """A codec and what was found of it, row by row.

    Attributes:
        rows: for each temperature, a `Fidelity` of each row.
        encode, decode: CPU seconds of each row.
    """

    name: str
    config: CodecConfig
    codec: Codec
    rows: dict[float, list[Fidelity]] = field(default_factory=dict)
    encode: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def configs(asked: Sequence[str]) -> dict[str, CodecConfig]:
    """The codecs to measure, by name; without any that were asked for, the usual ones."""
    registry = installed()
    if asked:
        plain = [YAML(typ="safe").load(text) for text in asked]
    else:
        kinds = registry.kinds["codec"].keys() - {"dense", "topk"}
        plain = USUAL + [{"kind": kind} for kind in sorted(kinds) if _needs_nothing(kind)]
    found = {}
    for settings in plain:
        rest = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "kind")
        config = registry.read("codec", settings)
        assert isinstance(config, CodecConfig)
        found[f"{settings['kind']} {rest}".strip()] = config
    return found


def _needs_nothing(kind: str) -> bool:
    part = installed().kinds["codec"][kind].part
    return not any(setting.is_required() for setting in part.model_fields.values())


def measure(tried: Sequence[Tried], said: stand_ins.StandIns) -> None:
    """Encode, decode and compare every row with every codec."""
    for start in range(0, len(said), stand_ins.ROW):
        row = slice(start, start + stand_ins.ROW)
        outputs = TeacherOutputs(said.hidden[row], said.head)
        teacher, student = said.logits(row)
        outputs.logits.numpy()  # made before the clock starts
        for one in tried:
            records = _timed(one.encode, one.codec.encode, outputs)
            targets = _timed(one.decode, one.codec.decode, records)
            for temperature in filter(one.config.serves, TEMPERATURES):
                found = _compared(targets, teacher, student, temperature)
                one.rows.setdefault(temperature, []).append(found)


def _timed(seconds: list[float], call: Callable[[Given], Found], given: Given) -> Found:
    """Call twice; the faster counts, for other programs share the processor's memory."""
    taken = []
    for _ in range(2):
        began = time.process_time()
        found = call(given)
        taken.append(time.process_time() - began)
    seconds.append(min(taken))
    return found


def _compared(
    targets: TeacherTargets, teacher: torch.Tensor, student: torch.Tensor, temperature: float
) -> Fidelity:
    found = Fidelity()
    for start in range(0, len(teacher), SLICE):
        part = slice(start, start + SLICE)
        few = met(targets.select(part))
        found += compare(few, teacher[part], student[part], temperature)
    return found


def interval(
    rows: Sequence[Fidelity], figure: Callable[[Fidelity], float]
) -> tuple[float, float, float]:
    """A figure over all rows, and its 95 % interval when rows are drawn again."""
    names = list(vars(rows[0]))
    table = np.array([[getattr(row, name) for name in names] for row in rows])
    drawn = np.random.default_rng(0).integers(0, len(rows), (DRAWS, len(rows)))
    again = [figure(Fidelity(*sums)) for sums in table[drawn].sum(axis=1)]
    low, high = np.quantile(again, (0.025, 0.975))
    return figure(Fidelity(*table.sum(axis=0))), float(low), float(high)


def report(one: Tried, shape: TeacherShape) -> dict[str, Any]:
    """Everything found of a codec as plain data."""
    tokens = len(one.encode) * stand_ins.ROW
    figures = {
        str(temperature): {
            "kl": interval(rows, lambda f: f.mean_kl),
            "gradient_error": interval(rows, lambda f: f.gradient_error),
        }
        for temperature, rows in one.rows.items()
    }
    return {
        "codec": one.name,
        "settings": one.config.model_dump(mode="json"),
        "bytes": one.config.record_bytes(shape),
        "encode_us": 1e6 * sum(one.encode) / tokens,
        "decode_us": 1e6 * sum(one.decode) / tokens,
        "at": figures,
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    """The reports as a table in Markdown."""
    heads = ["codec", "bytes", "encode µs", "decode µs"]
    heads += [f"KL, T={t:g}" for t in TEMPERATURES] + [f"gradient, T={t:g}" for t in TEMPERATURES]
    lines = [heads, ["---"] * len(heads)]
    for one in found:
        cells = [one["codec"], f"{one['bytes']:,}"]
        cells += [f"{one['encode_us']:.1f}", f"{one['decode_us']:.2f}"]
        for figure in ("kl", "gradient_error"):
            cells += [_cell(one["at"].get(str(t), {}).get(figure)) for t in TEMPERATURES]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(found: tuple[float, float, float] | None) -> str:
    if found is None or np.isnan(found[0]):
        return "–"
    return "{:.2g} ({:.2g} to {:.2g})".format(*found)


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    reader.add_argument("--teacher", type=Path, required=True, help="folder of the model")
    reader.add_argument("--texts", type=Path, nargs="+", required=True, help="JSONL with `text`")
    reader.add_argument("--rows", type=int, default=18, help="rows of 512 tokens, over all texts")
    reader.add_argument("--codec", action="append", default=[], help="settings; may be repeated")
    reader.add_argument("--json", action="store_true", help="everything, as JSON")
    memory = Path.home() / ".cache" / "kdframe-benchmarks"
    reader.add_argument("--memory", type=Path, default=memory, help="keeps the teacher's states")
    asked = reader.parse_args()
    torch.set_num_threads(1)
    said = stand_ins.load(asked.teacher, asked.texts, asked.rows, asked.memory)
    shape = TeacherShape(said.head.vocab_size, said.head.hidden_size)
    chosen = configs(asked.codec)
    sample: TeacherOutputs | None = None
    if any(config.fits for config in chosen.values()):
        skip = asked.rows // len(asked.texts)
        other = stand_ins.load(asked.teacher, asked.texts, FIT_ROWS, asked.memory, skip=skip)
        sample = TeacherOutputs(other.hidden, said.head)
    tried = []
    for name, config in chosen.items():
        fitted = config.fit(sample) if config.fits and sample is not None else None
        tried.append(Tried(name, config, config.build(shape, fitted)))
    with torch.no_grad():
        measure(tried, said)
    found = [report(one, shape) for one in tried]
    print(json.dumps(found, indent=1) if asked.json else table(found))


if __name__ == "__main__":
    main()
