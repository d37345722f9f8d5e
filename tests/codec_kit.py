"""Codecs of strangers: what a plan may meet besides the built-in ones."""

from typing import ClassVar, Literal

import numpy as np
import torch

from kdframe.api import CodecConfig
from kdframe.heads import OutputHead
from kdframe.targets import HiddenTargets, WeightedTargets


class States(CodecConfig):
    """The teacher's hidden states, and its output layer beside them."""

    kind: Literal["states"] = "states"
    form: ClassVar = "hidden"
    reads_hidden: ClassVar = True
    fits: ClassVar = True

    def serves(self, temperature):
        return True

    def record_bytes(self, shape):
        return 4 * shape.hidden_size

    def fit(self, sample):
        return sample.head.tensors()

    def build(self, shape, fitted=None):
        return _States(self.record_bytes(shape), OutputHead.from_tensors(fitted))


class _States:
    def __init__(self, record_bytes, head):
        self.record_bytes, self.head = record_bytes, head

    def encode(self, outputs):
        return outputs.hidden.float().contiguous().view(torch.uint8).numpy()

    def decode(self, records):
        hidden = torch.from_numpy(np.array(records)).view(torch.float32)
        return HiddenTargets(hidden, self.head)


class Draws(CodecConfig):
    """Ids drawn with the teacher's own chances."""

    kind: Literal["draws"] = "draws"
    temperature: float = 1.0
    form: ClassVar = "weighted"

    def serves(self, temperature):
        return temperature == self.temperature

    def record_bytes(self, shape):
        return 8 * 4

    def build(self, shape, fitted=None):
        return _Draws(self.temperature)


class _Draws:
    record_bytes = 8 * 4

    def __init__(self, temperature):
        self.temperature = temperature
        self.chance = torch.Generator().manual_seed(0)

    def encode(self, outputs):
        p = torch.softmax(outputs.logits / self.temperature, dim=-1)
        ids = torch.multinomial(p, 8, replacement=True, generator=self.chance)
        return ids.to(torch.int32).contiguous().view(torch.uint8).numpy()

    def decode(self, records):
        ids = torch.from_numpy(np.array(records)).view(torch.int32).long()
        return WeightedTargets(ids, torch.full(ids.shape, 1 / 8), self.temperature)


class Broken(CodecConfig):
    """Fails as soon as it works."""

    kind: Literal["broken"] = "broken"
    form: ClassVar = "dense"

    def serves(self, temperature):
        return True

    def record_bytes(self, shape):
        return 1

    def build(self, shape, fitted=None):
        raise ArithmeticError("no such thing")
