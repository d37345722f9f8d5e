"""Log-probabilities made elsewhere become a cache; what does not add up writes nothing."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from kdframe import cache_commands, importing, pipeline
from kdframe.api import TeacherShape
from kdframe.errors import InputError
from kdframe.logprob_files import Vocabulary
from kdframe.progress import Quiet
from kdframe.teacher_cache import open_cache
from kdframe.tokenizers import token_bytes
from kdframe_codecs import Dense, TopK
from kdframe_mmap_cache import MmapCache
from tests import logprob_kit
from tests.logprob_kit import write_lines
from tests.run_kit import experiment, filled, load, token_rows, where

K, V = 8, 400


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return load(teacher_folder)


@pytest.fixture(scope="module")
def rows():
    return token_rows(6)


def store_at(folder, codec=None):
    codec = codec or TopK(k=K, temperatures=(1.0,))
    return open_cache(MmapCache(codec=codec), {"teacher": "any"}, TeacherShape(V), folder)


def import_into(store, files, rows, tokenizer, **more):
    more = {"keep_all": False, "progress": Quiet()} | more
    vocabulary = Vocabulary(tokenizer, V)
    return importing.import_files(store, files, [rows], vocabulary, **more)


def all_plain(teacher, rows, k=K):
    return [logprob_kit.plain(teacher, rows.row(i).tolist(), k) for i in range(len(rows))]


# ------------------------------------------------------------------------------- what is written
def test_what_was_given_is_what_is_read(tmp_path, teacher, rows, tokenizer):
    store = store_at(tmp_path / "cache")
    path = write_lines(tmp_path / "a.jsonl", all_plain(teacher, rows))
    done = import_into(store, [path], rows, tokenizer)
    assert (done.rows, done.positions) == (6, rows.counted_tokens)
    assert (done.already, done.strangers, done.missing) == (0, 0, 0)
    for i in range(6):
        kept = store.targets([rows.request(i)], V)
        said = logprob_kit.top(teacher, rows.row(i).tolist(), K)
        for t, ids, log_probs in zip(rows.positions(i), kept.ids, kept.log_probs, strict=True):
            wanted = dict(said[t])
            assert set(ids.tolist()) == wanted.keys()
            expected = torch.tensor([wanted[token] for token in ids.tolist()])
            torch.testing.assert_close(log_probs, expected, rtol=0, atol=0.05)  # the codec's step
        log_probs, tail = kept.at(1.0)
        total = log_probs.exp().sum(-1) + tail.exp()
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=1e-5)


def test_it_is_what_capture_would_have_written(tmp_path, teacher, rows, tokenizer):
    """With more entries than the codec keeps, as a server adds the token that came next."""
    codec = TopK(k=K, temperatures=(1.0,))
    own = filled(tmp_path / "own", teacher, [rows], codec)
    store = store_at(tmp_path / "cache")
    answers = [logprob_kit.vllm(teacher, rows.row(i).tolist(), K) for i in range(6)]
    import_into(store, [write_lines(tmp_path / "a.jsonl", answers)], rows, tokenizer)
    for i in range(6):
        one, other = (x.targets([rows.request(i)], V) for x in (own, store))
        assert torch.equal(one.ids, other.ids)
        torch.testing.assert_close(one.log_probs, other.log_probs, rtol=2e-3, atol=1e-4)


def test_fewer_entries_than_k_leave_the_rest_to_the_tail(tmp_path, teacher, rows, tokenizer):
    store = store_at(tmp_path / "cache")
    path = write_lines(tmp_path / "a.jsonl", all_plain(teacher, rows, k=3))
    import_into(store, [path], rows, tokenizer)
    kept = store.targets([rows.request(0)], V)
    assert torch.isinf(kept.log_probs[:, 3:]).all()
    (position, *_) = rows.positions(0).tolist()
    said = logprob_kit.top(teacher, rows.row(0).tolist(), 3)[position]
    mass = sum(np.exp(x) for _, x in said)
    assert float(kept.at(1.0)[1][0].exp()) == pytest.approx(1 - mass, abs=2e-3)


def test_only_the_rows_and_positions_of_the_data_unless_all_are_wanted(
    tmp_path, teacher, rows, tokenizer
):
    others = token_rows(2, seed=44)
    answers = all_plain(teacher, rows) + all_plain(teacher, others)
    path = write_lines(tmp_path / "a.jsonl", answers)
    store = store_at(tmp_path / "some")
    done = import_into(store, [path], rows, tokenizer)
    assert (done.rows, done.strangers) == (6, 2)
    assert store.cache.info()["positions"] == rows.counted_tokens
    whole = store_at(tmp_path / "whole")
    done = import_into(whole, [path], rows, tokenizer, keep_all=True)
    assert (done.rows, done.strangers) == (8, 2)
    assert done.positions == int(rows.lengths.sum() - 6 + others.lengths.sum() - 2)
    assert whole.missing([rows, others]) == []


def test_a_second_import_adds_what_is_missing(tmp_path, teacher, rows, tokenizer):
    store = store_at(tmp_path / "cache")
    answers = all_plain(teacher, rows)
    first = write_lines(tmp_path / "a.jsonl", answers[:2])
    second = write_lines(tmp_path / "b.jsonl", answers)
    assert import_into(store, [first], rows, tokenizer).missing == 4
    done = import_into(store, [first, second, second], rows, tokenizer)
    assert (done.rows, done.already, done.missing) == (4, 10, 0)


# --------------------------------------------------------------------------- what is not written
def spoiled(teacher, rows, shape, change):
    records = [shape(teacher, rows.row(i).tolist(), K) for i in range(3)]
    change(records[1])
    return records


def entry_of(record):
    return record["choices"][0]["prompt_logprobs"][2]


PLAIN_FAULTS = [
    (lambda r: r["top_logprobs"].__setitem__(1, [-0.1] * K), "position 1: the probabilities sum"),
    (lambda r: r["top_logprobs"][2].__setitem__(0, 0.5), "position 2: a log-probability is above"),
    (lambda r: r["top_logprobs"][2].__setitem__(3, float("nan")), "position 2: .* is no number"),
    (lambda r: r["top_logprobs"][2].__setitem__(3, float("inf")), "position 2: .* is no number"),
    (lambda r: r["top_ids"][0].__setitem__(3, V), "position 0: an id is outside .* of 400"),
    (lambda r: r["top_ids"][0].__setitem__(3, -1), "position 0: an id is outside"),
    (lambda r: r["top_ids"][0].__setitem__(3, r["top_ids"][0][0]), "position 0: an id is there"),
    (lambda r: r["top_logprobs"].__setitem__(0, [float("-inf")] * K), "position 0: no id has"),
    (lambda r: r["input_ids"].__setitem__(0, V + 7), "token id 407 is outside the teacher's"),
    (lambda r: r.update(positions=list(range(len(r["top_ids"])))[::-1]), "positions must ascend"),
    (lambda r: r["top_ids"].pop(), "entries of top_ids and"),
    (lambda r: r.update(unknown=r.pop("top_ids")), "no known shape"),
]


@pytest.mark.parametrize(("change", "fault"), PLAIN_FAULTS)
def test_what_does_not_add_up_is_named_with_its_line_and_nothing_is_written(
    tmp_path, teacher, rows, tokenizer, change, fault
):
    store = store_at(tmp_path / "cache")
    path = write_lines(tmp_path / "a.jsonl", spoiled(teacher, rows, logprob_kit.plain, change))
    with pytest.raises(InputError, match=rf"a\.jsonl:2: .*{fault}"):
        import_into(store, [path], rows, tokenizer)
    assert store.cache.info()["rows"] == 0


def test_a_server_names_the_token_that_came_next(tmp_path, teacher, rows, tokenizer):
    """Ids and log-probabilities that were paired wrongly show by it."""

    def pair_wrongly(record):
        ids = record["choices"][0]["prompt_token_ids"]
        del entry_of(record)[str(ids[2])]

    store = store_at(tmp_path / "cache")
    path = write_lines(tmp_path / "a.jsonl", spoiled(teacher, rows, logprob_kit.vllm, pair_wrongly))
    with pytest.raises(InputError, match="position 1: the token that comes next is not among"):
        import_into(store, [path], rows, tokenizer)


def test_every_fault_is_counted_and_twenty_are_named(tmp_path, rows, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [{"input_ids": [n]} for n in range(50)])
    with pytest.raises(InputError) as raised:
        import_into(store_at(tmp_path / "cache"), [path], rows, tokenizer)
    assert len(raised.value.faults) == 21
    assert raised.value.faults[-1] == "... and 30 more rows that do not add up"


def test_a_row_that_lacks_positions_of_the_data_is_refused(tmp_path, teacher, rows, tokenizer):
    record = all_plain(teacher, rows)[0]
    first = int(rows.positions(0)[0])
    short = {**record, "positions": [first]}
    short |= {name: [record[name][first]] for name in ("top_ids", "top_logprobs")}
    path = write_lines(tmp_path / "a.jsonl", [short])
    with pytest.raises(InputError, match=r"a\.jsonl:1: lacks predictions at .* the whole row"):
        import_into(store_at(tmp_path / "cache"), [path], rows, tokenizer)


def test_files_of_other_rows_are_refused(tmp_path, teacher, rows, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", all_plain(teacher, token_rows(2, seed=44)))
    with pytest.raises(InputError, match=r"none of the 2 rows is a row .*`kdframe cache missing`"):
        import_into(store_at(tmp_path / "cache"), [path], rows, tokenizer)


@pytest.mark.parametrize(
    ("codec", "fault"),
    [
        (TopK(k=K), r"tail at T = 1.5, 2, 3, 6 .* set cache.codec.temperatures to \[1.0\]"),
        (TopK(k=V, temperatures=(1.0,)), "k: covers the whole vocabulary"),
        (Dense(), "cannot be made of top-k"),
    ],
)
def test_a_codec_that_needs_more_than_top_k_says_is_refused(
    tmp_path, rows, tokenizer, codec, fault
):
    """Before a file is looked at."""
    with pytest.raises(InputError, match=fault):
        import_into(store_at(tmp_path, codec), [tmp_path / "none.jsonl"], rows, tokenizer)


# ------------------------------------------------------------------------------------- whole runs
@pytest.fixture
def served(tmp_path, prose, teacher_folder, student_folder):
    """An experiment whose teacher's weights are elsewhere."""
    local = tmp_path / "teacher"
    shutil.copytree(teacher_folder, local, ignore=shutil.ignore_patterns("*.safetensors"))
    codec = {"kind": "topk", "k": K, "temperatures": [1]}
    settings = {"cache__codec": codec, "cache__imported": "the teacher, served"}
    return experiment(tmp_path, prose, local, student_folder, **settings, training__epochs=1)


def answers(made, folder, shape):
    return [shape(row["input_ids"]) for row in cache_commands.missing_rows(made, where(folder))]


SHAPES = {
    "plain": lambda teacher: lambda ids: logprob_kit.plain(teacher, ids, K),
    "vllm": lambda teacher: lambda ids: logprob_kit.vllm(teacher, ids, K),
    "completions": lambda teacher: lambda ids: logprob_kit.completions(teacher, ids, K),
}


def card(run):
    return (run / "student" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_whose_teacher_is_elsewhere_never_asks_for_it(tmp_path, served, teacher, shape):
    path = write_lines(tmp_path / "a.jsonl", answers(served, tmp_path, SHAPES[shape](teacher)))
    done = cache_commands.import_files(served, where(tmp_path), [path])
    assert (done.rows, done.missing) == (33, 0)
    outcome = pipeline.run(served, where(tmp_path))
    manifest = json.loads((outcome.folder / "manifest.json").read_text("utf-8"))
    assert manifest["done"]["cache"]["rows"] == 0
    figures = outcome.evaluation["sets"]["validation"]["kl_to_teacher"]
    assert figures["student"] < figures["student_before"]
    assert "teacher" not in figures
    assert "| predictions imported from | the teacher, served |" in card(outcome.folder)
    info = cache_commands.cache_info(served, where(tmp_path))
    assert info["identity"]["teacher weights"] == "imported: the teacher, served"


def test_parquet_files_serve_too(tmp_path, served, teacher):
    records = answers(served, tmp_path, SHAPES["plain"](teacher))
    pyarrow.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    done = cache_commands.import_files(served, where(tmp_path), [tmp_path / "a.parquet"])
    assert (done.rows, done.missing) == (33, 0)


def test_chat_answers_serve_rows_of_which_the_completion_counts(
    tmp_path, served, teacher, tokenizer
):
    """By the bytes of the tokens."""
    begin = 2

    def counted_from(ids):
        return logprob_kit.chat(teacher, ids, K, token_bytes(tokenizer), begin)

    rows = cache_commands.missing_rows(served, where(tmp_path))
    path = write_lines(tmp_path / "a.jsonl", [counted_from(rows[0]["input_ids"])])
    with pytest.raises(InputError, match=r"lacks predictions at 1 of .* \(the first is 0\)"):
        cache_commands.import_files(served, where(tmp_path), [path])
    begin = 1
    path = write_lines(tmp_path / "a.jsonl", [counted_from(row["input_ids"]) for row in rows])
    assert cache_commands.import_files(served, where(tmp_path), [path]).missing == 0


def test_rows_that_are_still_missing_stop_a_run_before_it_trains(tmp_path, served, teacher):
    some = answers(served, tmp_path, SHAPES["plain"](teacher))[:20]
    cache_commands.import_files(served, where(tmp_path), [write_lines(tmp_path / "a.jsonl", some)])
    with pytest.raises(InputError, match=r"lack 13 rows \(.*\); `kdframe cache missing`"):
        pipeline.run(served, where(tmp_path))
    assert len(cache_commands.missing_rows(served, where(tmp_path))) == 13


def test_an_import_needs_a_name_for_its_teacher(tmp_path, served):
    unnamed = served.with_({"cache.imported": None})
    with pytest.raises(InputError, match=r"cache\.imported: name the teacher"):
        cache_commands.import_files(unnamed, where(tmp_path), [])


def test_it_is_kept_apart_from_what_local_weights_say(tmp_path, served, teacher_folder):
    """And from what another teacher said."""
    local = served.with_({"cache.imported": None, "teacher.model": str(teacher_folder)})
    other = served.with_({"cache.imported": "another"})
    folders = {
        cache_commands.cache_info(x, where(tmp_path))["folder"] for x in (served, local, other)
    }
    assert len(folders) == 3


def test_an_imported_cache_may_be_compared_with_local_weights(
    tmp_path, served, teacher, teacher_folder
):
    """Checksums alone, unless rows are asked for."""
    local = served.with_({"teacher.model": str(teacher_folder)})
    path = write_lines(tmp_path / "a.jsonl", answers(local, tmp_path, SHAPES["vllm"](teacher)))
    cache_commands.import_files(local, where(tmp_path), [path])
    assert cache_commands.verify_cache(served, where(tmp_path)).recomputed.rows == 0
    found = cache_commands.verify_cache(local, where(tmp_path), rows=8)
    assert (found.recomputed.rows, found.bad) == (8, [])
