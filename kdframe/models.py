"""Models: the frozen teacher, the student that trains, and the folder it is saved in.

Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdframe.cache_parts import TeacherShape
from kdframe.errors import InputError
from kdframe.experiment import Student, Teacher
from kdframe.gguf_files import quick_reader
from kdframe.locating import Located, explained, locate
from kdframe.students import add_lora, cut_layers, seeded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "causal_lm",
    "load_folder",
    "load_student",
    "load_teacher",
    "output_shape",
    "parameter_count",
    "pick_device",
    "save",
]

# Where a library notes which file a model came from: nobody else's business.
_ORIGINS = ("_name_or_path", "_model_name_or_path", "quantization_config")
_SAMPLING = ("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p")


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` takes a GPU if there is one.

    Raises:
        InputError: this machine has none.
    """
    import torch

    usable = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in usable.items() if there)
    if not usable.get(name, False):
        there = ", ".join(kind for kind, works in usable.items() if works)
        raise InputError(f"runtime.device: {name!r} cannot be used here; use one of: {there}")
    return torch.device(name)


def load_teacher(teacher: Teacher, device: torch.device) -> PreTrainedModel:
    """The teacher on `device` (or spread by its `device_map`), an adapter merged in.

    Frozen for good: no parameter takes gradients, and `train()` does not bring dropout back.

    Raises:
        InputError: it cannot be found or loaded; names the remedy.
    """
    options: dict[str, Any] = {}
    if teacher.quantize is not None:
        options = {"quantization_config": _quantization(teacher), "device_map": {"": device}}
    if teacher.device_map is not None:
        options["device_map"] = teacher.device_map
    with _quiet():
        model = _load("teacher.model", teacher, options)
        if teacher.adapter is not None:
            model = _with_adapter(model, teacher.adapter)
    return _frozen(model if "device_map" in options else model.to(device))


def load_student(
    student: Student,
    *,
    teacher: Teacher,
    teacher_model: PreTrainedModel | None,
    device: torch.device,
    seed: int,
) -> PreTrainedModel:
    """The student on `device`, in training mode; with LoRA a PeftModel of which only that trains.

    A cut takes its layers from `teacher_model`, or from the teacher loaded for the purpose.

    Raises:
        InputError: it cannot be found, loaded or cut; names the remedy.
    """
    import torch

    with _quiet():
        if student.from_teacher is None:
            with seeded(seed):
                model = _load("student.model", student, {})
        else:
            whole = _cuttable(teacher, teacher_model)
            model = cut_layers(whole, student.from_teacher, getattr(torch, student.dtype))
        if student.lora is not None:
            model = add_lora(model, student.lora, seed)
    return model.to(device).train()


def load_folder(folder: Path, device: torch.device) -> PreTrainedModel:
    """A saved model on `device`, to be measured: float32, frozen, in evaluation mode.

    Raises:
        InputError: it cannot be found or loaded; names the remedy.
    """
    return load_teacher(Teacher(model=str(folder), dtype="float32"), device)


def causal_lm(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself; of a PeftModel the one inside, its adapters still in place."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def output_shape(
    model: str, revision: str | None = None, trust_remote_code: bool = False
) -> TeacherShape:
    """The widths of a model's logits and last hidden states, from its configuration alone.

    Raises:
        InputError: it cannot be found or read; names the remedy.
    """
    from transformers import AutoConfig

    found = locate(model)
    options: dict[str, Any] = {} if found.file is None else {"gguf_file": found.file}
    with _quiet(), explained("configuration of model", model), quick_reader():
        config = AutoConfig.from_pretrained(
            found.path, revision=revision, trust_remote_code=trust_remote_code, **options
        )
    text = config.get_text_config()
    return TeacherShape(int(text.vocab_size), int(text.hidden_size))


def parameter_count(model: PreTrainedModel) -> int:
    """How many parameters there are, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    adapter_out: Path | None = None,
) -> None:
    """Fill the folder `out` with a model that plain transformers loads.

    LoRA is merged into a copy; the model that trains is not changed. Its adapter alone goes to
    `adapter_out`. Tokenizer, chat template and generation settings go with the model.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    plain = model
    with _quiet():
        if hasattr(model, "peft_config"):
            if adapter_out is not None:
                model.save_pretrained(adapter_out, save_embedding_layers=False)
            plain = copy.deepcopy(model).merge_and_unload()
        config, generation = plain.config, plain.generation_config
        try:
            plain.config = _without_origins(config)
            plain.generation_config = _generation(plain, tokenizer)
            plain.save_pretrained(out)
        finally:
            plain.config, plain.generation_config = config, generation
        tokenizer.save_pretrained(out)


def _cuttable(teacher: Teacher, loaded: PreTrainedModel | None) -> PreTrainedModel:
    """The teacher with plain weights in one place."""
    import torch

    if loaded is not None and teacher.quantize is None and teacher.device_map is None:
        return loaded
    plain = teacher.model_copy(update={"quantize": None, "device_map": None})
    return load_teacher(plain, torch.device("cpu"))


def _load(field: str, section: Teacher | Student, options: dict[str, Any]) -> PreTrainedModel:
    """Load a causal language model, every weight of it from its files."""
    from transformers import AutoModelForCausalLM

    found = locate(section.model or "")
    with explained(field, section.model or ""), contextlib.ExitStack() as stack:
        if found.kind == "gguf":
            options |= _gguf_options(found, section)
            stack.enter_context(quick_reader())
        model, info = AutoModelForCausalLM.from_pretrained(
            found.path,
            **{"dtype": _dtype(section.dtype, found), "revision": section.revision} | options,
            trust_remote_code=section.trust_remote_code,
            output_loading_info=True,
        )
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if absent:
        raise InputError(
            f"{field} {section.model!r} lacks weights that {type(model).__name__} needs "
            f"({len(absent)}, the first is {absent[0]}); name a whole causal language model"
        )
    return _plain(model) if found.kind == "gguf" else model


def _dtype(name: str, found: Located) -> Any:
    import torch

    if name == "auto":
        return torch.float32 if found.kind == "gguf" else "auto"
    return getattr(torch, name)


def _gguf_options(found: Located, section: Teacher | Student) -> dict[str, Any]:
    from transformers import GgufConfig

    if isinstance(section, Teacher) and section.quantize is not None:
        raise InputError(
            f"teacher.quantize: {section.quantize!r} does not go with a .gguf file, "
            "which is dequantised while loading; leave it out"
        )
    return {"gguf_file": found.file, "quantization_config": GgufConfig(dequantize=True)}


def _plain(model: Any) -> PreTrainedModel:
    """Drop what transformers leaves on a dequantised model: it would refuse to save it."""
    for name in _ORIGINS[1:]:
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.hf_quantizer = model.quantization_method = None
    model.is_quantized = False
    return model


def _quantization(teacher: Teacher) -> Any:
    import torch

    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"teacher.quantize: {teacher.quantize!r} needs bitsandbytes; "
            "`pip install 'kdframe[bitsandbytes]'`"
        )
    from transformers import BitsAndBytesConfig

    if teacher.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.float32 if teacher.dtype == "auto" else getattr(torch, teacher.dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute)


def _with_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    from peft import PeftModel

    found = locate(adapter, holds="adapter_config.json")
    with explained("teacher.adapter", adapter):
        return PeftModel.from_pretrained(model, found.path).merge_and_unload()


def _frozen(model: Any) -> PreTrainedModel:
    """In evaluation mode whatever a wrapper's `train()` says, and without gradients."""
    model.eval()
    model.requires_grad_(False)
    model.train = types.MethodType(lambda itself, mode=True: itself, model)
    return model


def _without_origins(config: Any) -> Any:
    bare = copy.deepcopy(config)
    for name in _ORIGINS:
        if hasattr(bare, name):
            delattr(bare, name)
    return bare


def _generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The model's generation settings, the special ids filled in from the tokenizer."""
    settings = copy.deepcopy(model.generation_config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(settings, name) is None:
            setattr(settings, name, getattr(tokenizer, name))
    if not settings.do_sample:  # without effect, but transformers refuses to save them
        for name in _SAMPLING:
            if getattr(settings, name, None) is not None:
                setattr(settings, name, None)
    return settings


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and remarks; faults are raised, not logged."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between libraries
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
