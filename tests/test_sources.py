"""Files to rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdframe.errors import InputError
from kdframe.experiment import Source
from kdframe.sources import check, content_hash, read


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def rows(path: Path, **settings: object) -> list[dict]:
    return [row for _, row in read(Source(path=str(path), **settings))]


def places(path: Path, **settings: object) -> list[str]:
    return [place.removeprefix(f"{path}:") for place, _ in read(Source(path=str(path), **settings))]


def faults(path: Path, **settings: object) -> list[str]:
    with pytest.raises(InputError) as caught:
        rows(path, **settings)
    return list(caught.value.faults)


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


# --------------------------------------------------------------------------------- kinds of file
def test_jsonl_rows_have_their_line_and_blank_lines_are_none(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n  \n{"text": "two\xe2\x80\xa8"}')
    assert rows(path) == [{"text": "one"}, {"text": "two\u2028"}]
    assert places(path) == ["1", "4"]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_may_be_a_list(tmp_path, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=indent))
    assert rows(path) == [{"text": "one"}, {"text": "two"}]
    assert places(path) == (["2", "5"] if indent else ["1", "1"])


def test_json_may_be_lines(tmp_path):
    assert rows(write(tmp_path / "a.json", {"text": "one"}, {"text": "two"})) == [
        {"text": "one"},
        {"text": "two"},
    ]


def test_a_list_that_breaks_off_is_a_fault(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"text": "one"},\n{"text": "tw')
    assert faults(path)[0].startswith(f'{path}:3: \'{{"text": "tw\' is not JSON')


def test_parquet_nulls_are_no_columns(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist(
        [{"text": "one", "messages": None}, {"text": None, "messages": CHAT}]
    )
    pyarrow.parquet.write_table(table, path)
    assert rows(path) == [{"text": "one"}, {"messages": CHAT}]
    assert places(path) == ["row 1", "row 2"]


def test_damaged_parquet_is_a_fault(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 nothing")
    assert faults(path)[0].startswith(f"{path}:row 1: not parquet")


TEXT = "one\ntwo\n\n \nthree\n"


@pytest.mark.parametrize(
    ("sample_by", "texts", "lines"),
    [
        ("line", ["one", "two", "three"], ["1", "2", "5"]),
        ("paragraph", ["one\ntwo", "three"], ["1", "5"]),
        ("document", ["one\ntwo\n\n \nthree"], ["1"]),
    ],
)
def test_text_is_sampled_by_line_paragraph_or_document(tmp_path, sample_by, texts, lines):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    assert [row["text"] for row in rows(path, sample_by=sample_by)] == texts
    assert places(path, sample_by=sample_by) == lines


INK = st.characters(codec="utf-8", exclude_characters="\r\n\ufeff")


@given(st.lists(st.text(INK)))
def test_every_line_with_ink_is_one_row(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes("\n".join(lines).encode())
    assert [row["text"] for row in rows(path)] == [line for line in lines if line.strip()]


def test_a_folder_is_its_files_in_order_of_name(tmp_path):
    write(tmp_path / "b.jsonl", {"text": "two"})
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "README.md").write_text("not data")
    assert rows(tmp_path) == [{"text": "one"}, {"text": "two"}]


def test_saved_datasets_are_read_by_split(tmp_path):
    import datasets

    made = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "held")}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "both")
    made["held"].save_to_disk(tmp_path / "one")
    assert rows(tmp_path / "both", split="held") == [{"text": "held"}]
    assert rows(tmp_path / "one") == [{"text": "held"}]
    source = Source(path=str(tmp_path / "both"), split="test")
    assert check(source) == [
        f"{tmp_path}/both: no split 'test' (there are: train, held); mend `split`"
    ]
    wrong = Source(path=str(tmp_path / "both"), columns={"text": "body"})
    assert check(wrong) == [
        f"{tmp_path}/both/train: no column 'body' (there are: text); mend `columns`"
    ]


def test_a_hub_name_that_cannot_be_loaded_is_named():
    with pytest.raises(InputError, match=r"^nobody/nothing: no such path, and not a dataset"):
        list(read(Source(path="nobody/nothing")))


def test_limit_takes_the_first_rows_over_all_files(tmp_path):
    write(tmp_path / "a.jsonl", {"text": "1"}, {"text": "2"})
    write(tmp_path / "b.jsonl", {"text": "3"}, {"text": 4})
    assert rows(tmp_path, limit=3) == [{"text": "1"}, {"text": "2"}, {"text": "3"}]


# -------------------------------------------------------------------------------------- columns
def test_sharegpt_conversations_become_messages(tmp_path):
    talk = [
        {"from": "system", "value": "be kind"},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "yes"},
    ]
    path = write(tmp_path / "a.jsonl", {"id": 7, "conversations": talk})
    system = {"role": "system", "content": "be kind"}
    assert rows(path) == [{"id": 7, "messages": [system, *CHAT]}]


def test_response_is_a_completion(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "1+1=", "response": "2"})
    assert rows(path) == [{"prompt": "1+1=", "completion": "2"}]


def test_columns_rename_and_choose_the_shape(tmp_path):
    path = write(tmp_path / "a.jsonl", {"body": "b", "messages": CHAT, "id": 1})
    assert rows(path, columns={"text": "body"}) == [{"id": 1, "text": "b"}]
    assert rows(path) == [{"id": 1, "body": "b", "messages": CHAT}]


def test_columns_may_swap_names(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "answer", "completion": "question"})
    swap = {"prompt": "completion", "completion": "prompt"}
    assert rows(path, columns=swap) == [{"prompt": "question", "completion": "answer"}]


# --------------------------------------------------------------------------------------- faults
def test_every_unreadable_row_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "good"}',
        b'{"text": "broken',
        b'["a list"]',
        b'{"text": "\xff"}',
        b'{"text": 5}',
        b'{"messages": [{"role": "user"}]}',
        b'{"messages": "hi"}',
        b'{"body": "x", "text": null}',
        b'{"text": "\\ud800"}',
        b'{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}',
    ]
    path.write_bytes(b"\n".join(lines))
    expected = [
        ':2: \'{"text": "broken\' is not JSON',
        ":3: ['a list'] is not an object",
        ":4: byte 0xff at column 11 is not UTF-8",
        ":5: text is 5; it must be a string",
        ":6: messages has {'role': 'user'}; write a list of objects with role and content",
        ":7: messages has 'hi'",
        ":8: has neither text, nor messages, nor prompt and completion (its columns: body, text;",
        ":9: text is '\\ud800'",
        ":10: prompt is 'a' and completion [",
    ]
    found = faults(path)
    assert len(found) == len(expected)
    for fault, start in zip(found, expected, strict=True):
        assert fault.startswith(f"{path}{start}")
        assert "\n" not in fault


def test_good_rows_come_before_the_faults(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "good"}, {"text": 5}, {"text": "good too"})
    found = []
    with pytest.raises(InputError):
        found.extend(row["text"] for _, row in read(Source(path=str(path))))
    assert found == ["good", "good too"]


def test_twenty_faults_are_named_and_the_others_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"text": number} for number in range(25)])
    found = faults(path)
    assert len(found) == 21
    assert found[-1] == "... and 5 more rows that cannot be used"


def test_a_missing_column_names_those_there_are(tmp_path):
    path = write(tmp_path / "a.jsonl", {"id": 1, "content": "x"})
    assert faults(path, columns={"text": "body"}) == [
        f"{path}:1: no column 'body' (there are: id, content); mend `columns`"
    ]


# ---------------------------------------------------------------------------------------- check
def test_check_finds_what_is_missing_or_unknown(tmp_path):
    (tmp_path / "a.csv").write_text("text\n")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()

    def found(name: str) -> list[str]:
        return check(Source(path=str(tmp_path / name)))

    assert found("b.jsonl") == [f"{tmp_path}/b.jsonl: no such file or folder; mend `path`"]
    assert found("a.csv")[0].startswith(f"{tmp_path}/a.csv: unknown ending '.csv'")
    assert found("empty.jsonl")[0].startswith(f"{tmp_path}/empty.jsonl: is empty")
    assert found("folder")[0].startswith(f"{tmp_path}/folder: holds no .jsonl")
    assert check(Source(path="rows.jsonl"))
    assert check(Source(path="org/name")) == []


def test_check_reads_only_the_head(tmp_path):
    line = json.dumps({"text": "word " * 200}) + "\n"
    for ending in ("jsonl", "json", "txt"):
        path = tmp_path / f"a.{ending}"
        path.write_text(line * 5000 + ("{broken\n" if ending != "txt" else ""))
        assert check(Source(path=str(path))) == []
    bad = tmp_path / "b.jsonl"
    bad.write_text(line * 2000 + "{broken\n" + line * 5000)
    assert len(check(Source(path=str(bad)))) == 1


def test_check_of_a_large_list_stops_within_it(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "wörd " * 200}] * 6000, ensure_ascii=False))
    assert path.stat().st_size > 5 << 20
    assert check(Source(path=str(path))) == []


def test_check_is_quick_and_needs_neither_torch_nor_datasets(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"text": "short"}) + "\n") * 500_000)
    started = time.process_time()
    assert check(Source(path=str(path))) == []
    assert time.process_time() - started < 1  # 0.1 s where nothing else runs
    program = (
        "import sys; from kdframe import sources, data, batching; "
        "from kdframe.experiment import Source; "
        f"assert sources.check(Source(path={str(path)!r})) == []; "
        "assert not {'torch', 'datasets', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ)


# ----------------------------------------------------------------------------------------- hash
def test_the_hash_is_of_the_bytes_not_of_the_place(tmp_path):
    first = write(tmp_path / "a.jsonl", {"text": "one"})
    same = write(tmp_path / "b.jsonl", {"text": "one"})
    other = write(tmp_path / "c.jsonl", {"text": "two"})
    hashes = [content_hash(Source(path=str(path))) for path in (first, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    folder = content_hash(Source(path=str(tmp_path)))
    write(tmp_path / "c.jsonl", {"text": "three"})
    assert content_hash(Source(path=str(tmp_path))) != folder
    assert content_hash(Source(path="org/a")) != content_hash(Source(path="org/b"))
