"""A real teacher on real text, with two stand-ins for its student, kept on disk between runs.

"Early" is the teacher with an attention window of 8 tokens; the logits of "late" are 0.7 of the
teacher's and 0.3 of early's. Rows are 512 tokens, packed from the texts in their order.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdframe.heads import OutputHead
from kdframe.output_layer import Halves, OutputLayer

ROW = 512
WINDOW = 8


@dataclass(frozen=True)
class StandIns:
    """Final hidden states of every position: `hidden`, `early` `[n, H]`; and the output layer."""

    hidden: Tensor
    early: Tensor
    head: OutputHead

    def __len__(self) -> int:
        return len(self.hidden)

    def logits(self, part: slice) -> tuple[Tensor, Tensor]:
        """The teacher's and the late student's logits `[n, V]` at some positions."""
        teacher = self.head(self.hidden[part])
        return teacher, 0.7 * teacher + 0.3 * self.head(self.early[part])


def load(teacher: Path, texts: list[Path], rows: int, memory: Path, *, skip: int = 0) -> StandIns:
    """Run the teacher over `rows` rows, evenly from the files, or read what it said before.

    Args:
        skip: rows that are left out at the beginning of each file.
    """
    given = [str(teacher), *(path.read_text("utf-8")[:4096] for path in texts), rows]
    told = json.dumps([*given, skip] if skip else given)
    path = memory / f"stand-ins-{hashlib.sha256(told.encode()).hexdigest()[:12]}.safetensors"
    if not path.exists():
        memory.mkdir(parents=True, exist_ok=True)
        save_file(_computed(teacher, texts, rows, skip), path)
    kept = load_file(path)
    return StandIns(kept["hidden"], kept["early"], OutputHead.from_tensors(kept))


@torch.no_grad()
def _computed(teacher: Path, texts: list[Path], rows: int, skip: int) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(
        teacher, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    halves = Halves(model)
    batch = torch.cat([_packed(tokenizer, p, rows // len(texts), skip) for p in texts])
    place = torch.arange(ROW)
    seen = (place <= place[:, None]) & (place > place[:, None] - WINDOW)
    mask = torch.zeros(ROW, ROW).masked_fill(~seen, torch.finfo(torch.float32).min)
    whole = [halves.hidden(input_ids=row[None])[0] for row in batch]
    early = [halves.hidden(input_ids=r[None], attention_mask=mask[None, None])[0] for r in batch]
    head = {name: tensor.clone() for name, tensor in OutputLayer(model).plain().tensors().items()}
    return {"hidden": torch.cat(whole), "early": torch.cat(early), **head}


def _packed(tokenizer: object, path: Path, rows: int, skip: int) -> Tensor:
    ids: list[int] = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            ids += tokenizer(json.loads(line)["text"])["input_ids"]  # type: ignore[operator]
            if len(ids) >= (skip + rows) * ROW:
                break
    return torch.tensor(ids[skip * ROW : (skip + rows) * ROW]).reshape(rows, ROW)
