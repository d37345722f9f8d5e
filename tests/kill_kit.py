"""Runs an experiment in processes that are killed, SIGKILL, at moments that are drawn.

`python -m tests.kill_kit PLAN` reads a plan (JSON), loads the libraries once, and forks a child
for each attempt: `{"kind": "cache" or "train", "count": n, "delay": s}` kills it `s` seconds after
there are `n` shards, or lines of metrics, more than before. After them a last child is left alone.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def attempts(folder: Path, plain: dict, kills: list[dict], threads: int = 1) -> list[dict]:
    """Run `plain` in `folder`; for each child what was there when it ended."""
    folder.mkdir(parents=True)
    plan = {"folder": str(folder), "experiment": plain, "kills": kills, "threads": threads}
    (folder / "plan.json").write_text(json.dumps(plan), "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_kit", str(folder / "plan.json")],
        cwd=REPOSITORY,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=300 + 15 * len(kills),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def passes(folder: Path) -> int:
    """Forward passes of the teacher that were begun, by all children."""
    return sum(kind == "pass" for kind, _ in events(folder))


def events(folder: Path) -> list[tuple[str, set[str]]]:
    """What happened, in order, with the rows' keys: a `pass` begun, rows found `announced`."""
    lines = (folder / "events").read_text("utf-8").splitlines()
    return [(kind, set(keys)) for kind, *keys in map(str.split, lines)]


def _note(folder: Path, kind: str, keys: Iterable[bytes]) -> None:
    line = " ".join([kind, *(key.hex() for key in keys)])
    with open(folder / "events", "a", encoding="utf-8") as file:
        file.write(line + "\n")


def _announced(folder: Path) -> list[bytes]:
    """The keys of all rows that the caches' journals announce."""
    from kdframe_mmap_cache.journal import Journal
    from kdframe_mmap_cache.shard import Shard

    keys = []
    for cache in (folder / "cache").glob("*/"):
        manifest = cache / "manifest.json"
        if manifest.exists() and (cache / "shards.jsonl").exists():
            size = json.loads(manifest.read_text("utf-8"))["record_bytes"]
            shards = [Shard(cache, e["shard"], size) for e in Journal(cache).news()[1]]
            keys += [shard.key(row) for shard in shards for row in shard.live_rows()]
    return keys


def _child(plan: dict) -> None:
    import torch

    from kdframe import caching, pipeline
    from kdframe.experiment import Experiment

    torch.set_num_threads(plan["threads"])
    folder = Path(plan["folder"])
    capture = caching.capture

    def counted(halves, codec, rows, requests, refused):
        _note(folder, "pass", [request.key for request in requests])
        return capture(halves, codec, rows, requests, refused)

    caching.capture = counted
    made = Experiment.model_validate(plan["experiment"])
    pipeline.run(made, pipeline.Where(folder / "runs", folder / "cache"))


def _lines(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.read_bytes().count(b"\n")
    return 0


def _counts(folder: Path, name: str) -> dict[str, int]:
    shards = sum(1 for _ in (folder / "cache").glob("*/shard-*.bin"))
    announced = sum(_lines(path) for path in (folder / "cache").glob("*/shards.jsonl"))
    steps = _lines(folder / "runs" / name / "metrics.jsonl")
    return {"cache": shards, "announced": announced, "train": steps}


def wait_or_kill(pid: int, folder: Path, name: str, kill: dict | None) -> bool:
    """Wait until the process ends, or kill it when its moment has come; whether it was killed."""
    before = _counts(folder, name)
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if kill and _counts(folder, name)[kill["kind"]] >= before[kill["kind"]] + kill["count"]:
            time.sleep(kill["delay"])
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return True
        time.sleep(0.001)
    return False


def _attempt(plan: dict, kill: dict | None) -> dict:
    folder, name = Path(plan["folder"]), plan["experiment"]["name"]
    started = len(list((folder / "runs" / name / "checkpoints").glob("step-*")))
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _child(plan)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    killed = wait_or_kill(pid, folder, name, kill)
    _note(folder, "announced", _announced(folder))
    return {"killed": killed, "checkpoints_before": started, **_counts(folder, name)}


def main() -> None:
    import kdframe.pipeline  # noqa: F401  # children need not load it again
    import kdframe_mmap_cache.cache  # noqa: F401

    plan = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    for kill in [*plan["kills"], None]:
        print(json.dumps(_attempt(plan, kill)), flush=True)


if __name__ == "__main__":
    main()
