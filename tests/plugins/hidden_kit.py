"""What the tests of the codecs of hidden states share."""

from __future__ import annotations

import torch

from kdframe.api import CodecConfig, HiddenTargets, OutputHead, TeacherOutputs, TeacherShape


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def outputs(
    n: int, *, vocab_size: int = 300, width: int = 24, seed: int = 0, head_seed: int = 0, **more
) -> TeacherOutputs:
    """A teacher whose states vary in few directions, and which has opinions."""
    weight = normal(vocab_size, width, seed=head_seed) * 0.5
    mixing = normal(width, width, seed=head_seed + 1) * torch.linspace(1.5, 0.02, width)[:, None]
    return TeacherOutputs(
        normal(n, width, seed=seed + 2) @ mixing + 0.3, OutputHead(weight, **more)
    )


def built(config: CodecConfig, sample: TeacherOutputs):
    head = sample.head
    return config.build(TeacherShape(head.vocab_size, head.hidden_size), config.fit(sample))


def coded(config: CodecConfig, sample: TeacherOutputs, given: TeacherOutputs) -> HiddenTargets:
    codec = built(config, sample)
    return codec.decode(codec.encode(given))


def mean_kl(targets: HiddenTargets, given: TeacherOutputs, temperature: float) -> float:
    log_p = torch.log_softmax(given.logits.double() / temperature, -1)
    found = targets.dense().at(temperature).double()
    return float((log_p.exp() * (log_p - found)).sum(-1).mean())
