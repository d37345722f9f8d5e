"""The cost of one loss, forward and backward, output layer included, against its floor.

The floor is the three matrix products alone: logits, gradient of the hidden states, gradient of
the output layer. Times are CPU seconds of one thread, of interleaved runs.

    OMP_NUM_THREADS=1 python benchmarks/loss.py time --tokens 512
    OMP_NUM_THREADS=1 python benchmarks/loss.py memory
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kdframe.chunks import Head
from kdframe.heads import OutputHead
from kdframe.losses import StudentWithLoss
from kdframe.parts import LossTerms
from kdframe.targets import HiddenTargets, TeacherTargets, TruncatedTargets
from kdframe_logit_kd import LogitKD

ALPHA, TEMPERATURE, KEPT = 0.5, 2.0, 64


class Inputs:
    """A student's hidden states and output layer, and a teacher that knows a little more."""

    def __init__(self, tokens: int, vocabulary: int, width: int) -> None:
        chance = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(tokens, width, generator=chance).requires_grad_()
        self.weight = (torch.randn(vocabulary, width, generator=chance) * 0.1).requires_grad_()
        self.teacher = self.hidden.detach() + 0.3 * torch.randn(tokens, width, generator=chance)
        self.labels = torch.randint(0, vocabulary, (tokens,), generator=chance)
        self.head = OutputHead(self.weight.detach().clone())

    def kept(self) -> TruncatedTargets:
        """The teacher's likeliest ids and its mass at T."""
        parts = []
        for some in self.teacher.split(128):
            log_p = torch.log_softmax(self.head(some), dim=-1)
            values, ids = log_p.topk(KEPT)
            parts.append((ids, values, torch.logsumexp(log_p / TEMPERATURE, dim=-1)))
        ids, values, log_z = (torch.cat(x) for x in zip(*parts, strict=True))
        grid = torch.stack([torch.zeros_like(log_z), log_z], dim=-1)
        return TruncatedTargets(ids, values, (1.0, TEMPERATURE), grid)

    def whole(self) -> HiddenTargets:
        """The teacher's hidden states."""
        return HiddenTargets(self.teacher, self.head)

    def forget(self) -> None:
        """The gradients of the last run."""
        self.hidden.grad = self.weight.grad = None


class _Student:
    """Hidden states in place of a backbone."""

    whole = False

    def __init__(self, inputs: Inputs, chunk: int) -> None:
        weight = inputs.weight
        self.head = lambda hidden: hidden @ weight.T
        self._head, self._chunk = Head(self.head, [weight], weight), chunk
        self._hidden = inputs.hidden

    def hidden(self, **_: Tensor) -> Tensor:
        return self._hidden

    def chunk(self) -> int:
        return self._chunk

    def chunk_head(self) -> Head:
        return self._head


def engine(inputs: Inputs, loss: object, targets: TeacherTargets, chunk: int) -> Callable[[], None]:
    """The loss engine on the inputs."""
    module = StudentWithLoss(torch.nn.Identity(), _Student(inputs, chunk), loss)  # type: ignore[arg-type]
    n = len(inputs.labels)
    positions, taught = torch.arange(n), torch.ones(n, dtype=torch.bool)

    def run() -> None:
        module({}, positions, inputs.labels, taught, targets).total.backward()

    return run


def products(inputs: Inputs) -> Callable[[], None]:
    """The floor."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    pieces = [hidden[i : i + 256] for i in range(0, len(hidden), 256)]
    logits = torch.empty(256, len(weight))
    grad_hidden, grad_weight = torch.empty_like(hidden[:256]), torch.zeros_like(weight)

    def run() -> None:
        for piece in pieces:
            made = torch.mm(piece, weight.T, out=logits[: len(piece)])
            torch.mm(made, weight, out=grad_hidden[: len(piece)])
            grad_weight.addmm_(made.T, piece)

    return run


def plain_ce(inputs: Inputs) -> Callable[[], None]:
    """Cross-entropy on whole logits, as plain fine-tuning has it."""

    def run() -> None:
        F.cross_entropy(inputs.hidden @ inputs.weight.T, inputs.labels, reduction="sum").backward()

    return run


def naive(inputs: Inputs) -> Callable[[], None]:
    """The usual recipe: whole logits of both, temperature, `kl_div`, cross-entropy."""
    teacher = inputs.head(inputs.teacher)

    def run() -> None:
        logits = inputs.hidden @ inputs.weight.T
        soft = F.kl_div(
            F.log_softmax(logits / TEMPERATURE, dim=-1),
            F.softmax(teacher / TEMPERATURE, dim=-1),
            reduction="sum",
        )
        hard = F.cross_entropy(logits, inputs.labels, reduction="sum")
        (ALPHA * hard + (1 - ALPHA) * TEMPERATURE**2 * soft).backward()

    return run


def strangers(logits: Tensor, targets: TruncatedTargets, labels: Tensor) -> LossTerms:
    """A third party's loss in plain torch: cross-entropy on the kept ids, and the label's."""
    log_q = torch.log_softmax(logits, dim=-1)
    soft = -(targets.log_probs.exp() * log_q.gather(-1, targets.ids)).sum(-1)
    hard = F.cross_entropy(logits, labels, reduction="none")
    return LossTerms(hard + soft, {"hard": hard, "soft": soft})


def strangers_naive(inputs: Inputs) -> Callable[[], None]:
    """The same on whole logits."""
    targets = inputs.kept()

    def run() -> None:
        strangers(inputs.hidden @ inputs.weight.T, targets, inputs.labels).total.sum().backward()

    return run


def runs(inputs: Inputs, chunk: int) -> dict[str, Callable[[], Callable[[], None]]]:
    """What is compared, by name; each is made when it is asked for."""

    def kd(temperature: float, targets: Callable[[], TeacherTargets]) -> Callable[[], None]:
        loss = LogitKD(alpha=ALPHA, temperature=temperature).build()
        return engine(inputs, loss, targets(), chunk)

    return {
        "three products": lambda: products(inputs),
        "logit_kd, top-64, T=2": lambda: kd(TEMPERATURE, inputs.kept),
        "logit_kd, top-64, T=1": lambda: kd(1.0, inputs.kept),
        "logit_kd, hidden, T=2": lambda: kd(TEMPERATURE, inputs.whole),
        "plain CE, whole logits": lambda: plain_ce(inputs),
        "usual KD, whole logits": lambda: naive(inputs),
        "a stranger's, through the engine": lambda: engine(inputs, strangers, inputs.kept(), chunk),
        "a stranger's, whole logits": lambda: strangers_naive(inputs),
    }


def measure_time(options: argparse.Namespace) -> list[dict[str, object]]:
    """CPU seconds of each, and ratios to the floor of the same round: medians with quartiles."""
    inputs = Inputs(options.tokens, options.vocabulary, options.width)
    made = {name: make() for name, make in runs(inputs, options.chunk).items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(options.rounds + 1):
        order = list(made)
        random.Random(turn).shuffle(order)
        for name in order:
            inputs.forget()
            began = time.process_time()
            made[name]()
            if turn:  # the first round takes memory that the others find
                times[name].append(time.process_time() - began)
    floor = torch.tensor(times["three products"])
    rows = []
    for name, seconds in times.items():
        ratios = torch.tensor(seconds) / floor
        low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        median = torch.tensor(seconds).median().item()
        rows.append({"what": name, "seconds": median, "ratio": middle, "quartiles": [low, high]})
    return rows


def measure_memory(options: argparse.Namespace) -> list[dict[str, object]]:
    """Largest memory above the inputs, each in a process of its own, MB."""
    rows = []
    for tokens in (512, 2048, 4096):
        inputs = Inputs(16, 64, 8)
        for name in runs(inputs, options.chunk):
            command = [sys.executable, __file__, "one", "--tokens", str(tokens), "--name", name]
            command += ["--vocabulary", str(options.vocabulary), "--width", str(options.width)]
            command += ["--chunk", str(options.chunk)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rows.append({"what": name, "tokens": tokens, "megabytes": float(out)})
    return rows


def one(options: argparse.Namespace) -> None:
    """Print the largest memory of one run above what was there before it."""
    inputs = Inputs(options.tokens, options.vocabulary, options.width)
    run = runs(inputs, options.chunk)[options.name]()
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the library's own buffers
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    run()
    print((_status("VmHWM") - before) / 1024)


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("what", choices=["time", "memory", "one"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--name")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.what == "one":
        one(options)
        return
    rows = measure_time(options) if options.what == "time" else measure_memory(options)
    for row in rows:
        print(json.dumps(row) if options.json else "  ".join(map(str, row.values())))


if __name__ == "__main__":
    main()
