"""Everything that is made of a report for others to read, written into its run folder beside result.json, and that itself.

junit.xml and results.tap for pipelines, summary.md for a step's summary, timeline.png and report.html for people. Each is
there whole or not at all. Used by the measure command; can be used again on any run folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from balloonlab.errors import UsageError
from balloonlab.measure.evidence import Evidence, read_evidence
from balloonlab.measure.html import page
from balloonlab.measure.junit import junit
from balloonlab.measure.markdown import summary
from balloonlab.measure.report import NAME, Report
from balloonlab.measure.tap import tap
from balloonlab.results import write_json, write_whole

JUNIT = "junit.xml"
TAP = "results.tap"
MARKDOWN = "summary.md"
PICTURE = "timeline.png"
PAGE = "report.html"

# GitHub's name for the file that a step's summary is read from; what is there already is somebody else's.
STEP_SUMMARY = "GITHUB_STEP_SUMMARY"


def write_outputs(report: Report, folder: Path, warn: Callable[[str], None]) -> None:
    """Write all of it into the folder that the report's runs are in; the summary also where a pipeline wants it.

    warn: told in a line where the pipeline's own file cannot be written, which says nothing about the measurement. Raises
    UsageError for a timeline that is none, and for a file of ours that cannot be written.
    """
    evidence = read_evidence(report, folder)
    markdown = summary(report, evidence)
    texts = {
        JUNIT: junit(report, evidence),
        TAP: tap(report),
        MARKDOWN: markdown,
        PAGE: page(report, evidence),
    }
    try:
        for name, text in texts.items():
            write_whole(text.encode(), folder / name)
        write_whole(_picture(report, evidence), folder / PICTURE)
    except OSError as error:
        raise unwritable(folder, error) from error
    if why := _append(markdown):
        warn(why)


def write_result(report: Report, folder: Path) -> None:
    """Write result.json, of which all else can be made again. Raises UsageError."""
    try:
        write_json(report, folder / NAME)
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(folder: Path, error: OSError) -> UsageError:
    """Return what is said of a run folder that cannot be written to."""
    return UsageError(f"{folder}: {error.strerror}: make room there, or name another with --out")


def _picture(report: Report, evidence: Sequence[Evidence]) -> bytes:
    from balloonlab.measure.timeline_plot import timeline_png  # noqa: PLC0415  (half a second, once there is something)

    return timeline_png(report, evidence)


def _append(markdown: str) -> str:
    """Append to the file of the step's summary, where a pipeline has one. Returns why that could not be, or nothing."""
    path = os.environ.get(STEP_SUMMARY)
    if not path:
        return ""
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(markdown + "\n")
    except OSError as error:
        return f"{STEP_SUMMARY}={path}: {error.strerror}: correct or unset it"
    return ""
