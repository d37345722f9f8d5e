"""Tiny real models, made once a session: the same classes that users load, a few kilobytes big."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PROSE = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having "
    "nothing to do. Once or twice she had peeped into the book her sister was reading, but it had "
    "no pictures or conversations in it, and what is the use of a book, thought Alice, without "
    "pictures or conversations? So she was considering in her own mind, as well as she could, for "
    "the hot day made her feel very sleepy and stupid, whether the pleasure of making a "
    "daisy-chain would be worth the trouble of getting up and picking the daisies, when suddenly "
    "a White Rabbit with pink eyes ran close by her."
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--real` runs the quickstart on the real teacher, `--faults` many more faults: minutes."""
    parser.addoption("--real", action="store_true", help="run the quickstart (takes minutes)")
    parser.addoption("--faults", action="store_true", help="many more kills and damaged bytes")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker of what `--real` runs."""
    config.addinivalue_line("markers", "quickstart: runs with --real only (takes minutes)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the quickstart unless it is asked for."""
    if not config.getoption("--real"):
        for item in items:
            if item.get_closest_marker("quickstart"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: run it with --real"))


@pytest.fixture(scope="session")
def all_faults(request: pytest.FixtureRequest) -> bool:
    """Whether `--faults` asks for many faults, not a few."""
    return bool(request.config.getoption("--faults"))


@pytest.fixture(scope="session")
def prose() -> str:
    """A paragraph of English."""
    return PROSE


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """A byte-level BPE of 400 tokens with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [PROSE],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        pad_token="<|im_end|>",
    )
    fast.chat_template = TEMPLATE
    return fast


def make_llama(folder: Path, tokenizer, *, layers: int, hidden: int, seed: int, **config) -> Path:
    """Save a random Llama with its tokenizer; its large weights give it opinions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | config
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A Llama of 4 layers and width 32."""
    return make_llama(
        tmp_path_factory.mktemp("models") / "teacher", tokenizer, layers=4, hidden=32, seed=1
    )


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A Llama of 1 layer and width 16 with the teacher's tokenizer."""
    return make_llama(
        tmp_path_factory.mktemp("models") / "student", tokenizer, layers=1, hidden=16, seed=2
    )
