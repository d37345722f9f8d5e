"""The stage that ships a student: every exporter writes a folder of its own, and runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdframe import durable
from kdframe.errors import DamagedError
from kdframe.parts import ExportContext, ExporterConfig, ExportReport
from kdframe.progress import Progress

REPORT = "export.json"


def export(
    student: Path,
    exporters: Sequence[ExporterConfig],
    out: Path,
    context: ExportContext,
    progress: Progress,
) -> list[ExportReport]:
    """Write `out/<kind>` for every exporter; each appears whole.

    Raises:
        DamagedError: what an exporter wrote does not behave like the student.
    """
    reports = []
    for config in exporters:
        with durable.folder(out / config.kind) as aside:
            report = config.build()(student, aside, context)
            if report.status == "failed":
                raise DamagedError(f"export {config.kind}: {report.reason}; nothing was kept")
            durable.write_json(aside / REPORT, plain(report))
        progress.say(f"export {config.kind}: {report.status}, {report.bytes:,} bytes")
        reports.append(report)
    return reports


def plain(report: ExportReport) -> dict[str, Any]:
    """A report as JSON."""
    return asdict(report)
