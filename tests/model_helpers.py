"""What the tests of models share."""

from pathlib import Path

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from kdframe import models
from kdframe.experiment import Lora, Student, Teacher

CPU = torch.device("cpu")


def teacher_of(folder: Path | str, **settings) -> Teacher:
    return Teacher(model=str(folder), **settings)


def student_of(teacher: torch.nn.Module | None = None, seed: int = 0, **settings):
    """A student; a cut is taken from `teacher`."""
    return models.load_student(
        Student(**settings),
        teacher=Teacher(model="not/loaded"),
        teacher_model=teacher,
        device=CPU,
        seed=seed,
    )


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def moved(folder: Path):
    """A LoRA student whose adapters have left zero."""
    model = student_of(model=str(folder), lora=Lora(rank=2))
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def gemma(layers: int) -> Gemma3ForCausalLM:
    """A small Gemma 3: every sixth layer sees everything, the others three tokens back."""
    config = Gemma3TextConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=3,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=400, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3)
    )
