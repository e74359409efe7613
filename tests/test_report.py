import json
import re
from pathlib import Path

import pytest

from agent.commands.report import ReportError, write_report

PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs="


def made_up_state(state: Path, tasks=5, classes=None, refused=None, released=True, examples=(), **changes) -> Path:
    """A state folder as the agent leaves it, with invented numbers; `changes` replace keys of report.json."""
    classes = classes or [f"class {number}" for number in range(2 * tasks)]
    matrix = [
        [max(0.1, 0.93 - 0.035 * (task - other) - 0.02 * other) if other <= task else None for other in range(tasks)]
        for task in range(tasks)
    ]
    history = [
        {
            "task": task + 1,
            "classes": classes[2 * task : 2 * task + 2],
            "samples": 486,
            "accuracy": sum(matrix[task][: task + 1]) / (task + 1),
            "zero_shot": max(0.1, 0.82 - 0.1 * task),
            "predict_before_learn": max(0.1, 0.44 - 0.03 * task),
            "forgetting": 0.035 * task if task else None,
            "retention": 1.0 - 0.008 * task,
            "gap": _gap(task),
            "seconds": {"decode": 1.1, "train": 14.0 + task, "compensate": 2.2, "evaluate": 1 + 0.6 * task},
            "rolled_back": task == 3,
            "epochs": 1,
        }
        for task in range(tasks)
    ]
    last = history[-1]
    report = {
        "task": tasks,
        "classes": classes,
        "samples": 486 * tasks,
        "test_images": 1234,
        "matrix": matrix,
        "avg": sum(entry["accuracy"] for entry in history) / tasks,
        "last": last["accuracy"],
        "forgetting": last["forgetting"],
        "backward_transfer": -0.04,
        "zero_shot": last["zero_shot"],
        "predict_before_learn": last["predict_before_learn"],
        "retention": last["retention"],
        "gap": last["gap"],
        "seconds": last["seconds"],
        "history": history,
        "model": {"name": "tinyclip", "pretrained": "", "sha256": "5f2c" * 16, "prompt": "a good photo of a {}."},
        "method": "mgclip",
        "fusion": "calibrated",
        "versions": {"gapstream": "0.1.0", "torch": "2.15.0"},
        "release": {"refused": refused},
        "examples": list(examples),
    } | changes
    commit = state / "commits" / f"{tasks:06d}"
    commit.mkdir(parents=True)
    (commit / "report.json").write_text(json.dumps(report))
    (commit / "manifest.json").write_text(
        json.dumps(
            {
                "number": tasks,
                "created": "2026-11-21T22:00:00+00:00",
                "offsets": [["cifar10-sample", 0, 2704]],
                "fingerprint": "ab" * 32,
                "config": {"method": {"name": "mgclip"}},
                "versions": {"gapstream": "0.1.0"},
            }
        )
    )
    if released:
        (commit / "release").mkdir()
        (commit / "release" / "release.json").write_text(
            json.dumps(
                {
                    "id": "0123456789ab",
                    "created": "2026-11-21T22:00:00+00:00",
                    "classes": classes,
                    "opset": 20,
                    "precision": "fp32",
                    "atol": 1e-3,
                    "files": {"model.onnx": [27_000_000, "cd" * 32], "golden.npz": [1_600_000, "ef" * 32]},
                    "parity": {
                        "embedding": 3.1e-7, "logits": 2e-6, "probabilities": 2.4e-6, "cosine": 0.9999998, "top1": 1.0,
                        "images": 68, "batches": [1, 3, 64], "provider": "CPUExecutionProvider",
                    },
                }
            )
        )  # fmt: skip
    (state / "CURRENT").symlink_to(commit.relative_to(state))
    return state


def _gap(task: int) -> dict:
    return {
        "positive": {"before": 0.12, "after": 0.31 + 0.01 * task, "untouched": 0.12},
        "negative": {"before": -0.03, "after": -0.035 + 0.004 * task, "untouched": -0.03},
        "drift": {"before": 0.0, "after": [0.04, 0.09, 0.13, 0.21, 0.19][task % 5], "budget": 0.25},
        "centroid": {"before": 0.69, "after": 0.62 - 0.01 * task, "untouched": 0.7},
    }


def page(state: Path) -> str:
    out = state / "elsewhere" / "report.html"
    write_report(state, out)
    return out.read_text(encoding="utf-8")


def test_the_page_shows_the_numbers_of_the_current_commit(tmp_path):
    html = page(made_up_state(tmp_path))
    assert "10 classes learned in 5 tasks" in html
    assert "82.0 %" in html  # Last
    assert "42.0 %" in html  # untouched
    assert "82.0 % of 1,234 held-back images right, 40.0 points more" in html
    assert "all classes, 1,234 held-back images" in html and "over the 5 tasks" in html
    assert "class 0, class 1" in html
    assert "2.4e-06" in html
    assert "cifar10-sample/0 up to 2704" in html
    assert "5f2c5f2c" in html


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    html = page(made_up_state(tmp_path))
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")


def test_one_task_with_one_class_and_nothing_else_measured_is_a_page_too(tmp_path):
    nothing = dict.fromkeys(
        ["last", "forgetting", "backward_transfer", "retention", "zero_shot", "predict_before_learn"]
    )
    html = page(made_up_state(tmp_path, tasks=1, classes=["wren"], released=False, test_images=0, **nothing))
    assert "1 class learned in 1 task</h1>" in html
    assert "no held-back images yet" in html and "over one task" in html
    assert "Nothing has been released yet" in html
    assert "points" not in html.partition("<script")[0].partition("lead")[2].partition("</p>")[0]


def test_a_refused_release_says_why_and_that_the_one_before_serves(tmp_path):
    html = page(made_up_state(tmp_path, refused="old classes fell by 8.0 points, 5.0 are allowed"))
    assert "old classes fell by 8.0 points" in html
    assert "The release before it serves on" in html


def test_a_method_without_a_gap_budget_is_not_said_to_be_held_to_one(tmp_path):
    still = _gap(0) | {"drift": {"before": 0.0, "after": 0.0, "budget": None}}
    assert "crosses the budget" not in page(made_up_state(tmp_path / "without", gap=still))
    assert "crosses the budget" in page(made_up_state(tmp_path / "with"))


def test_examples_show_what_was_said_before_and_after(tmp_path):
    example = {
        "image": PIXEL, "label": "wren", "task": 1,
        "untouched": [["owl", 0.6], ["wren", 0.3]], "before": [["hawk", 0.5]], "after": [["wren", 0.93], ["owl", 0.05]],
    }  # fmt: skip
    html = page(made_up_state(tmp_path, examples=[example]))
    assert PIXEL in html
    assert '<em class="right">wren</em><u>93 %</u>' in html
    assert "<em>hawk</em><u>50 %</u>" in html


def test_a_class_name_from_the_stream_cannot_add_to_the_page(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    html = page(made_up_state(tmp_path, tasks=1, classes=[evil, "wren"]))
    assert "<script>alert" not in html
    assert "<img src=x" not in html


def test_an_empty_state_folder_is_a_clear_error(tmp_path):
    with pytest.raises(ReportError, match=r"nothing is committed .* run `gapstream run` first"):
        write_report(tmp_path, tmp_path / "report.html")


def test_a_commit_that_cannot_be_read_is_a_clear_error(tmp_path):
    state = made_up_state(tmp_path)
    (state / "CURRENT").joinpath("report.json").write_text("{")
    with pytest.raises(ReportError, match=r"report\.json .* cannot be read"):
        write_report(state, tmp_path / "report.html")
