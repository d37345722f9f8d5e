"""Small codecs of the forms that `topk` and `dense` do not have."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch

from kdframe.api import CodecConfig, HiddenTargets, OutputHead, TargetForm, WeightedTargets


class States(CodecConfig):
    """The final hidden states; the output layer stands beside the records."""

    kind: Literal["states"] = "states"
    precision: Literal["float16", "float32"] = "float16"
    form: ClassVar[TargetForm] = "hidden"
    reads_hidden: ClassVar[bool] = True
    fits: ClassVar[bool] = True

    def serves(self, temperature):
        return True

    def record_bytes(self, shape):
        return (2 if self.precision == "float16" else 4) * shape.hidden_size

    def fit(self, sample):
        return sample.head.tensors()

    def build(self, shape, fitted: Mapping | None = None):
        return _States(self, shape, OutputHead.from_tensors(fitted))


class _States:
    def __init__(self, config, shape, head):
        self.record_bytes, self.head = config.record_bytes(shape), head
        self.dtype = getattr(torch, config.precision)

    def encode(self, outputs):
        return outputs.hidden.to(self.dtype).contiguous().view(torch.uint8).numpy()

    def decode(self, records):
        states = torch.from_numpy(np.array(records)).view(self.dtype)
        return HiddenTargets(states.float(), self.head)


class Comb(CodecConfig):
    """The ids that evenly spaced points of the distribution fall on: every point weighs 1/k."""

    kind: Literal["comb"] = "comb"
    k: int = 32
    form: ClassVar[TargetForm] = "weighted"

    def serves(self, temperature):
        return temperature == 1

    def record_bytes(self, shape):
        return 2 * self.k

    def build(self, shape, fitted=None):
        return _Comb(self.k)


class _Comb:
    def __init__(self, k):
        self.k, self.record_bytes = k, 2 * k

    def encode(self, outputs):
        sums = torch.softmax(outputs.logits.float(), dim=-1).cumsum(-1)
        points = ((torch.arange(self.k) + 0.5) / self.k).expand(len(sums), -1)
        ids = torch.searchsorted(sums, points.contiguous()).clamp(max=sums.shape[-1] - 1)
        return ids.numpy().astype("<u2").view(np.uint8)

    def decode(self, records):
        ids = torch.from_numpy(np.ascontiguousarray(records).view("<u2").astype(np.int64))
        weights = torch.full(ids.shape, 1 / self.k)
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        group = first.cumsum(-1) - 1
        summed = torch.zeros_like(weights).scatter_add(-1, group, weights)
        kept = torch.zeros_like(ids).scatter(-1, group, ids)
        return WeightedTargets(kept, summed, 1.0)


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
