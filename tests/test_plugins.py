"""Plugins: found one by one; a broken one is named and contained."""

import subprocess
import sys
import types
from typing import Literal

import pytest

from kdframe.api import CONTRACT, Loss, LossConfig, hookimpl
from kdframe.errors import InputError
from kdframe.plugins import Plugins, installed


class Quadratic(LossConfig):
    """A loss."""

    kind: Literal["quadratic"] = "quadratic"

    def build(self) -> Loss:
        raise NotImplementedError


def plugin(**members) -> types.SimpleNamespace:
    return types.SimpleNamespace(**members)


def losses(*answer):
    @hookimpl
    def kdframe_losses():
        return answer

    return kdframe_losses


def broken(**members) -> str:
    """The reason why a plugin with these members cannot be used, beside a good one."""
    found = Plugins.of(good=plugin(kdframe_losses=losses(Quadratic)), bad=plugin(**members))
    good, bad = found.found
    assert not good.broken
    assert found.kinds["loss"]["quadratic"].part is Quadratic
    return bad.broken


def test_a_part_is_read_by_its_kind():
    found = Plugins.of(q=plugin(kdframe_losses=losses(Quadratic)))
    assert found.read("loss", "quadratic") == Quadratic()
    assert found.read("loss", {"kind": "quadratic"}) == Quadratic()
    instance = Quadratic()
    assert found.read("loss", instance) is instance


def test_a_kind_that_is_not_installed_says_what_is_and_what_was_meant():
    found = Plugins.of(q=plugin(kdframe_losses=losses(Quadratic)))
    with pytest.raises(ValueError, match=r"installed: quadratic.*did you mean 'quadratic'"):
        found.read("loss", "quadratc")


def test_a_misspelt_hook_is_named_with_the_one_meant():
    @hookimpl
    def kdframe_loses():
        return ()

    assert "no hook kdframe_loses; did you mean kdframe_losses?" in broken(
        kdframe_loses=kdframe_loses
    )


def test_wrong_arguments_are_named():
    @hookimpl
    def kdframe_losses(wrong):
        return ()

    assert "wrong" in broken(kdframe_losses=kdframe_losses)


def test_a_wrong_answer_is_named():
    assert "must answer with a sequence" in broken(kdframe_codecs=_codecs(3))
    assert "must derive from kdframe.api.CodecConfig" in broken(kdframe_codecs=_codecs([Quadratic]))


def _codecs(answer):
    @hookimpl
    def kdframe_codecs():
        return answer

    return kdframe_codecs


def test_a_class_without_a_kind_is_told_the_line_that_it_needs():
    class Nameless(LossConfig):
        """A loss without a name."""

    assert 'needs a line `kind: Literal["x"] = "x"`' in broken(kdframe_losses=losses(Nameless))


def test_a_taken_kind_names_the_owner():
    class Same(LossConfig):
        """Another loss of the same kind."""

        kind: Literal["quadratic"] = "quadratic"

    assert "kind 'quadratic' is taken by plugin good" in broken(kdframe_losses=losses(Same))


def test_another_contract_version_is_refused_with_both_numbers():
    reason = broken(CONTRACT=CONTRACT + 1, kdframe_losses=losses())
    assert f"hook contract {CONTRACT + 1}" in reason
    assert f"has {CONTRACT}" in reason


def test_a_hook_that_raises_or_exits_is_contained():
    @hookimpl
    def kdframe_losses():
        raise SystemExit(3)

    assert "SystemExit" in broken(kdframe_losses=kdframe_losses)


def test_a_part_whose_module_is_missing_is_unavailable_with_the_line_that_mends_it():
    class NeedsMore(LossConfig):
        """A loss that needs a package."""

        kind: Literal["needs_more"] = "needs_more"
        requires = ("no_such_module_anywhere",)
        install = "pip install 'kdframe[more]'"

    found = Plugins.of(q=plugin(kdframe_losses=losses(NeedsMore)))
    assert "pip install 'kdframe[more]'" in found.kinds["loss"]["needs_more"].unavailable
    with pytest.raises(ValueError, match="kdframe\\[more\\]"):
        found.read("loss", "needs_more")


def test_an_observer_that_raises_is_dropped_and_the_others_go_on():
    heard = []

    @hookimpl
    def kdframe_run_started(run):
        raise RuntimeError("no")

    bad = plugin(kdframe_run_started=kdframe_run_started)

    @hookimpl
    def kdframe_run_started(run):
        heard.append(run)

    found = Plugins.of(good=plugin(kdframe_run_started=kdframe_run_started), bad=bad)
    (complaint,) = found.notify("kdframe_run_started", run="r")
    assert "observer bad raised in kdframe_run_started" in complaint
    assert found.notify("kdframe_run_started", run="r") == []
    assert heard == ["r", "r"]


def test_only_the_named_plugins_are_loaded(monkeypatch):
    monkeypatch.setenv("KDFRAME_PLUGINS", "logit_kd")
    assert [p.name for p in installed().found] == ["logit_kd"]
    monkeypatch.setenv("KDFRAME_PLUGINS", "nobody")
    with pytest.raises(InputError, match=r"nobody: no such plugin; installed: .*logit_kd"):
        installed()


def test_finding_and_listing_does_not_import_torch():
    code = (
        "import sys, kdframe.plugins as p; assert len(p.installed().found) >= 5; "
        "import kdframe; kdframe.Experiment.model_json_schema(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
