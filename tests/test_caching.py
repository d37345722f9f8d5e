"""The stage that asks the teacher: once for each row, and what it says is what is kept."""

import json
from typing import Literal

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from kdframe import caching
from kdframe.api import TeacherShape
from kdframe.errors import DamagedError, InputError, Interrupted
from kdframe.output_layer import Halves
from kdframe.progress import Quiet
from kdframe.teacher_cache import open_cache
from kdframe_arrow_cache import ArrowCache
from kdframe_codecs import Dense, Hidden, TopK
from kdframe_mmap_cache import MmapCache
from tests.codec_kit import States
from tests.run_kit import filled, learn, lesson, lines, load, token_rows
from tests.test_output_layer import Bent, build

V = 400


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return load(teacher_folder)


@pytest.fixture(scope="module")
def rows():
    return token_rows(12, longest=40)


def store_at(folder, codec=None):
    return open_cache(
        MmapCache(codec=codec or TopK(k=16)), {"teacher": "any"}, TeacherShape(V), folder
    )


def fill(store, sets, teacher, **more):
    more = {"batch_tokens": 64, "progress": Quiet()} | more
    return caching.fill(store, sets, lambda: teacher, **more)


def capture(folder, halves, codec, rows, requests):
    store = store_at(folder, codec)
    return caching.capture(halves, store.codec, rows, requests, caching.Refusals(store))


def nobody():
    raise AssertionError("the teacher was loaded")


def own_words(teacher, rows, i) -> torch.Tensor:
    """The teacher's log-probabilities where the row counts, the row alone."""
    ids = torch.tensor(rows.row(i).astype(np.int64))[None]
    with torch.no_grad():
        logits = teacher(ids).logits[0, torch.tensor(rows.positions(i).astype(np.int64))]
    return torch.log_softmax(logits, dim=-1)


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_what_is_kept_is_what_the_teacher_says_of_the_row_alone(
    tmp_path, teacher, rows, batch_tokens
):
    """Whatever it was batched with: neither padding nor neighbours leak."""
    store = store_at(tmp_path, Dense(precision="float32"))
    fill(store, [rows], teacher, batch_tokens=batch_tokens)
    for i in range(len(rows)):
        kept = store.targets([rows.request(i)], V).log_probs
        torch.testing.assert_close(kept, own_words(teacher, rows, i), rtol=1e-4, atol=1e-4)


def test_a_teacher_that_is_taken_whole_is_kept_as_it_speaks(tmp_path, rows):
    """And its student learns."""
    teacher = build(Bent, LlamaConfig, vocab_size=V).eval()
    store = filled(tmp_path / "cache", teacher, [rows], Dense(precision="float32"))
    kept = store.targets([rows.request(1)], V).log_probs
    torch.testing.assert_close(kept, own_words(teacher, rows, 1), rtol=1e-4, atol=1e-4)
    student = build(Bent, LlamaConfig, vocab_size=V, num_hidden_layers=1)
    learn(lesson(tmp_path / "run", student, store, rows, epochs=10, learning_rate=1e-2))
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert losses[-1] < 0.8 * losses[0]


def test_the_likeliest_ids_are_kept_within_the_codecs_precision(tmp_path, teacher, rows):
    store = store_at(tmp_path, TopK(k=16))
    fill(store, [rows], teacher)
    for i in range(len(rows)):
        kept, whole = store.targets([rows.request(i)], V), own_words(teacher, rows, i)
        wanted = whole.gather(-1, kept.ids)
        # Half a step: the ids after the ninth have coarser ones.
        torch.testing.assert_close(kept.log_probs, wanted, rtol=0, atol=0.1)
        torch.testing.assert_close(kept.log_probs[:, :9], wanted[:, :9], rtol=0, atol=0.03)
        torch.testing.assert_close(kept.log_probs[:, 0], whole.amax(-1), rtol=0, atol=0.03)
        for temperature in (1.0, 2.0, 5.0):
            log_z = torch.logsumexp(whole / temperature, dim=-1)
            torch.testing.assert_close(kept.log_z(temperature), log_z, rtol=0, atol=0.03)


def test_a_cache_that_lives_elsewhere_says_the_same_as_one_in_a_folder(tmp_path, teacher, rows):
    near = store_at(tmp_path, TopK(k=16))
    config = ArrowCache(url=f"memory:/{tmp_path}", codec=TopK(k=16))
    far = open_cache(config, {"teacher": "any"}, TeacherShape(V), tmp_path)
    for store in (near, far):
        fill(store, [rows], teacher)
    requests = [rows.request(i) for i in range(len(rows))]
    one, other = (store.targets(requests, V) for store in (near, far))
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.log_probs, other.log_probs)
    assert fill(far, [rows], teacher)["rows"] == 0


def test_what_is_there_is_not_asked_again(tmp_path, teacher, rows):
    store = store_at(tmp_path)
    first = fill(store, [rows], teacher)
    assert first["rows"] == 12
    assert first["tokens"] == rows.lengths.sum()
    again = caching.fill(store, [rows], nobody, batch_tokens=64, progress=Quiet())
    assert again == {"rows": 0, "tokens": 0, "seconds": 0}


def test_new_rows_alone_are_computed(tmp_path, teacher, rows):
    store = store_at(tmp_path)
    fill(store, [rows.select(range(8))], teacher)
    assert fill(store, [rows.select([11, *range(10)])], teacher)["rows"] == 3
    edited = rows.select(range(12))
    edited.ids[edited.offsets[4]] += 1
    assert fill(store, [edited], teacher)["rows"] == 2  # the edited one, and row 10
    assert store.cache.info()["rows"] == 13


def test_a_row_that_stands_in_two_sets_is_computed_once(tmp_path, teacher, rows):
    store = store_at(tmp_path)
    assert fill(store, [rows, rows.select([3, 3, 5])], teacher)["rows"] == 12


def test_rows_without_a_teacher_are_never_read(tmp_path, rows):
    store = store_at(tmp_path)
    alone = token_rows(5, taught=False)
    done = caching.fill(store, [alone], nobody, batch_tokens=64, progress=Quiet())
    assert done["rows"] == 0
    assert store.cache.info()["rows"] == 0


def test_a_row_whose_other_positions_count_now_is_computed_again(tmp_path, teacher, rows):
    store = store_at(tmp_path)
    fill(store, [rows], teacher)
    counted = rows.counted.copy()
    last = rows.offsets[1] - 2
    counted[rows.offsets[0] : last + 1] = True
    wider = type(rows)(**{**vars(rows), "counted": counted})
    assert fill(store, [wider], teacher)["rows"] == 1
    targets = store.targets([wider.request(0)], V)
    assert len(targets) == rows.lengths[0] - 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_teacher_with_a_weight_that_is_no_number_is_refused(tmp_path, teacher_folder, value):
    """A token of one row alone is ill: that row is named, and nothing of it is stored."""
    ill = load(teacher_folder)
    rows = token_rows(6)
    rows.ids[rows.ids == 7] = 8
    rows.ids[rows.offsets[2]] = 7
    with torch.no_grad():
        head = ill.model.embed_tokens.weight.clone()
        ill.model.embed_tokens.weight[7] = value
        ill.lm_head.weight = torch.nn.Parameter(head)
    store = store_at(tmp_path)
    with pytest.raises(InputError, match=rf"row {rows.key(2).hex()}: .*`teacher.dtype`"):
        fill(store, [rows], ill, batch_tokens=1)
    keys = [request.key for request in store.missing([rows])]
    assert rows.key(2) in keys


@pytest.mark.parametrize(
    ("spoil", "largest"),
    [
        (lambda logits: logits.fill_(-torch.inf), "-inf"),
        (lambda logits: logits[:, 5].fill_(torch.inf), "inf"),
        (lambda logits: logits[:, 5].fill_(torch.nan), "nan"),
    ],
)
def test_logits_that_are_no_distribution_are_refused(tmp_path, teacher, rows, spoil, largest):
    halves = Halves(teacher)
    head = halves.head

    def ill(states):
        logits = head(states)
        spoil(logits[-1:])
        return logits

    halves.head = ill
    requests = [rows.request(i) for i in (0, 1)]
    with pytest.raises(InputError, match=rf"row {rows.key(1).hex()}: .*largest: {largest}\)"):
        capture(tmp_path, halves, TopK(), [rows.row(0), rows.row(1)], requests)


def test_a_masked_token_is_no_fault(tmp_path, teacher, rows):
    halves = Halves(teacher)
    head = halves.head

    def masking(states):
        return head(states).index_fill(1, torch.tensor([5, 6]), -torch.inf)

    halves.head = masking
    codec = Dense(precision="float32")
    _, (records,) = capture(tmp_path, halves, codec, [rows.row(0)], [rows.request(0)])
    log_probs = codec.build(TeacherShape(V)).decode(records).log_probs
    assert torch.isinf(log_probs[:, 5:7]).all()
    assert torch.isfinite(log_probs[:, 7:]).all()


def test_capture_never_holds_the_logits_of_all_tokens(tmp_path, teacher):
    most = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal most
            found = function(*args, **kwargs or {})
            if isinstance(found, torch.Tensor) and found.ndim and found.shape[-1] == V:
                most = max(most, found.numel() // V)
            return found

    rows = token_rows(20, longest=100)
    halves = Halves(teacher)
    halves.chunk = lambda: 32  # as a vocabulary of half a million would have it
    with Sizes():
        capture(
            tmp_path,
            halves,
            TopK(k=8),
            [rows.row(i) for i in range(20)],
            [rows.request(i) for i in range(20)],
        )
    assert rows.counted_tokens > 500
    assert most <= 5 * 32  # a chunk, and a buffer of one for each temperature of the codec


def test_a_stop_keeps_what_is_committed_and_goes_on_with_the_same_batches(tmp_path, teacher, rows):
    def stored(folder, stop_after):
        store = store_at(folder)
        commits = 0

        def commit():
            nonlocal commits
            commits += 1
            if commits == stop_after:
                raise Interrupted("stop")

        if stop_after:
            with pytest.raises(Interrupted):
                fill(store, [rows], teacher, on_commit=commit)
        kept = store.cache.info()["rows"]
        rest = fill(store_at(folder), [rows], teacher)["rows"]
        return kept, rest, store_at(folder).cache.read([rows.request(i) for i in range(12)])

    _, all_rows, whole = stored(tmp_path / "whole", 0)
    kept, rest, parted = stored(tmp_path / "parted", 3)
    assert 0 < kept < all_rows == kept + rest
    assert np.array_equal(whole, parted)


def test_the_plan_is_written_first_and_removed_last(tmp_path, teacher, rows):
    store = store_at(tmp_path)
    plan = store.cache.folder / caching.PLAN
    seen = []
    fill(store, [rows], teacher, on_commit=lambda: seen.append(json.loads(plan.read_text())))
    assert len(seen) > 3
    assert all(one == seen[0] for one in seen)
    planned = [key for batch in seen[0]["batches"] for key in batch]
    assert sorted(planned) == sorted(rows.key(i).hex() for i in range(12))
    assert not plan.exists()


def old_plan(store, batches, batch_tokens=64):
    plan = {"batch_tokens": batch_tokens, "batches": batches}
    (store.cache.folder / caching.PLAN).write_text(json.dumps(plan), "utf-8")


@pytest.mark.parametrize("junk", ["", "{", '"a"', "null", "[3]", '{"batch_tokens": 64}'])
def test_a_damaged_plan_is_made_anew(tmp_path, teacher, rows, junk):
    store = store_at(tmp_path)
    (store.cache.folder / caching.PLAN).write_text(junk, "utf-8")
    assert fill(store, [rows], teacher)["rows"] == 12


@pytest.mark.parametrize("batches", [[[1]], [["zz"]], [3], [[]], None])
def test_so_is_one_that_names_no_rows(tmp_path, teacher, rows, batches):
    store = store_at(tmp_path)
    old_plan(store, batches)
    assert fill(store, [rows], teacher)["rows"] == 12


def test_what_is_left_of_an_old_plan_is_done_in_its_batches(tmp_path, teacher, rows):
    """Also where the data has grown since: the rows keep the company that they were planned in."""
    store = store_at(tmp_path)
    old = [[rows.key(i).hex() for i in batch] for batch in ((0, 5), (3,), (7, 1, 2))]
    old_plan(store, old)
    plans = []
    plan = store.cache.folder / caching.PLAN
    fill(store, [rows], teacher, on_commit=lambda: plans.append(json.loads(plan.read_text())))
    assert plans[0]["batches"][:3] == old
    assert store.missing([rows]) == []


def test_an_old_plan_that_names_a_row_twice_computes_it_once(tmp_path, teacher, rows):
    store = store_at(tmp_path)
    old_plan(store, [[rows.key(0).hex()], [rows.key(0).hex()]])
    assert fill(store, [rows], teacher)["rows"] == 12


def test_an_old_plan_does_not_outlive_its_size_of_a_pass(tmp_path, teacher, rows):
    """Who ran out of memory takes smaller passes."""
    store = store_at(tmp_path)
    old_plan(store, [[rows.key(i).hex() for i in range(12)]], batch_tokens=4096)
    commits = []
    fill(store, [rows], teacher, on_commit=lambda: commits.append(1), batch_tokens=1)
    assert len(commits) == 12


def test_a_disk_that_is_too_small_is_told_before_the_teacher_is_loaded(tmp_path, rows):
    store = store_at(tmp_path)
    store.codec.record_bytes = 10**15
    with pytest.raises(InputError, match=r"no disk space for the teacher cache: .* needed"):
        caching.fill(store, [rows], nobody, batch_tokens=64, progress=Quiet())


def test_the_kit_fills_a_cache(tmp_path, teacher, rows):
    assert filled(tmp_path, teacher, [rows]).missing([rows]) == []


def test_a_codec_is_fitted_on_positions_of_many_rows(tmp_path, teacher, monkeypatch):
    """A long row gives some of its positions, spread over it."""
    monkeypatch.setattr(caching, "FIT_POSITIONS", 30)
    monkeypatch.setattr(caching, "FIT_OF_ROW", 4)
    samples = []

    class Watching(States):
        kind: Literal["watching"] = "watching"

        def fit(self, sample):
            samples.append(sample)
            return super().fit(sample)

    rows = token_rows(20, longest=40)
    filled(tmp_path, teacher, [rows], Watching())
    (sample,) = samples
    assert len(sample) == 30
    row_of = []
    for i in range(len(rows)):
        with torch.no_grad():
            ids = torch.tensor(rows.row(i).astype(np.int64))[None]
            states = teacher.model(ids).last_hidden_state[0]
        own = states[rows.positions(i).astype(np.int64)]
        apart = (sample.hidden[:, None] - own).abs().amax(-1)
        row_of.append(int((apart.amin(-1) < 1e-3).sum()))
    assert max(row_of) <= 4
    assert sum(row_of) == 30


def test_a_codec_that_keeps_the_output_layer_alone_is_shown_no_sample(tmp_path, teacher):
    rows = token_rows(30)
    passes = []
    for codec in (Hidden(), Hidden(precision="int8")):
        hook = teacher.model.register_forward_pre_hook(lambda *_: passes.append(1))
        passes.clear()
        store = filled(tmp_path / codec.precision, teacher, [rows], codec)
        hook.remove()
        assert store.missing([rows]) == []
        if codec.precision == "float16":
            fewest = len(passes)
    assert len(passes) > fewest + 20  # int8 has read the rows once more, each alone


def test_rows_whose_codec_has_lost_its_fit_are_not_given_another(tmp_path, teacher, rows):
    """With another fit the old records would be read as something else."""
    store = filled(tmp_path, teacher, [rows.select(range(6))], States())
    (store.cache.folder / "kept-codec.bin").unlink()
    with pytest.raises(DamagedError, match="what codec 'states' was fitted to is missing"):
        filled(tmp_path, teacher, [rows], States())
    assert store.cache.kept_names() == []
