"""How fast the teacher fills a cache, against its bare forward pass; and the memory that it takes.

    python benchmarks/capture.py --teacher FOLDER --texts FILE... [--codec '{kind: topk, k: 41}']...

Rows are pieces of the texts in turn, their lengths as uneven as those of real examples are (drawn:
log-normal, median 29 tokens, mean 48, at most 256). All run on the same rows, block after block in
turns, and count the same positions:

- bare: backbone and output layer on the batches that capture plans, the logits of all counted
  positions at once, dropped;
- capture, for each codec: the whole stage, with planning, hashing, writing and flushing (both
  begin by taking the model in halves, which runs it on a few tokens);
- guide: 16 rows at a time as they come, padded, float32 logits kept in memory (first block only).

`--memory`: instead, in a fresh process for each codec and size of the data, how far the peak of
resident memory lies above what is resident once the model is loaded and has read 16 tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ruamel.yaml import YAML
from transformers import AutoTokenizer, PreTrainedModel

from kdframe import batching, caching
from kdframe.api import CodecConfig, TeacherShape
from kdframe.batching import TokenRows
from kdframe.models import load_folder
from kdframe.output_layer import Halves
from kdframe.plugins import installed
from kdframe.progress import Quiet
from kdframe.teacher_cache import open_cache

LONGEST = 256
MEDIAN = 29
BUDGET = 2048  # padded tokens of a forward pass, the framework's default
GUIDE_ROWS = 16
USUAL = ["topk", "{kind: topk, k: 41}"]
SIZES = (4_000, 16_000)


def pieces(teacher: Path, texts: Sequence[Path], tokens: int) -> list[list[int]]:
    """Rows of token ids, from the files in turn, `tokens` in all."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    streams = [_stream(path, tokenizer) for path in texts]
    drawn = np.random.default_rng(0)
    rows: list[list[int]] = []
    while sum(map(len, rows)) < tokens:
        size = int(np.clip(np.exp(np.log(MEDIAN) + drawn.standard_normal()), 2, LONGEST))
        rows.append(list(itertools.islice(streams[len(rows) % len(streams)], size)))
    return rows


def _stream(path: Path, tokenizer: Any) -> Iterator[int]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield from tokenizer(json.loads(line)["text"])["input_ids"]


def joined(rows: Sequence[Sequence[int]]) -> TokenRows:
    """Rows of which every position but the last counts."""
    counted = [np.arange(len(row)) < len(row) - 1 for row in rows]
    ones = np.ones(len(rows))
    return TokenRows.join(
        [np.array(row, np.int32) for row in rows],
        counted,
        taught=ones,
        weights=ones,
        text_bytes=ones,
    )


@torch.no_grad()
def bare(model: PreTrainedModel, rows: TokenRows) -> None:
    halves = Halves(model)
    for batch in batching.planned(rows.lengths, np.arange(len(rows)), tokens=BUDGET):
        one = batching.collate(rows, tuple((i,) for i in batch), pad_id=0)
        states = halves.hidden(
            input_ids=torch.from_numpy(one.input_ids),
            attention_mask=torch.from_numpy(one.attention_mask),
        )
        halves.head(states.flatten(0, 1)[torch.from_numpy(one.counted)])


def capture(model: PreTrainedModel, rows: TokenRows, config: CodecConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings: Any = installed().read("cache", {"kind": "mmap", "codec": config})
        vocab_size = model.get_output_embeddings().weight.shape[0]
        shape = TeacherShape(vocab_size, model.config.get_text_config().hidden_size)
        store = open_cache(settings, {"teacher": "any"}, shape, Path(folder))
        caching.fill(store, [rows], lambda: model, batch_tokens=BUDGET, progress=Quiet())


@torch.no_grad()
def guide(model: PreTrainedModel, rows: TokenRows) -> None:
    kept = []
    for start in range(0, len(rows), GUIDE_ROWS):
        batch = range(start, min(start + GUIDE_ROWS, len(rows)))
        one = batching.collate(rows, tuple((i,) for i in batch), pad_id=0)
        given = {"input_ids": one.input_ids, "attention_mask": one.attention_mask}
        tensors = {name: torch.from_numpy(value) for name, value in given.items()}
        kept.append(model(**tensors).logits.float().cpu())


def speed(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    codecs: dict[str, CodecConfig],
    blocks: int,
) -> None:
    """Print counted tokens a CPU second and a second, and the ratio to the bare forward."""
    parts = [joined(rows[i::blocks]) for i in range(blocks)]
    ways: dict[str, Callable[[TokenRows], None]] = {"bare": lambda part: bare(model, part)}
    for name, config in codecs.items():
        ways[name] = lambda part, config=config: capture(model, part, config)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for way in ways.values():
        way(joined(rows[:8]))  # the first pass takes memory that the others find
    for i, part in enumerate(parts):
        names = list(ways)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            taken[name].append(_clocked(ways[name], part))
    taken["guide"] = [_clocked(lambda part: guide(model, part), parts[0])]
    counted = [part.counted_tokens for part in parts]
    lengths = np.array([len(row) for row in rows])
    print(
        f"{len(rows)} rows, {sum(counted)} counted tokens, {torch.get_num_threads()} threads; "
        f"tokens a row: mean {lengths.mean():.0f}, median {np.median(lengths):.0f}, "
        f"95 % below {np.quantile(lengths, 0.95):.0f}"
    )
    print("| way | tokens a CPU second | tokens a second | of bare, CPU (blocks) | of bare, wall |")
    print("| --- | --- | --- | --- | --- |")
    for name, pairs in taken.items():
        tokens = sum(counted[: len(pairs)])
        cpu, wall = (sum(times) for times in zip(*pairs, strict=True))
        of_cpu, of_wall = (
            [before[j] / pair[j] for before, pair in zip(taken["bare"], pairs, strict=False)]
            for j in (0, 1)
        )
        share = f"{statistics.median(of_cpu):.3f} ({min(of_cpu):.3f} to {max(of_cpu):.3f})"
        rates = f"{tokens / cpu:.1f} | {tokens / wall:.1f}"
        print(f"| {name} | {rates} | {share} | {statistics.median(of_wall):.3f} |")


def _clocked(way: Callable[[TokenRows], None], part: TokenRows) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.monotonic()
    way(part)
    return time.process_time() - cpu, time.monotonic() - wall


def memory(model: PreTrainedModel, rows: TokenRows, config: CodecConfig) -> float:
    """MB by which the peak of resident memory passes what is resident now."""
    with torch.no_grad():
        model(input_ids=torch.arange(16)[None])
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = _resident("VmRSS")
    capture(model, rows, config)
    return (_resident("VmHWM") - before) / 1e6


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    reader.add_argument("--teacher", type=Path, required=True, help="folder of the model")
    reader.add_argument("--texts", type=Path, nargs="+", required=True, help="JSONL with `text`")
    reader.add_argument("--tokens", type=int, default=8_000, help="tokens of all rows")
    reader.add_argument("--blocks", type=int, default=4, help="parts of the data, taken in turn")
    reader.add_argument("--codec", action="append", default=[], help="settings; may be repeated")
    reader.add_argument("--memory", action="store_true", help="memory instead of speed")
    reader.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = reader.parse_args()
    texts = asked.codec or USUAL
    if asked.memory and not asked.one:
        for text in texts:
            for size in SIZES:
                again = [*sys.argv[:1], "--one", "--memory", "--tokens", str(size)]
                again += ["--teacher", str(asked.teacher), "--codec", text]
                subprocess.run([sys.executable, *again, "--texts", *asked.texts], check=True)
        return
    rows = pieces(asked.teacher, asked.texts, asked.tokens)
    model = load_folder(asked.teacher, torch.device("cpu"))
    codecs = {text: _config(text) for text in texts}
    if asked.memory:
        extra = memory(model, joined(rows), codecs[texts[0]])
        print(f"{texts[0]}, {asked.tokens} tokens: {extra:.0f} MB", flush=True)
    else:
        speed(model, rows, codecs, asked.blocks)


def _config(text: str) -> CodecConfig:
    found = installed().read("codec", YAML(typ="safe").load(text))
    assert isinstance(found, CodecConfig)
    return found


if __name__ == "__main__":
    main()
