"""The loss engine and the built-in loss, against the guide's formula and against plain torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kdframe.api import TeacherOutputs, TeacherShape
from kdframe.chunks import Head, chunked
from kdframe.losses import StudentWithLoss
from kdframe.output_layer import Halves
from kdframe.parts import LossTerms
from kdframe.targets import DenseTargets, TruncatedTargets, WeightedTargets
from kdframe_codecs import TopK
from kdframe_logit_kd import LogitKD

V = 50


def guide_loss(student_logits, teacher_logits, labels, temperature, alpha):
    """The guide's compute_kd_loss, as printed."""
    shift_student = student_logits[:, :-1, :]
    shift_teacher = teacher_logits[:, :-1, :]
    shift_labels = labels[:, 1:]
    v = shift_student.shape[-1]
    shift_student = shift_student.reshape(-1, v)
    shift_teacher = shift_teacher.reshape(-1, v)
    hard = F.cross_entropy(shift_student, shift_labels.reshape(-1), reduction="mean")
    student_soft = F.log_softmax(shift_student / temperature, dim=-1)
    teacher_soft = F.softmax(shift_teacher / temperature, dim=-1)
    kd = F.kl_div(student_soft, teacher_soft, reduction="batchmean") * temperature**2
    return alpha * hard + (1 - alpha) * kd


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_agrees_with_the_guide_where_nothing_is_padded(temperature, alpha):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 9, V) * 3, torch.randn(2, 9, V) * 3
    labels = torch.randint(0, V, (2, 9))
    wanted = guide_loss(student, teacher, labels, temperature, alpha)
    loss = LogitKD(alpha=alpha, temperature=temperature).build()
    targets = DenseTargets.from_logits(teacher[:, :-1].reshape(-1, V))
    terms = loss(student[:, :-1].reshape(-1, V), targets, labels[:, 1:].reshape(-1))
    assert float(terms.total.mean()) == pytest.approx(float(wanted), rel=1e-6)


@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([1.0, 1.5, 2.0, 5.0]),
    scale=st.floats(0.1, 10),
)
@settings(max_examples=30, deadline=None)
def test_a_truncated_teacher_that_keeps_everything_is_the_dense_one(seed, temperature, scale):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(6, V, generator=generator) * scale
    student = torch.randn(6, V, generator=generator) * scale
    labels = torch.randint(0, V, (6,), generator=generator)
    loss = LogitKD(temperature=temperature).build()
    dense = DenseTargets.from_logits(teacher)
    ids = torch.arange(V).expand(6, V)
    grid = (1.0, 1.5, 2.0, 5.0)
    log_z = torch.stack([dense.log_z(t) for t in grid], dim=-1)
    kept = TruncatedTargets(ids, dense.log_probs, grid, log_z)
    one, other = loss(student, dense, labels), loss(student, kept, labels)
    torch.testing.assert_close(one.terms["soft"], other.terms["soft"], rtol=2e-4, atol=2e-4)


def test_the_loss_is_zero_where_student_and_teacher_agree():
    logits = torch.randn(8, V) * 4
    codec = TopK(k=10).build(TeacherShape(V))
    targets = codec.decode(codec.encode(TeacherOutputs.of(logits)))
    for temperature in (1.0, 2.0, 5.0):
        soft = LogitKD(temperature=temperature).build()(logits, targets, torch.zeros(8).long())
        assert float(soft.terms["soft"].abs().max()) < 2e-3 * temperature**2


def test_minus_infinity_in_teacher_student_or_both_stays_finite():
    teacher, student = torch.randn(3, V), torch.randn(3, V)
    teacher[0, :5] = -torch.inf
    student[1, :5] = -torch.inf
    teacher[2, :5] = student[2, :5] = -torch.inf
    student.requires_grad_()
    codec = TopK(k=8).build(TeacherShape(V))
    for targets in (
        DenseTargets.from_logits(teacher),
        codec.decode(codec.encode(TeacherOutputs.of(teacher))),
    ):
        loss = LogitKD(alpha=0, temperature=2).build()
        total = loss(student, targets, torch.full((3,), 10)).total
        assert torch.isfinite(total).all()
        gradient = torch.autograd.grad(total.sum(), student)[0]
        assert torch.isfinite(gradient).all()
    common = loss(student[2:, 5:], DenseTargets.from_logits(teacher[2:, 5:]), torch.tensor([5]))
    whole = loss(student[2:], DenseTargets.from_logits(teacher[2:]), torch.tensor([10]))
    torch.testing.assert_close(common.total, whole.total, rtol=1e-6, atol=1e-6)


def drawn(n: int, entries: int = 6, temperature: float = 1.0) -> WeightedTargets:
    """Ids with weights that do not sum to 1; each row's last entry is none."""
    generator = torch.Generator().manual_seed(n)
    ids = torch.rand(n, V, generator=generator).argsort(-1)[:, :entries]
    weights = torch.rand(n, entries, generator=generator) / 3
    ids[:, -1], weights[:, -1] = 0, 0.0
    return WeightedTargets(ids, weights, temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_gradient_of_drawn_targets_is_the_students_probability_less_the_weight(temperature):
    logits = (torch.randn(7, V) * 3).requires_grad_()
    targets = drawn(7, temperature=temperature)
    soft = LogitKD(temperature=temperature).build()(logits, targets, torch.zeros(7).long())
    gradient = torch.autograd.grad(soft.terms["soft"].sum(), logits)[0]
    weights = torch.zeros(7, V).scatter_add(-1, targets.ids, targets.weights)
    wanted = temperature * (torch.softmax(logits / temperature, dim=-1) - weights)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_drawn_targets_that_are_the_distribution_give_its_gradient_and_cross_entropy():
    teacher, student = torch.randn(5, V) * 3, (torch.randn(5, V) * 3).requires_grad_()
    dense = DenseTargets.from_logits(teacher)
    p = dense.at(2.0).exp()
    whole = WeightedTargets(torch.arange(V).expand(5, V), p, 2.0)
    loss = LogitKD(temperature=2.0).build()
    found, wanted = (loss(student, targets, torch.zeros(5).long()) for targets in (whole, dense))
    entropy = -(p * dense.at(2.0)).sum(-1)
    torch.testing.assert_close(found.terms["soft"], wanted.terms["soft"] + 4 * entropy)
    one, other = (torch.autograd.grad(x.total.sum(), student)[0] for x in (found, wanted))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_loss_of_drawn_targets_heeds_no_constant_in_the_logits():
    logits, labels = torch.randn(4, V), torch.zeros(4).long()
    loss = LogitKD().build()
    one, other = (loss(x, drawn(4), labels).terms["soft"] for x in (logits, logits + 100))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_drawn_targets_of_ids_that_the_student_masks_stay_finite():
    targets = drawn(3)
    student = torch.randn(3, V)
    student[:, 0] = -torch.inf  # where rows with fewer entries point
    student[1, targets.ids[1, 0]] = -torch.inf
    student.requires_grad_()
    total = LogitKD(alpha=0, temperature=1).build()(student, targets, torch.ones(3).long()).total
    assert torch.isfinite(total).all()
    assert torch.isfinite(torch.autograd.grad(total.sum(), student)[0]).all()


@given(chunk=st.integers(1, 12), own_gradient=st.booleans())
@settings(max_examples=12, deadline=None)
def test_chunks_change_nothing_for_drawn_targets(chunk, own_gradient):
    torch.manual_seed(1)
    weight = torch.randn(V, 8, requires_grad=True)
    hidden, labels, targets = torch.randn(11, 8), torch.randint(0, V, (11,)), drawn(11)
    kd = LogitKD(alpha=0.3).build()

    class Loss:
        def __call__(self, logits, part):
            return kd(logits, targets.select(part), labels[part])

        def with_gradient(self, logits, part):
            if not own_gradient:
                return None
            return kd.with_gradient(logits, targets.select(part), labels[part])

    head = Head(lambda piece: piece @ weight.T, [weight], weight)
    total, terms = chunked(Loss(), hidden, head, chunk)
    wanted = kd(hidden @ weight.T, targets, labels)
    assert total.item() == pytest.approx(wanted.total.sum().item(), rel=1e-5)
    assert terms["soft"].item() == pytest.approx(wanted.terms["soft"].sum().item(), rel=1e-5)
    found, expected = (torch.autograd.grad(x, weight)[0] for x in (total, wanted.total.sum()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@given(chunk=st.integers(1, 30), n=st.integers(1, 25), by_matrices=st.booleans())
@settings(max_examples=40, deadline=None)
def test_chunks_change_neither_loss_nor_gradients(chunk, n, by_matrices):
    torch.manual_seed(n)
    weight = torch.randn(V, 8, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(n, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, V, (n,))

    class Loss:
        def __call__(self, logits, part):
            each = F.cross_entropy(logits, labels[part], reduction="none")
            return LossTerms(each, {"hard": each})

        def with_gradient(self, logits, part):
            return None

    head = Head(lambda piece: piece @ weight.T, [weight], weight if by_matrices else None)
    total, terms = chunked(Loss(), hidden, head, chunk)
    (total * 0.5).backward()
    gradients = (hidden.grad.clone(), weight.grad.clone())
    hidden.grad = weight.grad = None
    plain = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    (plain * 0.5).backward()
    assert total.item() == pytest.approx(plain.item(), rel=1e-9)
    assert terms["hard"].item() == pytest.approx(plain.item(), rel=1e-9)
    torch.testing.assert_close(gradients[0], hidden.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients[1], weight.grad, rtol=1e-9, atol=1e-12)


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def forward(module, ids, mask, positions, *, taught=None, targets=None):
    flat = ids.reshape(-1)
    labels = flat[positions + 1]
    taught = torch.zeros_like(labels, dtype=torch.bool) if taught is None else taught
    inputs = {"input_ids": ids, "attention_mask": mask}
    return module(inputs, positions, labels, taught, targets)


def test_padding_changes_nothing(student_folder):
    model = load(student_folder)
    module = StudentWithLoss(model, Halves(model), LogitKD().build())
    ids = torch.randint(3, 300, (1, 7))
    positions = torch.arange(6)
    alone = forward(module, ids, torch.ones_like(ids), positions)
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones(1, 7), torch.zeros(1, 5)], dim=1).long()
    wide = forward(module, padded, mask, positions)
    assert alone.total.item() == pytest.approx(wide.total.item(), rel=1e-6)


def test_rows_without_a_teacher_count_as_plain_cross_entropy(student_folder):
    model = load(student_folder)
    module = StudentWithLoss(model, Halves(model), LogitKD(alpha=0.3).build())
    ids = torch.randint(3, 300, (2, 7))
    positions = torch.cat([torch.arange(6), torch.arange(7, 13)])
    taught = torch.tensor([True] * 6 + [False] * 6)
    teacher = torch.randn(6, module.halves.vocab_size)
    sums = forward(
        module,
        ids,
        torch.ones_like(ids),
        positions,
        taught=taught,
        targets=DenseTargets.from_logits(teacher),
    )
    logits = model(ids).logits[:, :-1].reshape(-1, module.halves.vocab_size)
    free = F.cross_entropy(logits[6:], ids[1, 1:], reduction="sum")
    soft = LogitKD(alpha=0.3).build()(logits[:6], DenseTargets.from_logits(teacher), ids[0, 1:])
    assert sums.total.item() == pytest.approx((free + soft.total.sum()).item(), rel=1e-5)
    assert (sums.counted, sums.taught) == (12, 6)


def test_gradients_are_those_of_the_whole_model(student_folder):
    model = load(student_folder)
    module = StudentWithLoss(model, Halves(model), LogitKD().build())
    module.halves.chunk = lambda: 4
    ids = torch.randint(3, 300, (2, 9))
    positions = torch.cat([torch.arange(8), torch.arange(9, 17)])
    forward(module, ids, torch.ones_like(ids), positions).total.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    F.cross_entropy(logits, ids[:, 1:].reshape(-1), reduction="sum").backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_batch_in_which_nothing_counts_gives_exactly_zero(student_folder):
    model = load(student_folder)
    module = StudentWithLoss(model, Halves(model), LogitKD().build())
    ids = torch.randint(3, 300, (1, 5))
    sums = forward(module, ids, torch.ones_like(ids), torch.empty(0, dtype=torch.long))
    sums.total.backward()
    assert sums.total.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


forms = st.sampled_from(["dense", "truncated", "weighted"])


def targets_of(form: str, logits: torch.Tensor, temperature: float, k: int):
    if form == "dense":
        return DenseTargets(logits.log_softmax(-1))
    if form == "weighted":
        p, ids = (logits / temperature).softmax(-1).topk(min(k, V))
        return WeightedTargets(ids, p * 1.3, temperature)
    log_probs, ids = logits.log_softmax(-1).topk(min(k, V))
    log_z = torch.logsumexp(logits.log_softmax(-1) / temperature, dim=-1)
    grid = (1.0,) if temperature == 1 else (1.0, temperature)
    columns = [torch.zeros_like(log_z), log_z][: len(grid)]
    return TruncatedTargets(ids, log_probs, grid, torch.stack(columns, dim=-1))


@given(
    form=forms,
    seed=st.integers(0, 10**6),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.sampled_from([1.0, 1.7, 2.0, 3.0, 4.0, 8.0]),
    n=st.integers(1, 9),
    k=st.integers(1, 60),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    masked=st.sampled_from(["nothing", "teacher", "student", "both"]),
)
@settings(max_examples=150, deadline=None)
def test_the_loss_s_own_gradient_is_autograds(form, seed, alpha, temperature, n, k, scale, masked):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(2, n, V, generator=generator, dtype=torch.float64) * scale
    teacher, student = made
    if masked in ("teacher", "both"):
        teacher[:, :5] = -torch.inf
    if masked in ("student", "both"):
        student[:, 2:7] = -torch.inf
    labels = torch.randint(10, V, (n,), generator=generator)
    loss = LogitKD(alpha=alpha, temperature=temperature).build()
    targets = targets_of(form, teacher, temperature, k)
    leaf = student.clone().requires_grad_()
    found = loss(leaf, targets, labels)
    (right,) = torch.autograd.grad(found.total.sum(), leaf)
    own = student.clone()
    terms = loss.with_gradient(own, targets, labels)
    torch.testing.assert_close(terms.total, found.total, rtol=1e-9, atol=1e-9)
    for name, value in found.terms.items():
        torch.testing.assert_close(terms.terms[name], value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(own, right, rtol=1e-8, atol=1e-9)
