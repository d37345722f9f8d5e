"""The evaluator `agreement`: how close a student is to its teacher's cached predictions."""

import numpy as np
import pytest
import torch

from kdframe import evaluation
from kdframe.api import TeacherOutputs, TeacherShape
from kdframe.progress import Quiet
from kdframe.targets import DenseTargets, resized
from kdframe_codecs import Dense, Sampled, TopK
from kdframe_evaluators import Agreement
from kdframe_evaluators.agreement import _compare
from kdframe_logit_kd import LogitKD
from tests.run_kit import filled, load, token_rows

SETTING = evaluation.Setting((Agreement(),), pad_id=0, batch_tokens=64)


@pytest.fixture(scope="module")
def rows():
    return token_rows(8, longest=25)


def figures(model, rows, cache, role="student"):
    found = evaluation.evaluate(role, model, {"a": rows}, SETTING, cache=cache, progress=Quiet())
    return found["a"]


def by_hand(student, teacher, rows) -> tuple[float, float]:
    """KL and top-1 agreement over all counted positions, from whole distributions."""
    kls, same = [], []
    for i in range(len(rows)):
        ids = torch.tensor(rows.row(i).astype(np.int64))[None]
        at = torch.tensor(rows.positions(i).astype(np.int64))
        with torch.no_grad():
            p, q = (
                torch.log_softmax(m(ids).logits[0, at].double(), -1) for m in (teacher, student)
            )
        kls.append((p.exp() * (p - q)).sum(-1))
        same.append((p.argmax(-1) == q.argmax(-1)).double())
    return torch.cat(kls).mean().item(), torch.cat(same).mean().item()


def test_with_the_whole_distribution_it_is_the_textbooks(
    tmp_path, student_folder, teacher_folder, rows
):
    student, teacher = load(student_folder), load(teacher_folder)
    cache = filled(tmp_path, teacher, [rows], Dense(precision="float32"))
    kl, top1 = by_hand(student, teacher, rows)
    found = figures(student, rows, cache)
    assert found["kl_to_teacher"].value == pytest.approx(kl, rel=1e-4)
    assert found["top1_agreement"].value == pytest.approx(top1, abs=1e-9)
    assert found["kl_to_teacher"].better == "lower"
    assert found["top1_agreement"].better == "higher"


def test_truncated_it_is_a_lower_bound_that_grows_with_k(
    tmp_path, student_folder, teacher_folder, rows
):
    student, teacher = load(student_folder), load(teacher_folder)
    kl, _ = by_hand(student, teacher, rows)
    bounds = []
    for k in (1, 4, 16, 64, 400):
        cache = filled(tmp_path / str(k), teacher, [rows], TopK(k=k))
        bounds.append(figures(student, rows, cache)["kl_to_teacher"].value)
    assert bounds == sorted(bounds)
    assert bounds[-1] == pytest.approx(kl, rel=2e-3)
    assert bounds[0] < 0.9 * kl


def test_the_teacher_agrees_with_itself(tmp_path, teacher_folder, rows):
    teacher = load(teacher_folder)
    found = figures(teacher, rows, filled(tmp_path, teacher, [rows]))
    assert abs(found["kl_to_teacher"].value) < 1e-3
    assert found["top1_agreement"].value == 1


def test_nothing_of_the_teacher_nor_where_it_did_not_read(
    tmp_path, student_folder, teacher_folder, rows
):
    student = load(student_folder)
    cache = filled(tmp_path, load(teacher_folder), [rows])
    assert figures(student, rows, cache, role="teacher") == {}
    assert figures(student, rows, None) == {}
    assert figures(student, token_rows(3, taught=[True, False, True]), cache) == {}


def test_nothing_where_the_cache_holds_draws(tmp_path, student_folder, teacher_folder, rows):
    """They tell of the mean over many positions, not of the likeliest id nor of an entropy."""
    cache = filled(tmp_path, load(teacher_folder), [rows], Sampled(entries=8))
    assert figures(load(student_folder), rows, cache) == {}


@pytest.mark.parametrize("role", ["evaluator", "loss"])
@pytest.mark.parametrize("width", [40, 60])
def test_ids_that_only_the_teacher_has_join_the_tail_once(role, width):
    """Its padded ids may be among the likeliest; each stood for the mass of id 0."""
    torch.manual_seed(1)
    teacher, student = torch.randn(5, 50), torch.randn(5, width)
    teacher[:, 40:] += 3  # the likeliest ids
    student[:, 0] += 4  # where id 0 weighs much
    codec = TopK(k=12).build(TeacherShape(50))
    targets = resized(codec.decode(codec.encode(TeacherOutputs.of(teacher))), width)
    labels = torch.zeros(5).long()
    p, q = torch.softmax(teacher, -1), torch.softmax(student, -1)
    wanted = []
    for row in range(5):
        kept = [i for i in p[row].topk(12).indices.tolist() if i < width]
        rest = (1 - p[row, kept].sum()) * (
            (1 - p[row, kept].sum()) / (1 - q[row, kept].sum())
        ).log()
        wanted.append((p[row, kept] * (p[row, kept] / q[row, kept]).log()).sum() + rest)
    if role == "evaluator":
        found = _compare(student, labels, targets)["kl"]
    else:
        found = LogitKD(alpha=0).build()(student, targets, labels).total
    torch.testing.assert_close(found, torch.stack(wanted), rtol=2e-3, atol=2e-3)


def test_an_id_that_the_teacher_forbids_costs_nothing():
    teacher, student = torch.randn(4, 30), torch.randn(4, 30)
    teacher[:, 3] = -torch.inf
    found = _compare(student, torch.zeros(4).long(), DenseTargets.from_logits(teacher))
    assert torch.isfinite(found["kl"]).all()
