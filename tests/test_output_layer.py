"""A model in two halves: they add up to the model, or it is taken whole."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kdframe import models
from kdframe.experiment import Lora
from kdframe.losses import StudentWithLoss
from kdframe.output_layer import Halves
from kdframe.students import add_lora
from kdframe_logit_kd import LogitKD
from tests.model_helpers import gemma, gpt2

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(model, config, **more):
    torch.manual_seed(0)
    return model(config(**SMALL | more))


def capped_gemma():
    model = gemma(2)
    model.config.final_logit_softcapping = 5.0
    return model


KNOWN = {
    "llama, tied": lambda: build(LlamaForCausalLM, LlamaConfig, tie_word_embeddings=True),
    "llama, untied": lambda: build(LlamaForCausalLM, LlamaConfig, tie_word_embeddings=False),
    "qwen2": lambda: build(Qwen2ForCausalLM, Qwen2Config),
    "qwen3": lambda: build(Qwen3ForCausalLM, Qwen3Config, head_dim=8),
    "gemma2": lambda: build(Gemma2ForCausalLM, Gemma2Config, head_dim=8),
    "gemma3": lambda: gemma(2),
    "gemma3, capped": capped_gemma,
    "gpt2": gpt2,
    "granite": lambda: build(GraniteForCausalLM, GraniteConfig, logits_scaling=8.0),
    "cohere": lambda: build(CohereForCausalLM, CohereConfig, logit_scale=0.25),
}


class Bent(LlamaForCausalLM):
    """Does to its logits what no configuration tells."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = 30 * torch.tanh(found.logits / 30)
        return found


class Louder(LlamaForCausalLM):
    """Multiplies its logits, and no configuration tells."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * 1.01
        return found


def gradients(model, total) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def through_the_halves(model, ids):
    module = StudentWithLoss(model, Halves(models.causal_lm(model)), LogitKD().build())
    module.halves.chunk = lambda: 5
    positions = torch.cat([torch.arange(8), torch.arange(9, 17)])
    labels = ids.reshape(-1)[positions + 1]
    nobody = torch.zeros(16, dtype=torch.bool)
    return module({"input_ids": ids}, positions, labels, nobody, None).total


def plainly(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits.float(), ids[:, 1:].reshape(-1), reduction="sum")


@pytest.fixture
def ids():
    torch.manual_seed(3)
    return torch.randint(3, 97, (2, 9))


@pytest.mark.parametrize("name", KNOWN)
def test_the_halves_add_up_with_the_gradients_of_the_whole_model(name, ids):
    model = KNOWN[name]().eval()  # GPT-2 has dropout
    assert not Halves(model).whole
    halves, whole = through_the_halves(model, ids), plainly(model, ids)
    assert halves.item() == pytest.approx(whole.item(), rel=1e-5)
    ours, theirs = gradients(model, halves), gradients(model, whole)
    assert ours.keys() == theirs.keys()
    for parameter, gradient in theirs.items():
        size = gradient.abs().max().item()
        torch.testing.assert_close(ours[parameter], gradient, rtol=1e-4, atol=1e-5 * size + 1e-8)


@pytest.mark.parametrize("size", [0.3, 0.01])
def test_a_model_that_bends_its_logits_is_taken_whole(size, ids):
    """With small weights the bend hardly shows; while it learns the logits grow."""
    model = build(Bent, LlamaConfig, initializer_range=size)
    assert Halves(model).whole
    halves, whole = through_the_halves(model, ids), plainly(model, ids)
    assert halves.item() == pytest.approx(whole.item(), rel=1e-5)
    ours, theirs = gradients(model, halves), gradients(model, whole)
    for parameter, gradient in theirs.items():
        torch.testing.assert_close(ours[parameter], gradient, rtol=1e-4, atol=1e-5)


def test_a_small_scale_of_small_logits_is_seen():
    assert Halves(build(Louder, LlamaConfig, initializer_range=0.01)).whole


def test_an_adapter_on_the_output_layer_learns(ids):
    base = build(LlamaForCausalLM, LlamaConfig, tie_word_embeddings=False)
    model = add_lora(base, Lora(rank=2, target_modules=("lm_head", "q_proj")), 0)
    assert not Halves(models.causal_lm(model)).whole
    ours = gradients(model, through_the_halves(model, ids))
    theirs = gradients(model, plainly(model, ids))
    assert any("lm_head.lora_B" in name for name in ours)
    for parameter, gradient in theirs.items():
        torch.testing.assert_close(ours[parameter], gradient, rtol=1e-4, atol=1e-4)


def test_the_probe_leaves_the_model_as_it_was(ids):
    model = KNOWN["llama, tied"]().train()
    state = torch.get_rng_state()
    before = model(input_ids=ids).logits
    Halves(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("stored", "given"),
    [("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")],
)
def test_logits_are_at_least_float32(stored, given):
    halves = Halves(gpt2().to(getattr(torch, stored)))
    assert halves.head(halves.hidden(input_ids=torch.ones(1, 3).long())[0]).dtype == getattr(
        torch, given
    )


def test_a_chunk_of_logits_is_bounded():
    class Wide(Halves):
        def __init__(self, size):
            self.vocab_size = size

    for size in (100, 50_000, 262_144, 10_000_000):
        chunk = Wide(size).chunk()
        assert 16 <= chunk <= 1024
        assert chunk == 16 or chunk * size * 4 <= 64 * 2**20
