"""The exceptions that kdframe raises on purpose. Each carries the exit code of the command line."""

from __future__ import annotations

from collections.abc import Sequence


class KdframeError(Exception):
    """Something a user can mend; the message says what, where and how."""

    exit_code = 2


class InputError(KdframeError):
    """The user's input is wrong. Holds every fault that was found, one line each.

    Attributes:
        faults: the faults, in the order in which they stand in the input.
    """

    def __init__(self, *faults: str) -> None:
        self.faults: Sequence[str] = faults
        super().__init__("\n".join(faults))


class PluginError(KdframeError):
    """A plugin breaks the contract; the message names plugin, distribution, version and remedy."""


class DamagedError(KdframeError):
    """Something on disk is damaged or incomplete; the message names the file (and row)."""

    exit_code = 3


class Interrupted(KdframeError):
    """The user (or a scheduler) asked to stop; what was done is on the disk."""

    exit_code = 130
