"""Making a student: some of a teacher's layers, or low-rank adapters on a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kdframe.errors import InputError
from kdframe.experiment import Cut, Lora

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Configuration lists with an entry for every layer.
_PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "block_types",
    "no_rope_layers",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
)


def kept_layers(cut: Cut, total: int) -> list[int]:
    """Indices of the layers that a cut keeps; of a number, the first and the last half.

    Raises:
        InputError: the teacher has no such layer.
    """
    wanted = cut.layers
    if isinstance(wanted, int):
        if wanted > total:
            raise InputError(
                f"student.from_teacher.layers: {wanted} layers wanted, "
                f"the teacher has {total}; keep at most {total}"
            )
        first = (wanted + 1) // 2
        return [*range(first), *range(total - (wanted - first), total)]
    for layer in wanted:
        if layer >= total:
            raise InputError(
                f"student.from_teacher.layers: there is no layer {layer}, "
                f"the teacher has {total} (0 to {total - 1})"
            )
    return list(wanted)


def cut_layers(teacher: PreTrainedModel, cut: Cut, dtype: torch.dtype) -> PreTrainedModel:
    """A new model of some of `teacher`'s layers and everything around them, as copies.

    Raises:
        InputError: the teacher has no such layer, or its layers cannot stand in other places.
    """
    name, total = _layer_list(teacher)
    layers = kept_layers(cut, total)
    with seeded(0):  # every weight is overwritten; only the global generator must not move
        student = type(teacher)._from_config(_cut_config(teacher, layers, total), dtype=dtype)
    try:
        student.load_state_dict(_renumbered(teacher.state_dict(), f"{name}.", layers))
    except RuntimeError as error:
        raise InputError(
            f"student.from_teacher: the layers of {type(teacher).__name__} cannot stand in other "
            f"places ({' '.join(str(error).split())[:200]}); name a `student.model` instead"
        ) from error
    if teacher.can_generate():
        student.generation_config = type(teacher.generation_config).from_dict(
            teacher.generation_config.to_dict()
        )
    return student.train()


def add_lora(model: PreTrainedModel, lora: Lora, seed: int) -> Any:
    """`model` with low-rank adapters in it, which alone train. Equal seeds, equal adapters.

    Raises:
        InputError: a target module does not exist.
    """
    from peft import LoraConfig, get_peft_model

    named = lora.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=named if isinstance(named, str) else list(named),
    )
    with seeded(seed):
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise InputError(
                f"student.lora.target_modules: {named!r} does not fit {type(model).__name__} "
                f"({' '.join(str(error).split())[:200]}); use 'all-linear' or its layers' names"
            ) from error


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a generator of its own; the global one is left as it was."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _layer_list(model: PreTrainedModel) -> tuple[str, int]:
    """Name and length of the list that holds the decoder's layers."""
    from torch import nn

    total = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder()
    for name, module in model.named_modules():
        inside = module in decoder.children() if isinstance(module, nn.ModuleList) else False
        if inside and len(module) == total:
            return name, total
    raise InputError(
        f"student.from_teacher: {type(model).__name__} keeps no list of its {total} layers; "
        "name a `student.model` instead"
    )


def _cut_config(teacher: PreTrainedModel, layers: list[int], total: int) -> Any:
    plain = teacher.config.to_dict()
    text = plain.get("text_config", plain)
    for name in _PER_LAYER:
        listed = text.get(name)
        if isinstance(listed, (list, tuple)) and len(listed) == total:
            text[name] = [listed[layer] for layer in layers]
    text["num_hidden_layers"] = len(layers)
    plain.pop("quantization_config", None)
    return type(teacher.config).from_dict(plain)


def _renumbered(state: dict[str, Any], prefix: str, layers: list[int]) -> dict[str, Any]:
    kept = {name: value for name, value in state.items() if not name.startswith(prefix)}
    for new, old in enumerate(layers):
        within = f"{prefix}{old}."
        kept |= {
            f"{prefix}{new}.{name.removeprefix(within)}": value
            for name, value in state.items()
            if name.startswith(within)
        }
    return kept
