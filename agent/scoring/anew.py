"""Scores a report's last task anew: nothing was learned since, but what answers is another model."""

from __future__ import annotations

from dataclasses import replace

from agent.scoring.report import Report


def reopened(report: Report) -> Report:
    """Give a report as it was before its last task, but for `best`, so that the task can be scored anew."""
    cut = {name: getattr(report, name)[:-1] for name in ("history", "matrix", "first", "best")}
    return replace(report, **cut)


def of_same_task(anew: Report, before: Report) -> Report:
    """Give the new report of a task with what the one before says of the task's update."""
    of_both = ("samples", "predict_before_learn", "gap")
    of_entry = (*of_both, "seconds", "classes", "loss", "epochs", "rolled_back", "details", "adaptation")
    entry, old = anew.history[-1], before.history[-1]
    history = (*anew.history[:-1], replace(entry, **{name: getattr(old, name) for name in of_entry}))
    return replace(anew, history=history, **{name: getattr(before, name) for name in of_both})
