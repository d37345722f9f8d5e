"""Rows to token rows: what counts, what is cut, what is held out."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdframe.data import Counts, Dataset, check_transforms, fingerprint, load
from kdframe.errors import InputError
from kdframe.experiment import Data

VOCABULARY = 400


@pytest.fixture
def loaded(tmp_path, tokenizer):
    """Load rows written to a file; validation is a file of its own unless a share is asked for."""

    def make(records: list, *, tokenizer=tokenizer, vocab_size=VOCABULARY, **settings) -> Dataset:
        train = write(tmp_path / "train.jsonl", records)
        if "validation" not in settings:
            settings["validation"] = write(tmp_path / "held.jsonl", [{"text": "held out"}])
        data = Data.model_validate({"train": train} | settings)
        return load(data, tokenizer, vocab_size)

    return make


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of transforms that can be imported as `name`."""

    def make(name: str, text: str) -> Path:
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        return path

    return make


def write(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def faults(loaded, *arguments, **settings) -> list[str]:
    with pytest.raises(InputError) as caught:
        loaded(*arguments, **settings)
    return list(caught.value.faults)


def spelled(rows, tokenizer, i: int = 0) -> str:
    """The text of the labels that count."""
    return tokenizer.decode(rows.row(i)[rows.positions(i) + 1])


def texts(rows, tokenizer) -> list[str]:
    return [tokenizer.decode(rows.row(i)) for i in range(len(rows))]


def chat(*contents: str) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


# ----------------------------------------------------------------------------------- what counts
def test_text_is_tokenised_as_the_tokenizer_does_it_and_every_label_counts(loaded, tokenizer):
    rows = loaded([{"text": "Alice was tired"}]).train
    ids = tokenizer("Alice was tired")["input_ids"]
    assert rows.row(0).tolist() == ids
    assert rows.positions(0).tolist() == list(range(len(ids) - 1))
    assert rows.text_bytes[0] == len(b"Alice was tired") - len(tokenizer.decode(ids[:1]))


def test_the_tokenizers_own_bos_is_kept_and_spells_nothing(loaded, tokenizer):
    from tokenizers.processors import TemplateProcessing

    own = copy.deepcopy(tokenizer)
    bos = own.bos_token_id
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    rows = loaded([{"text": "Alice was"}], tokenizer=own).train
    assert rows.row(0).tolist() == [bos, *tokenizer("Alice was")["input_ids"]]
    assert rows.text_bytes[0] == len("Alice was")


def test_only_the_assistants_turns_count(loaded, tokenizer):
    records = [{"messages": chat("a book", "yes", "a rabbit", "no")}]
    rows = loaded(records).train
    assert spelled(rows, tokenizer) == "yes<|im_end|>\nno<|im_end|>\n"
    assert rows.text_bytes[0] == len("yes\nno\n")
    whole = tokenizer.apply_chat_template(records[0]["messages"], tokenize=False)
    assert texts(rows, tokenizer) == [whole]


def test_all_of_a_conversation_counts_where_asked(loaded):
    rows = loaded([{"messages": chat("a book", "yes")}], chat_loss="all").train
    assert rows.counted_tokens == len(rows.row(0)) - 1


def test_an_answer_may_come_first(loaded, tokenizer):
    rows = loaded([{"messages": [{"role": "assistant", "content": "hello"}]}]).train
    assert spelled(rows, tokenizer) == "hello<|im_end|>\n"


def test_the_completion_and_the_end_count(loaded, tokenizer):
    rows = loaded([{"prompt": "What is a book?", "completion": " Pictures"}]).train
    assert spelled(rows, tokenizer) == " Pictures<|im_end|>"
    assert rows.row(0)[-1] == tokenizer.eos_token_id
    assert rows.text_bytes[0] == len(" Pictures")


def test_an_end_that_the_tokenizer_adds_itself_is_not_doubled(loaded, tokenizer):
    from tokenizers.processors import TemplateProcessing

    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", own.eos_token_id)]
    )
    record = {"prompt": "What is a book?", "completion": " Pictures"}
    rows = loaded([record], tokenizer=own).train
    assert spelled(rows, tokenizer) == " Pictures<|im_end|>"
    assert rows.row(0).tolist().count(own.eos_token_id) == 1
    assert rows.text_bytes[0] == len(" Pictures")


def test_a_completion_of_messages_counts(loaded, tokenizer):
    prompt, completion = chat("a book", "yes", "why"), chat("", "so it is")[1:]
    rows = loaded([{"prompt": prompt, "completion": completion}]).train
    assert spelled(rows, tokenizer) == "so it is<|im_end|>\n"


@given(prompt=st.text(min_size=1), completion=st.text(min_size=1))
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_bytes_of_a_completion_are_those_of_its_text(loaded, tokenizer, prompt, completion):
    # A newline keeps the last token of the prompt from reaching into the completion.
    prompt, completion = "Q" + prompt + ":", "\n" + completion
    rows = loaded([{"prompt": prompt, "completion": completion}]).train
    total = len((prompt + completion).encode())
    labels = rows.row(0)[rows.positions(0) + 1]
    uncounted = tokenizer.decode(rows.row(0)[: len(rows.row(0)) - len(labels)])
    assert rows.text_bytes[0] == total - len(uncounted.encode())


def test_an_unstable_template_is_refused_with_the_way_out(loaded, tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% for m in messages %}{{ m['role'] }}{% if loop.last %}!{% endif %}{{ m['content'] }}"
        "{% endfor %}"
    )
    records = [{"messages": chat("a", "b", "c", "d")}]
    (fault,) = faults(loaded, records, tokenizer=own)
    assert "train.jsonl:1: the chat template renders" in fault
    assert "`data.chat_loss: all`" in fault
    assert len(loaded(records, tokenizer=own, chat_loss="all").train) == 1


def test_a_template_that_refuses_a_row_names_it(loaded, tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{{ raise_exception('roles must alternate') }}"
    (fault,) = faults(loaded, [{"messages": chat("a", "b")}], tokenizer=own)
    assert fault.endswith("train.jsonl:1: chat template: roles must alternate; mend the messages")


def test_no_template_is_one_fault_of_the_source(loaded, tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = None
    (fault,) = faults(loaded, [{"messages": chat("a", "b")}] * 3, tokenizer=own)
    assert "train.jsonl: has conversations, and the tokenizer has no chat template" in fault


def test_a_slow_tokenizer_is_refused(loaded):
    class Slow:
        is_fast = False
        name_or_path = "slow/one"

    assert faults(loaded, [{"text": "a"}], tokenizer=Slow()) == [
        "slow/one: a slow tokenizer; add its tokenizer.json"
    ]


def test_ids_outside_the_vocabulary_are_named(loaded):
    (fault, *_) = faults(loaded, [{"text": "Alice was"}], vocab_size=10)
    assert "train.jsonl:1: token id " in fault
    assert "vocabulary of 10" in fault


def test_order_and_shapes_may_mix(loaded, tokenizer):
    records = [{"text": "one"}, {"messages": chat("a", "b")}, {"text": "three"}]
    rows = loaded(records).train
    assert texts(rows, tokenizer)[0] == "one"
    assert texts(rows, tokenizer)[2] == "three"


# ------------------------------------------------------------------------------------- long rows
LONG = "Alice was beginning to get very tired of sitting by her sister on the bank"


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_cuts_one_side_and_is_counted(loaded, tokenizer, side):
    ids = tokenizer(LONG)["input_ids"]
    made = loaded([{"text": LONG}], max_length=5, truncation_side=side)
    assert made.train.row(0).tolist() == (ids[:5] if side == "right" else ids[-5:])
    assert made.counts["train"].truncated == 1
    assert made.counts["train"].tokens_cut == len(ids) - 5


@pytest.mark.parametrize("length", [2, 3, 5, 1000])
def test_windows_hold_all_tokens_but_a_lonely_last(loaded, tokenizer, length):
    ids = tokenizer(LONG)["input_ids"]
    made = loaded([{"text": LONG}], max_length=length, long_rows="split")
    lonely = len(ids) % length == 1
    assert made.train.ids.tolist() == (ids[:-1] if lonely else ids)
    assert made.counts["train"].tokens_cut == lonely
    assert made.counts["train"].split == (length < 1000)
    assert made.counts["train"].kept == len(made.train)
    assert not made.train.counted[made.train.offsets[1:] - 1].any()


def test_rows_without_text_or_labels_are_left_out_and_reported(loaded):
    records = [
        {"text": "Alice was"},
        {"text": "  "},
        {"text": "a"},
        {"messages": [{"role": "user", "content": "nobody answers"}]},
        {"messages": []},
    ]
    made = loaded(records)
    counts = made.counts["train"]
    assert (counts.read, counts.kept) == (5, 1)
    assert (counts.empty, counts.nothing_to_learn) == (3, 1)
    assert [place.rpartition(":")[2] for place in counts.examples["empty"]] == ["2", "3", "5"]
    assert any(line.startswith("3 rows left out: fewer than 2 tokens (") for line in counts.lines())


def test_an_empty_set_says_why(loaded, tmp_path):
    (fault,) = faults(loaded, [{"text": "a"}])
    assert fault.startswith("data.train: no rows are left (1 rows read; 1 rows left out: fewer")
    empty = write(tmp_path / "test.jsonl", [])
    (fault,) = faults(loaded, [{"text": "Alice was"}], test={"far": empty})
    assert fault.startswith("data.test.far: no rows are left (none were read)")


def test_three_places_are_examples():
    counts = Counts()
    for number in range(5):
        counts.drop("empty", f"a:{number}")
    assert counts.lines() == ["5 rows left out: fewer than 2 tokens (a:0, a:1, a:2)"]
    assert counts.plain()["empty"] == 5
    assert json.loads(json.dumps(counts.plain())) == counts.plain()


def test_faults_of_all_sources_are_found_at_once(loaded, tmp_path):
    bad = write(tmp_path / "bad.jsonl", [{"text": 1}])
    found = faults(loaded, [{"text": 2}], test={"far": bad})
    assert [fault.partition(": ")[0] for fault in found] == [
        f"{tmp_path}/train.jsonl:1",
        f"{bad}:1",
    ]


def test_sources_carry_their_weight_and_whether_they_are_taught(tmp_path, tokenizer):
    taught = write(tmp_path / "a.jsonl", [{"text": "Alice was"}])
    hard = {
        "path": write(tmp_path / "b.jsonl", [{"text": "Rabbit ran"}]),
        "teacher": False,
        "weight": 2,
    }
    data = Data.model_validate(
        {"train": [taught, hard], "validation": taught, "test": {"t": taught}}
    )
    made = load(data, tokenizer, VOCABULARY)
    assert made.train.taught.tolist() == [True, False]
    assert made.train.weights.tolist() == [1, 2]
    assert texts(made.test["t"], tokenizer) == ["Alice was"]
    assert set(made.counts) == {"train", "validation", "test.t"}


# ------------------------------------------------------------------------------------ validation
def held_texts(made: Dataset, tokenizer) -> set[str]:
    return set(texts(made.validation, tokenizer))


def test_a_share_is_held_out_by_text_whatever_the_order(loaded, tokenizer):
    records = [{"text": f"row {number % 300}"} for number in range(600)]
    made = loaded(records, validation=0.2)
    held = held_texts(made, tokenizer)
    assert not held & set(texts(made.train, tokenizer))
    assert len(made.train) + len(made.validation) == 600
    assert 30 < len(held) < 90
    again = loaded(records[::-1], validation=0.2)
    assert held_texts(again, tokenizer) == held


def test_a_grown_set_moves_no_row_to_the_other_side(loaded, tokenizer):
    records = [{"text": f"row {number}"} for number in range(200)]
    small = held_texts(loaded(records[:150], validation=0.2), tokenizer)
    large = held_texts(loaded(records, validation=0.2), tokenizer)
    assert small <= large


@pytest.mark.parametrize("share", [0.0001, 0.9999])
def test_two_texts_are_enough_for_both_sides(loaded, share):
    made = loaded([{"text": "Alice was"}, {"text": "Rabbit ran"}], validation=share)
    assert len(made.train) == len(made.validation) == 1


def test_one_text_holds_nothing_out(loaded):
    made = loaded([{"text": "Alice was"}] * 3, validation=0.9)
    assert (len(made.train), len(made.validation)) == (3, 0)


def test_validation_rows_are_taught_and_their_text_is_nowhere_in_training(tmp_path, tokenizer):
    same = [{"text": f"row {number}"} for number in range(50)]
    taught = write(tmp_path / "a.jsonl", same)
    hard = {"path": write(tmp_path / "b.jsonl", same), "teacher": False}
    data = Data.model_validate({"train": [taught, hard], "validation": 0.2})
    made = load(data, tokenizer, VOCABULARY)
    assert made.validation.taught.all()
    assert len(made.validation) == made.counts["train"].held_out > 0
    assert not held_texts(made, tokenizer) & set(texts(made.train, tokenizer))


# ------------------------------------------------------------------------------------ transforms
def test_transforms_run_in_order_on_training_rows_only(loaded, module, tokenizer):
    module(
        "augment",
        "def double(row): return [row, {'text': row['text'] + ' two'}]\n"
        "def drop(row): return None if row['text'] == 'Rabbit ran' else row\n",
    )
    made = loaded(
        [{"text": "Alice was"}, {"text": "Rabbit ran"}],
        transforms=["augment:drop", "augment:double"],
    )
    assert texts(made.train, tokenizer) == ["Alice was", "Alice was two"]
    assert texts(made.validation, tokenizer) == ["held out"]
    assert (made.counts["train"].read, made.counts["train"].dropped) == (2, 1)
    assert made.counts["train"].examples["dropped"][0].endswith("train.jsonl:2")


def test_the_split_comes_before_transforms(loaded, module, tokenizer):
    module("constant", "def same(row): return {'text': 'the same'}\n")
    records = [{"text": f"row {number}"} for number in range(50)]
    made = loaded(records, validation=0.2, transforms=["constant:same"])
    assert set(texts(made.train, tokenizer)) == {"the same"}
    assert "the same" not in held_texts(made, tokenizer)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("1 / 0", "transform 'wrong:make' raised ZeroDivisionError: division by zero"),
        ("return 'text'", "transform 'wrong:make' gave 'text'; return dicts"),
        ("return {'text': 3}", "text is 3"),
        ("return {'body': 'x'}", "has neither text"),
    ],
)
def test_a_transform_that_fails_names_the_row(loaded, module, monkeypatch, body, reason):
    import sys

    monkeypatch.delitem(sys.modules, "wrong", raising=False)
    module("wrong", f"def make(row):\n    {body}\n")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (fault,) = faults(loaded, [{"text": "Alice was"}], transforms=["wrong:make"])
    assert f"train.jsonl:1: {reason}" in fault


def test_a_transform_that_is_not_there_is_a_static_fault(loaded, module):
    module("partial_one", "constant = 1\n")
    names = ("nowhere:make", "partial_one:make", "partial_one:constant")
    data = Data.model_validate({"train": "a.jsonl", "transforms": names})
    found = check_transforms(data)
    assert [fault.split("'")[1] for fault in found] == list(names)
    assert "ModuleNotFoundError" in found[0]
    assert faults(loaded, [{"text": "Alice was"}], transforms=names) == found


# ----------------------------------------------------------------------------------- fingerprint
def test_the_fingerprint_sees_rows_and_transforms(tmp_path, module):
    transforms = module("seen", "def make(row): return row\n")
    held = write(tmp_path / "held.jsonl", [{"text": "held"}])
    train = write(tmp_path / "train.jsonl", [{"text": "one"}])
    data = Data.model_validate({"train": train, "validation": held, "transforms": ["seen:make"]})
    first = fingerprint(data)
    assert first == fingerprint(data)
    write(tmp_path / "held.jsonl", [{"text": "other"}])
    second = fingerprint(data)
    transforms.write_text("def make(row): return None\n")
    assert len({first, second, fingerprint(data)}) == 3
