"""Several rows in one sequence do not see each other."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from kdframe import models, packing
from tests.model_helpers import CPU, gemma, gpt2, moved, student_of, teacher_of


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return models.load_teacher(teacher_of(teacher_folder), CPU)


SEGMENTS = torch.tensor([[7] * 5 + [8] * 6 + [-1] * 2, [3] * 9 + [-1] * 4, [1] * 1 + [2] * 12])


@pytest.fixture(scope="module")
def packed_ids() -> torch.Tensor:
    return torch.randint(400, SEGMENTS.shape, generator=torch.Generator().manual_seed(0))


def rows(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The rows that stand in a packed `[B, T, ...]`."""
    return [
        tensor[b][SEGMENTS[b] == segment]
        for b in range(len(SEGMENTS))
        for segment in SEGMENTS[b].unique()
        if segment != -1
    ]


def assert_as_alone(model, ids: torch.Tensor, **packed) -> None:
    with torch.no_grad():
        together = model(input_ids=ids, **packed).logits
        alone = [model(input_ids=row[None], use_cache=False).logits[0] for row in rows(ids)]
    assert together.isfinite().all()
    for ours, theirs in zip(rows(together), alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_positions_restart_with_every_row():
    inputs = packing.packed_inputs(torch.tensor([[4, 4, 4, 9, 9, -1, -1], [1, 1, 1, 1, 1, 1, 2]]))
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 0]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_get_the_logits_that_they_get_alone(teacher_folder, packed_ids, attention):
    model = AutoModelForCausalLM.from_pretrained(teacher_folder, attn_implementation=attention)
    packed = packing.packed_inputs(SEGMENTS)
    assert_as_alone(model, packed_ids, **packed)


def test_packed_rows_keep_their_sliding_window(packed_ids):
    model = gemma(layers=2).eval()
    assert_as_alone(model, packed_ids, **packing.packed_inputs(SEGMENTS))


def test_without_packed_inputs_rows_see_each_other(teacher, packed_ids):
    with pytest.raises(AssertionError):
        assert_as_alone(teacher, packed_ids, use_cache=False)


def mamba():
    return MambaForCausalLM(
        MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, initializer_range=0.3)
    )


def opt():
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=400,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            init_std=0.3,
        )
    )


@pytest.mark.parametrize(
    ("build", "keeps_apart"),
    [(lambda: gemma(layers=6), True), (gpt2, True), (mamba, False), (opt, False)],
    ids=["gemma3", "gpt2", "mamba", "opt"],
)
def test_packing_is_checked_on_the_architecture(build, keeps_apart):
    assert packing.check_packing(build()) is keeps_apart


def test_packing_check_serves_adapters_and_16_bits_and_leaves_the_mode(teacher_folder):
    for model in (moved(teacher_folder), student_of(model=str(teacher_folder), dtype="bfloat16")):
        assert packing.check_packing(model)
        assert model.training
