"""The experiment: frozen, strict, the same from Python and from plain data."""

import ast
from pathlib import Path

import pydantic
import pytest

from kdframe import Data, Experiment, Student, Teacher
from kdframe.experiment import Section, fingerprint
from kdframe.part import Part
from kdframe.plugins import installed
from kdframe_codecs import Dense, Sampled, TopK
from kdframe_logit_kd import LogitKD
from kdframe_mmap_cache import MmapCache

ROOT = Path(__file__).parent.parent


def make(**more) -> Experiment:
    settings = {"name": "e", "teacher": "a/b", "student": "a/c", "data": {"train": "rows.jsonl"}}
    return Experiment.model_validate(settings | more)


def test_python_and_plain_data_give_the_same_experiment():
    written = Experiment(
        name="e",
        teacher=Teacher(model="a/b"),
        student=Student(model="a/c"),
        data=Data.model_validate({"train": "rows.jsonl"}),
        cache=MmapCache(codec=TopK(k=8)),
        loss=LogitKD(alpha=0.1),
    )
    cache = {"kind": "mmap", "codec": {"kind": "topk", "k": 8}}
    assert make(cache=cache, loss={"kind": "logit_kd", "alpha": 0.1}) == written
    assert Experiment.model_validate(written.plain()) == written


def test_with_goes_through_the_same_validation():
    experiment = make()
    changed = experiment.with_({"loss.temperature": 2.0, "data.train.0.weight": 3})
    assert changed.loss == LogitKD(temperature=2.0)
    assert changed.data.train[0].weight == 3
    assert experiment.loss == LogitKD()
    with pytest.raises(pydantic.ValidationError, match="alhpa"):
        experiment.with_({"loss.alhpa": 0.2})


def test_it_is_frozen():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        make().name = "other"


def test_a_temperature_that_the_codec_does_not_serve_is_refused_with_the_remedy():
    with pytest.raises(pydantic.ValidationError, match=r"temperature 9 .*cache.codec.temperatures"):
        make(loss={"kind": "logit_kd", "temperature": 9})
    assert make(loss=LogitKD(temperature=9), cache=MmapCache(codec=Dense())).loss


def test_draws_serve_the_temperature_of_the_loss_or_are_refused_with_the_remedy():
    draws = {"kind": "mmap", "codec": {"kind": "sampled"}}
    remedy = r"temperature 2 .*set cache\.codec\.temperature to 2"
    with pytest.raises(pydantic.ValidationError, match=remedy):
        make(cache=draws, loss=LogitKD(temperature=2))
    drawn = make(cache=draws)
    with pytest.raises(pydantic.ValidationError, match=remedy):
        drawn.with_({"loss.temperature": 2.0})
    both = drawn.with_({"loss.temperature": 2.0, "cache.codec.temperature": 2.0})
    assert both.cache.codec == Sampled(temperature=2)


def test_a_loss_that_reads_no_draws_is_refused_with_the_codecs_that_serve_it():
    class WholeOnly(LogitKD):
        accepts = frozenset({"truncated", "dense"})

    with pytest.raises(pydantic.ValidationError) as refused:
        make(cache=MmapCache(codec=Sampled()), loss=WholeOnly())
    assert "does not accept weighted targets, which codec 'sampled' gives" in str(refused.value)
    serving = str(refused.value).split("codecs that serve it: ")[1].split("[")[0]
    assert {"dense", "topk"} <= set(serving.strip().split(", "))
    assert "sampled" not in serving


def test_a_student_has_one_origin():
    with pytest.raises(pydantic.ValidationError, match="either `model` or `from_teacher`"):
        make(student={"model": "a/b", "from_teacher": {"layers": 2}})


def test_the_fingerprint_ignores_the_name_and_where_it_runs_and_nothing_else():
    experiment = make()
    assert make(name="other", runtime={"device": "cpu"}).fingerprint() == experiment.fingerprint()
    assert experiment.with_({"training.seed": 1}).fingerprint() != experiment.fingerprint()
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def sections(model: type[pydantic.BaseModel] = Experiment) -> set[type[pydantic.BaseModel]]:
    found = {model}
    for below in Section.__subclasses__():
        found.add(below)
    return found


def every_field() -> list[tuple[str, str]]:
    parts = [kind.part for kinds in installed().kinds.values() for kind in kinds.values()]
    models: list[type[pydantic.BaseModel]] = [*sections(), *parts]
    return sorted(
        {(m.__name__, field) for m in models for field in m.model_fields if field != "kind"}
    )


def attributes_read() -> set[str]:
    """Every attribute that the source reads, outside the class bodies that declare fields."""
    read = set()
    for folder in ("kdframe", "plugins"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    read.add(node.attr)
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    read.add(node.value)  # model_dump(include={...})
    return read


@pytest.mark.parametrize(("model", "field"), every_field())
def test_every_setting_is_read_by_some_code(model, field):
    assert field in attributes_read()


def test_every_setting_says_what_it_means():
    for model in (*sections(), *Part.__subclasses__()):
        for name, info in model.model_fields.items():
            assert name == "kind" or info.description or model is Part or name == "codec", (
                model,
                name,
            )


def test_the_schema_holds_every_installed_part():
    text = str(Experiment.model_json_schema())
    for kinds in installed().kinds.values():
        for kind in kinds:
            assert f"'{kind}'" in text
