"""The training loop: never a wrong mean, and no number that is none."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from kdframe import batching, checkpoints, models, training
from kdframe.batching import TokenRows
from kdframe.errors import InputError
from kdframe.losses import StudentWithLoss
from kdframe.output_layer import Halves
from kdframe.parts import LossTerms
from kdframe.progress import Quiet
from kdframe.runtime import InProcess
from kdframe.targets import TruncatedTargets
from kdframe.teacher_cache import TeacherCache
from kdframe_codecs import TopK
from kdframe_logit_kd import LogitKD
from tests.model_helpers import gpt2
from tests.run_kit import filled, learn, lesson, lines, load, same, token_rows, weights


@pytest.fixture(scope="module")
def rows():
    """The last three rows have no teacher; a copy of the first is there too."""
    made = token_rows(16, taught=[True] * 13 + [False] * 3)
    return made.select([*range(16), 0])


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_folder, rows):
    return filled(tmp_path_factory.mktemp("cache"), load(teacher_folder), [rows])


# ------------------------------------------------------------------------- never a wrong mean
class Precise:
    """A codec whose targets are float64, so that float32's rounding hides nothing."""

    def __init__(self, codec):
        self.codec = codec

    def decode(self, records):
        found = self.codec.decode(records)
        return TruncatedTargets(
            found.ids, found.log_probs.double(), found.grid, found.grid_log_z.double()
        )


def one_step(folder, model, cache, rows, **settings):
    """The logged line and the gradient of one optimiser step over all rows."""
    settings = {"max_grad_norm": None, "learning_rate": 1e-30, "warmup_ratio": 0} | settings
    given = lesson(folder, model, cache, rows, max_steps=1, **settings)
    taken = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: taken.__setitem__(name, p.grad.clone())
        )
    learn(given)
    return lines(folder)[0], taken


SPLITS = [
    {"batch_size": 17},
    {"batch_size": 1, "gradient_accumulation_steps": 17},
    {"batch_size": 4, "gradient_accumulation_steps": 5, "seed": 3},
    {"batch_size": 6, "gradient_accumulation_steps": 3, "packing": 40},
    {"batch_size": 50, "packing": 64, "seed": 5},
]


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_batches_padding_packing_and_order_change_neither_loss_nor_gradient(
    tmp_path, cache, rows, alpha
):
    precise = TeacherCache(cache.cache, Precise(cache.codec))
    found = []
    for i, split in enumerate(SPLITS):
        model = gpt2().double()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        loss = LogitKD(alpha=alpha, temperature=2)
        found.append(one_step(tmp_path / str(i), model, precise, rows, loss=loss, **split))
    (line, gradient), *others = found
    assert {"loss", "hard", "soft"} <= line.keys()
    for other, more in others:
        for name in ("loss", "hard", "soft", "grad_norm", "tokens"):
            assert other[name] == pytest.approx(line[name], rel=1e-9)
        for name, value in gradient.items():
            torch.testing.assert_close(more[name], value, rtol=1e-9, atol=1e-12)


def test_in_float32_they_differ_by_rounding_alone(tmp_path, student_folder, cache, rows):
    found = [
        one_step(tmp_path / str(i), load(student_folder), cache, rows, **split)
        for i, split in enumerate(SPLITS)
    ]
    (line, gradient), *others = found
    for other, more in others:
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-5)
        for name, value in gradient.items():
            size = value.abs().max().item()
            torch.testing.assert_close(more[name], value, rtol=1e-4, atol=1e-5 * size)


def test_the_logged_means_are_those_of_plain_torch(tmp_path, student_folder, cache, rows):
    """Hard over all counted tokens; soft over those that have a teacher."""
    model = load(student_folder)
    hard, soft, total, counted, taught = 0.0, 0.0, 0.0, 0, 0
    loss = LogitKD(alpha=0.4, temperature=2).build()
    for i in range(len(rows)):
        ids = torch.tensor(rows.row(i).astype(np.int64))[None]
        at = torch.tensor(rows.positions(i).astype(np.int64))
        logits = model(ids).logits[0, at]
        each = F.cross_entropy(logits, ids[0, at + 1], reduction="sum").item()
        hard, counted = hard + each, counted + len(at)
        if rows.taught[i]:
            targets = cache.targets([rows.request(i)], logits.shape[-1])
            terms = loss(logits, targets, ids[0, at + 1])
            soft, total = soft + terms.terms["soft"].sum().item(), total + terms.total.sum().item()
            taught += len(at)
        else:
            total += each
    line, _ = one_step(tmp_path, model, cache, rows, batch_size=20)
    assert line["hard"] == pytest.approx(hard / counted, rel=1e-5)
    assert line["soft"] == pytest.approx(soft / taught, rel=1e-5)
    assert line["loss"] == pytest.approx(total / counted, rel=1e-5)
    assert line["tokens"] == counted


def test_a_loss_that_names_no_hard_part_is_given_one(tmp_path, student_folder, cache, rows):
    """Else the hard loss of the rows without a teacher would be spread over all tokens."""
    ours = LogitKD().build()

    def nameless(logits, targets, labels):
        found = ours(logits, targets, labels)
        return LossTerms(found.total, {"far": found.terms["soft"]})

    settings = {"batch_size": 20}
    known, _ = one_step(tmp_path / "a", load(student_folder), cache, rows, loss=ours, **settings)
    other, _ = one_step(
        tmp_path / "b", load(student_folder), cache, rows, loss=nameless, **settings
    )
    assert other["hard"] == pytest.approx(known["hard"], rel=1e-6)
    assert other["far"] == pytest.approx(known["soft"], rel=1e-6)


def test_the_validation_loss_is_the_hard_loss_of_the_same_rows(
    tmp_path, student_folder, cache, rows
):
    model = load(student_folder)
    settings = {"warmup_ratio": 0, "learning_rate": 1e-30, "batch_size": 20, "eval_steps": 1}
    learn(lesson(tmp_path, model, cache, rows, validation=rows, max_steps=1, **settings))
    trained, validated = lines(tmp_path)
    assert validated["validation_hard"] == pytest.approx(trained["hard"], rel=1e-5)


def test_no_step_holds_the_logits_of_all_tokens(tmp_path, student_folder, teacher_folder):
    from torch.utils._python_dispatch import TorchDispatchMode

    most = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal most
            found = function(*args, **kwargs or {})
            if isinstance(found, torch.Tensor) and found.ndim and found.shape[-1] == 400:
                most = max(most, found.numel() // 400)
            return found

    rows = token_rows(32, longest=100)
    cache = filled(tmp_path / "cache", load(teacher_folder), [rows])
    model = load(student_folder)
    given = lesson(tmp_path / "run", model, cache, rows, batch_size=32, max_steps=1)
    loop = training._Loop(given, InProcess(), Quiet())
    loop.halves.chunk = lambda: 16
    with Sizes():
        loop.run()
    assert rows.counted_tokens > 600
    assert most == 16


# ------------------------------------------------------------------------------------- limits
def test_a_loss_that_is_no_number_ends_the_run_and_spoils_nothing(
    tmp_path, student_folder, cache, rows
):
    calls = 0
    ours = LogitKD().build()

    def breaks(logits, targets, labels):
        nonlocal calls
        calls += 1
        found = ours(logits, targets, labels)
        return LossTerms(found.total * (float("nan") if calls > 3 else 1), found.terms)

    model = load(student_folder)
    given = lesson(tmp_path, model, cache, rows, loss=breaks, batch_size=4, eval_steps=1)
    with pytest.raises(InputError, match=r"step 4: loss nan.*lower training.learning_rate"):
        learn(given)
    assert checkpoints.steps(tmp_path / "checkpoints") == [2, 3]
    assert all(torch.isfinite(value).all() for value in weights(model).values())


def test_gradients_that_are_no_numbers_end_the_run_before_they_do_harm(
    tmp_path, student_folder, cache, rows
):
    model = load(student_folder)
    model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weights(model)
    with pytest.raises(InputError, match=r"step 1: .*norm of the gradient"):
        learn(lesson(tmp_path, model, cache, rows, warmup_ratio=0))
    assert same(weights(model), before)


def test_float16_skips_a_step_that_overflows_and_goes_on(tmp_path, student_folder, cache, rows):
    model = load(student_folder)
    calls = 0

    def overflow(gradient):
        nonlocal calls
        calls += 1
        return gradient * (float("inf") if calls == 1 else 1)

    model.model.norm.weight.register_hook(overflow)
    result = learn(lesson(tmp_path, model, cache, rows, precision="float16", batch_size=4))
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert result.steps == 5
    assert [line["grad_norm"] is None for line in found] == [True] + [False] * 4


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_student_in_16_bits_learns(tmp_path, student_folder, cache, rows, precision):
    """Its hidden states are large sums away from 16 bits' end."""
    model = load(student_folder, dtype=getattr(torch, precision))
    settings = {"batch_size": 17, "epochs": 3, "learning_rate": 1e-3}
    learn(lesson(tmp_path, model, cache, rows, **settings))
    found = [line["loss"] for line in lines(tmp_path)]
    assert np.isfinite(found).all()
    assert found[-1] < found[0]


def test_hidden_states_whose_sum_overflows_float16_do_no_harm(student_folder):
    model = load(student_folder, dtype=torch.float16)
    module = StudentWithLoss(model, Halves(model), LogitKD().build())
    states = torch.full((1, 2000, 16), 60.0, dtype=torch.float16, requires_grad=True)
    module.halves.hidden = lambda **inputs: states
    assert torch.isinf(states.sum())
    nobody, at = torch.zeros(2000, dtype=torch.bool), torch.arange(2000)
    sums = module({}, at, torch.zeros(2000).long(), nobody, None)
    (sums.total / 2000).backward()
    assert torch.isfinite(sums.total)
    assert torch.isfinite(states.grad).all()


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
def test_every_schedule_warms_up(tmp_path, student_folder, cache, rows, scheduler):
    settings = {"scheduler": scheduler, "warmup_ratio": 0.4, "learning_rate": 1e-3}
    learn(lesson(tmp_path, load(student_folder), cache, rows, batch_size=2, **settings))
    rates = [line["learning_rate"] for line in lines(tmp_path)]
    assert rates[:5] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert (rates[-1] == 1e-3) == (scheduler == "constant")


def test_the_plan_of_steps(tmp_path, student_folder, cache, rows):
    def steps(**settings):
        return training.plan_steps(lesson(tmp_path, None, cache, rows, **settings))

    plan = steps(batch_size=3, gradient_accumulation_steps=2, epochs=2)
    assert [len(step) for step in plan] == [2, 2, 2] * 2
    for epoch in (plan[:3], plan[3:]):
        met = sorted(i for step in epoch for batch in step for (i,) in batch)
        assert met == list(range(17))
    assert plan[:3] != plan[3:]
    assert steps(batch_size=3, max_steps=4, epochs=9) == steps(batch_size=3, epochs=9)[:4]
    assert steps(batch_size=3, seed=1) != steps(batch_size=3)


def test_weights_of_rows_are_heeded(tmp_path, student_folder, cache, rows):
    heavy = TokenRows(**{**vars(rows), "weights": np.array([2.0] * 4 + [0.5] * 13)})
    plan = training.plan_steps(lesson(tmp_path, None, cache, heavy, batch_size=2, epochs=4))
    met = np.bincount([i for step in plan for batch in step for (i,) in batch], minlength=17)
    assert met.tolist() == [8] * 4 + [2] * 13


def test_weights_that_leave_no_row_are_refused(tmp_path, student_folder, cache, rows):
    """Else the student would be called trained."""
    light = TokenRows(**{**vars(rows), "weights": np.full(17, 1e-6)})
    with pytest.raises(InputError, match="no row comes up"):
        learn(lesson(tmp_path, load(student_folder), cache, light))


def test_rows_without_a_teacher_alone_train_plainly(tmp_path, student_folder, cache):
    rows = token_rows(6, taught=False, seed=4)
    line, gradient = one_step(tmp_path, load(student_folder), cache, rows, batch_size=6)
    model = load(student_folder)
    one = batching.collate(rows, tuple((i,) for i in range(6)), pad_id=0)
    logits = model(torch.from_numpy(one.input_ids)).logits.flatten(0, 1)
    wanted = F.cross_entropy(logits[one.counted], torch.from_numpy(one.labels))
    wanted.backward()
    assert line["loss"] == line["hard"] == pytest.approx(wanted.item(), rel=1e-5)
    assert "soft" not in line
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_decay_is_on_matrices_only(student_folder):
    model = AutoModelForCausalLM.from_pretrained(student_folder)
    given = training.Training(weight_decay=0.1)
    groups = training._optimizer(dict(model.named_parameters()), given).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]["params"])
    assert all(p.ndim < 2 for p in groups[1]["params"])
    assert models.parameter_count(model) == sum(p.numel() for g in groups for p in g["params"])


def test_the_codec_of_the_cache_is_met_at_its_own_temperatures(
    tmp_path, student_folder, teacher_folder, rows
):
    cache = filled(tmp_path / "c", load(teacher_folder), [rows], TopK(k=8, temperatures=(1.0, 2.0)))
    loss = LogitKD(temperature=4)
    with pytest.raises(InputError, match=r"temperature 4.* lies outside"):
        one_step(tmp_path / "r", load(student_folder), cache, rows, loss=loss)
