"""The shapes in which servers write log-probabilities: all are read as one, or refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from kdframe.errors import InputError
from kdframe.logprob_files import PredictedRow, Vocabulary, read
from kdframe.tokenizers import token_bytes
from tests import logprob_kit
from tests.logprob_kit import write_lines
from tests.run_kit import load

K = 8
IDS = [70, 75, 80, 300, 91, 82, 310, 64]


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return load(teacher_folder)


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return Vocabulary(tokenizer, len(tokenizer))


def read_one(path, vocabulary) -> PredictedRow:
    ((place, row),) = read(path, vocabulary)
    if isinstance(row, ValueError):
        raise row
    assert place.startswith(str(path))
    return row


def line(tmp_path, record, vocabulary) -> PredictedRow:
    return read_one(write_lines(tmp_path / "one.jsonl", [record]), vocabulary)


def said(row: PredictedRow) -> list[dict]:
    """Position by position what was predicted."""
    return [
        {int(i): x for i, x in zip(ids, values, strict=True) if x > -np.inf}
        for ids, values in zip(row.top_ids, row.log_probs, strict=True)
    ]


def test_the_plain_shape(tmp_path, teacher, vocabulary):
    row = line(tmp_path, logprob_kit.plain(teacher, IDS, K), vocabulary)
    assert row.ids.tolist() == IDS
    assert row.positions.tolist() == list(range(len(IDS) - 1))
    assert said(row) == [dict(entry) for entry in logprob_kit.top(teacher, IDS, K)]
    assert not row.follows


def test_plain_positions_may_be_named(tmp_path, teacher, vocabulary):
    record = logprob_kit.plain(teacher, IDS, K)
    some = {name: [record[name][2], record[name][5]] for name in ("top_ids", "top_logprobs")}
    row = line(tmp_path, {**record, **some, "positions": [2, 5]}, vocabulary)
    assert row.positions.tolist() == [2, 5]
    assert said(row)[1] == dict(logprob_kit.top(teacher, IDS, K)[5])


def test_what_the_last_token_predicts_is_of_nothing_in_the_row(tmp_path, teacher, vocabulary):
    record = logprob_kit.plain(teacher, IDS, K)
    whole = {name: [*record[name], record[name][0]] for name in ("top_ids", "top_logprobs")}
    row = line(tmp_path, {**record, **whole}, vocabulary)
    assert said(row) == said(line(tmp_path, record, vocabulary))


@pytest.mark.parametrize("shape", [logprob_kit.vllm, logprob_kit.completions])
def test_what_a_server_answers(tmp_path, teacher, vocabulary, shape):
    """An entry stands at the token that it predicts; the first token has none."""
    row = line(tmp_path, shape(teacher, IDS, K), vocabulary)
    assert row.ids.tolist() == IDS
    assert row.positions.tolist() == list(range(len(IDS) - 1))
    assert said(row) == [dict(entry) for entry in logprob_kit.with_next(teacher, IDS, K)]
    assert row.follows


def test_a_chat_answer_predicts_the_completion_alone(tmp_path, teacher, vocabulary, tokenizer):
    record = logprob_kit.chat(teacher, IDS, K, token_bytes(tokenizer), begin=3)
    row = line(tmp_path, record, vocabulary)
    assert row.ids.tolist() == IDS
    assert row.positions.tolist() == [2, 3, 4, 5, 6]
    assert said(row) == [dict(entry) for entry in logprob_kit.with_next(teacher, IDS, K)[2:]]


def test_a_completion_is_found_in_its_whole_row_or_follows_its_prompt(
    tmp_path, teacher, vocabulary, tokenizer
):
    prompt = tokenizer("Alice was beginning")["input_ids"]
    ids = prompt + IDS
    record = logprob_kit.chat(teacher, ids, K, token_bytes(tokenizer), begin=len(prompt))
    by_ids = line(tmp_path, record, vocabulary)
    del record["prompt_token_ids"]
    for more in ({"input_ids": ids}, {"prompt": "Alice was beginning"}):
        row = line(tmp_path, {**record, **more}, vocabulary)
        assert row.ids.tolist() == ids
        assert row.positions.tolist() == by_ids.positions.tolist()


def test_parquet_columns_of_every_kind(tmp_path, teacher, vocabulary):
    """A map of Arrow, a struct with nulls (as pandas makes of dicts), or JSON text."""
    record = logprob_kit.vllm_output(teacher, IDS, K)
    value = pa.struct({"logprob": pa.float64(), "rank": pa.int64()})
    typed = pa.array([record["prompt_logprobs"]], pa.list_(pa.map_(pa.int64(), value)))
    structs = [entry and {str(i): x for i, x in entry} for entry in record["prompt_logprobs"]]
    columns = [typed, pa.array([structs]), pa.array([json.dumps(structs)])]
    wanted = [dict(entry) for entry in logprob_kit.with_next(teacher, IDS, K)]
    for column in columns:
        table = pa.table({"prompt_token_ids": [IDS], "prompt_logprobs": column})
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
        assert said(read_one(tmp_path / "rows.parquet", vocabulary)) == wanted


def test_log_0_as_json_writes_it_is_no_entry(tmp_path, vocabulary):
    record = {"input_ids": [5, 6], "top_ids": [[7, 8]], "top_logprobs": [[-0.1, -9999.0]]}
    assert said(line(tmp_path, record, vocabulary)) == [{7: -0.1}]


PLAIN = {"input_ids": [5, 6, 7], "top_ids": [[6], [7]], "top_logprobs": [[-0.5], [-0.5]]}
CONTENT = [{"token": "A", "bytes": [65], "logprob": -1.0, "top_logprobs": []}]


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        (3, "3 is not an object"),
        ({}, "no known shape"),
        ({"input_ids": [1, 2], "scores": []}, r"no known shape \(its keys: input_ids, scores\)"),
        ({**PLAIN, "top_ids": [[6]]}, "1 entries of top_ids and 2 of top_logprobs"),
        ({**PLAIN, "top_ids": [[6], [7, 8]]}, r"2 entries of top_ids\[1\] and 1 of top_log"),
        ({**PLAIN, "input_ids": [5]}, "1 input_ids and 2 entries of top_logprobs"),
        ({**PLAIN, "positions": [0]}, "1 entries of positions and 2 of top_logprobs"),
        ({**PLAIN, "top_logprobs": [["x"], [-1]]}, "position 0: 'x' is no log-probability"),
        ({**PLAIN, "top_logprobs": [[None], [-1]]}, "position 0: None is no log-probability"),
        ({**PLAIN, "top_ids": [["a"], [7]]}, "'a' is no token id"),
        ({**PLAIN, "input_ids": [5.0, 6, 7]}, "5.0 is no token id"),
        ({**PLAIN, "input_ids": 5}, "not as its shape has it"),
        ({"prompt_logprobs": [None]}, "prompt_logprobs without prompt_token_ids"),
        ({"prompt_token_ids": [1, 2], "prompt_logprobs": [None]}, "2 entries of prompt_token_ids"),
        ({"prompt_token_ids": [1, 2], "prompt_logprobs": [None, None]}, "token 1 has no log-prob"),
        (
            {"prompt_token_ids": [1, 2], "prompt_logprobs": [{"1": -1.0}, {"2": -1.0}]},
            "nothing came before it",
        ),
        ({"choices": [{}, {}]}, "one entry"),
        ({"logprobs": {"content": CONTENT}}, "not what came before it"),
        ({"logprobs": {"content": CONTENT}, "input_ids": [1, 2]}, "nowhere in input_ids"),
    ],
)
def test_what_is_not_as_its_shape_has_it_is_refused(tmp_path, vocabulary, record, fault):
    with pytest.raises(ValueError, match=fault):
        line(tmp_path, record, vocabulary)


def test_a_token_whose_id_cannot_be_told_is_refused(tmp_path, tokenizer):
    """No id stands for it, or two do."""
    vocabulary = Vocabulary(tokenizer, len(tokenizer))
    whole = list(token_bytes(tokenizer)[70])
    record = {"prompt_token_ids": [5], "logprobs": {"content": [dict(CONTENT[0], bytes=whole)]}}
    assert line(tmp_path, record, vocabulary).ids.tolist() == [5, 70]
    vocabulary._by_bytes[bytes(whole)] = [70, 71]
    with pytest.raises(ValueError, match=r"has 2 ids \(70, 71\) for the token"):
        line(tmp_path, record, vocabulary)
    record["logprobs"]["content"][0]["bytes"] = list(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match=r"has no id for the token .*; ask the server"):
        line(tmp_path, record, vocabulary)


def test_only_two_kinds_of_files_are_read(tmp_path, vocabulary):
    for name, fault in {"a.csv": "unknown ending '.csv'", "a.jsonl": "no such file"}.items():
        with pytest.raises(InputError, match=fault):
            list(read(tmp_path / name, vocabulary))


def test_a_line_that_is_not_json_is_a_fault_of_its_row(tmp_path, vocabulary):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PLAIN) + "\n{\n" + json.dumps(PLAIN) + "\n")
    found = list(read(path, vocabulary))
    assert [place for place, _ in found] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert isinstance(found[1][1], ValueError)
