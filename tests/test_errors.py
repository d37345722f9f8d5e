"""Errors carry their exit code, and an input error all its faults."""

import pytest

from kdframe.errors import DamagedError, InputError, Interrupted, KdframeError, PluginError


@pytest.mark.parametrize(
    ("error", "code"),
    [(InputError, 2), (PluginError, 2), (DamagedError, 3), (Interrupted, 130)],
)
def test_each_error_has_its_exit_code(error, code):
    assert issubclass(error, KdframeError)
    assert error("x").exit_code == code


def test_an_input_error_is_one_line_for_each_fault():
    error = InputError("a: wrong", "b: wrong")
    assert str(error) == "a: wrong\nb: wrong"
    assert list(error.faults) == ["a: wrong", "b: wrong"]
