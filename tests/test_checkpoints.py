"""Checkpoints: whole or named as damaged; the newest two and the best are kept."""

import json

import pytest
import torch

from kdframe import checkpoints, durable
from kdframe.checkpoints import Checkpoint
from kdframe.errors import DamagedError
from tests.run_kit import Said

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "complete.json"]


def checkpoint(step: int, best: int = 0) -> Checkpoint:
    torch.manual_seed(step)
    model = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    return Checkpoint(step, best, model, {"0.exp_avg": torch.randn(3, 4)}, {"tokens": step * 10})


def missing(path):
    path.unlink()


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


def test_what_is_saved_comes_back(tmp_path):
    folder = checkpoints.save(tmp_path, checkpoint(7, best=3))
    assert folder == tmp_path / "step-7"
    found, wanted = checkpoints.load(folder), checkpoint(7, best=3)
    assert (found.step, found.best, found.state) == (7, 3, {"tokens": 70})
    for ours, theirs in ((found.model, wanted.model), (found.optimizer, wanted.optimizer)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    for step, best in [(10, 10), (20, 20), (30, 20), (40, 20), (50, 20), (60, 60), (70, 60)]:
        checkpoints.save(tmp_path, checkpoint(step, best))
        kept = checkpoints.steps(tmp_path)
        assert kept == sorted({max(10, step - 10), step, best})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-60", "step-70"]


@pytest.mark.parametrize("damage", [missing, half, one_bit])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_one_is_named_and_the_one_before_it_used(tmp_path, file, damage):
    for step in (10, 20):
        checkpoints.save(tmp_path, checkpoint(step))
    damage(tmp_path / "step-20" / file)
    said = Said()
    assert checkpoints.latest(tmp_path, said).step == 10
    assert f"{tmp_path / 'step-20'}: " in str(said)
    assert "damaged" in str(said) or "not a whole checkpoint" in str(said)


def test_every_bit_of_the_list_of_sums_counts(tmp_path):
    folder = checkpoints.save(tmp_path, checkpoint(1))
    whole = (folder / "complete.json").read_bytes()
    for i in range(len(whole)):
        for bit in range(8):
            (folder / "complete.json").write_bytes(
                whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :]
            )
            with pytest.raises(DamagedError, match="step-1"):
                checkpoints.load(folder)


@pytest.mark.parametrize("file", FILES[:3])
def test_a_list_of_sums_that_leaves_a_file_out_is_no_list(tmp_path, file):
    folder = checkpoints.save(tmp_path, checkpoint(1))
    sums = json.loads((folder / "complete.json").read_text("utf-8"))
    del sums[file]
    (folder / "complete.json").write_text(json.dumps(sums), "utf-8")
    with pytest.raises(DamagedError, match=r"damaged: complete\.json"):
        checkpoints.load(folder)


@pytest.mark.parametrize("file", FILES)
def test_one_whose_best_is_damaged_cannot_be_used(tmp_path, file):
    """The run would end with weights that are not there any more."""
    for step, best in [(10, 10), (20, 10), (30, 10)]:
        checkpoints.save(tmp_path, checkpoint(step, best))
    one_bit(tmp_path / "step-10" / file)
    said = Said()
    assert checkpoints.latest(tmp_path, said) is None
    assert "step-10" in str(said)
    assert "training begins anew" in str(said)


def test_with_none_there_nothing_is_said(tmp_path):
    said = Said()
    assert checkpoints.latest(tmp_path / "absent", said) is None
    assert not said.lines


def test_a_damaged_one_is_not_kept_for_ever(tmp_path):
    for step in (10, 20):
        checkpoints.save(tmp_path, checkpoint(step))
    half(tmp_path / "step-20" / "state.json")
    checkpoints.save(tmp_path, checkpoint(15))
    assert checkpoints.steps(tmp_path) == [10, 15]


def test_one_that_cannot_be_written_leaves_the_others(tmp_path):
    checkpoints.save(tmp_path, checkpoint(10))
    bad = Checkpoint(20, 0, checkpoint(20).model, {}, {"not": {"json"}})
    with pytest.raises(TypeError):
        checkpoints.save(tmp_path, bad)
    assert checkpoints.steps(tmp_path) == [10]
    durable.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-10"]
