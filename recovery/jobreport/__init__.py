"""A job's report: one HTML page that needs nothing else, made from the journal alone.

``render(job_report(entries, now))``. jinja2 is imported by :mod:`recovery.jobreport.render`, not here.
"""

from __future__ import annotations

from recovery.jobreport.report import Happening, JobReport, NodeLine, Stretch, job_report

__all__ = ["Happening", "JobReport", "NodeLine", "Stretch", "job_report", "render"]


def render(report: JobReport) -> str:
    """The page."""
    from recovery.jobreport.render import render as page

    return page(report)
