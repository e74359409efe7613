import json
import math
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest

from agent.scoring.report import Adaptation, Report
from agent.values import Commit, GapStatistics, LateRejection, Outcome, Progress, Share, Update
from exporter.instruments import DECISIONS, REASONS, STATES
from exporter.metrics import Metrics
from exporter.preprocess import Preprocess
from exporter.release import Parity, Release
from exporter.release import write as write_release
from streams.record import Control, ControlKind, Partition, Raw, Reason, Record, Rejected
from tests.bad_images import png_of

PARTITION = Partition("birds", 0)


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def metrics(registry):
    return Metrics(registry)


def report(**changes):
    content = {
        "task": 2,
        "matrix": [[0.9, None], [0.8, 0.7]],
        "avg": 0.82,
        "last": 0.75,
        "old_classes": {"before": 0.9, "after": 0.8},
        "forgetting": 0.1,
        "backward_transfer": -0.1,
        "zero_shot": 0.4,
        "predict_before_learn": 0.35,
        "retention": None,
        "gap": {
            "positive": {"before": 0.1, "after": 0.3},
            "negative": {"before": -0.03, "after": -0.04},
            "drift": {"before": 0.0, "after": 0.05},
            "centroid": {"before": 0.7, "after": 0.6},
        },
        "seconds": {"train": 12.0},
        "model": {"name": "tinyclip", "pretrained": "", "sha256": "0123456789abcdef"},
        "method": "mgclip",
        "fusion": "calibrated",
    }
    return Report.from_json(content | changes)


def commit(path: Path, number=2, **changes):
    values = {
        "number": number,
        "path": path,
        "offsets": {PARTITION: 70},
        "fingerprint": "f",
        "classes": ("wren", "owl"),
        "tasks": number,
        "totals": {"training_samples": 60 * number, "training_steps": 3 * number},
        "report": report(),
        "release": None,
    }
    return Commit(**values | changes)


def outcome(staging: Path, refused=None, rejected=(), drift=0.05):
    gap = GapStatistics(0.3, -0.04, 0.6)
    update = Update(1, 1, 3, 60, 0.5, True, gap, gap, gap, 0.0, drift, 0.25, {"train": 12.0})
    files = {"learner.safetensors": (1000, "aa"), "report.json": (24, "bb")}
    return Outcome(2, {PARTITION: 70}, staging, files, report(), ("wren", "owl"), update, refused, rejected)


def test_the_reasons_known_here_are_those_of_the_streams():
    assert tuple(Reason) == REASONS


def test_every_reason_exists_at_zero_before_anything_happened(metrics, registry):
    values = [registry.get_sample_value("gapstream_rejected_records_total", {"reason": reason}) for reason in REASONS]
    assert values == [0.0] * len(REASONS)


def test_what_was_not_measured_is_nan_so_that_no_alert_fires_on_it(metrics, registry, tmp_path):
    assert math.isnan(registry.get_sample_value("gapstream_zero_shot_retention_ratio"))

    metrics.committed(commit(tmp_path), outcome(tmp_path))

    assert math.isnan(registry.get_sample_value("gapstream_zero_shot_retention_ratio"))
    assert registry.get_sample_value("gapstream_forgetting_ratio") == 0.1


def test_consumed_counts_records_bytes_age_and_rejections(metrics, registry):
    metrics.consumed(Record(PARTITION, 0, "wren", b"x" * 300, timestamp_s=90.0), now=100.0)
    metrics.consumed(Rejected(PARTITION, 1, Reason.TRUNCATED, "ends after 12 of 30 bytes"), now=100.0)
    metrics.consumed(Control(PARTITION, 2, ControlKind.TASK_BOUNDARY), now=100.0)

    topic = {"topic": "birds"}
    assert registry.get_sample_value("gapstream_consumed_records_total", topic) == 3
    assert registry.get_sample_value("gapstream_consumed_bytes_total", topic) == 300
    assert registry.get_sample_value("gapstream_record_age_seconds_sum") == 10
    assert registry.get_sample_value("gapstream_rejected_records_total", {"reason": "truncated"}) == 1
    assert [entry["offset"] for entry in metrics.status()["rejected"]] == [1]


def test_skipped_records_are_told_as_totals_and_counted_once(metrics, registry):
    for total in (3, 3, 5):
        metrics.skipped({"birds": total})
    assert registry.get_sample_value("gapstream_skipped_records_total", {"topic": "birds"}) == 5


@pytest.mark.parametrize(("retention_s", "used"), [(200.0, 0.25), (math.inf, 0.0), (0.0, 50.0)])
def test_the_share_of_retention_is_finite_whatever_a_topic_says(metrics, registry, retention_s, used):
    metrics.waiting(50.0, retention_s)
    assert registry.get_sample_value("gapstream_retention_used_ratio") == used


def test_progress_sets_the_state_of_its_phase_and_the_budget_used(metrics, registry):
    metrics.progressed(Progress("train", task=1, epoch=1, epochs=2, loss=1.5, drift=0.05, budget=0.25))
    assert registry.get_sample_value("gapstream_state", {"gapstream_state": "training"}) == 1
    assert registry.get_sample_value("gapstream_gap_budget_used_ratio") == pytest.approx(0.2)

    metrics.progressed(Progress("evaluate", task=1))
    assert metrics.status()["state"] == "evaluating"
    assert registry.get_sample_value("gapstream_gap_budget_used_ratio") == pytest.approx(0.2)


def test_a_diverged_loss_does_not_break_the_status(metrics):
    metrics.progressed(Progress("train", task=1, loss=math.nan))
    assert metrics.status()["progress"]["loss"] is None
    json.dumps(metrics.status(), allow_nan=False)


def test_every_phase_of_an_update_leads_to_a_known_state(metrics):
    for phase in ("decode", "train", "compensate", "evaluate", "export", "commit"):
        metrics.progressed(Progress(phase, task=1))
        assert metrics.status()["state"] in STATES


def test_a_commit_makes_its_report_current(metrics, registry, tmp_path):
    metrics.committed(commit(tmp_path), outcome(tmp_path))

    def value(name, **labels):
        return registry.get_sample_value("gapstream_" + name, labels)

    assert value("accuracy_ratio", scope="all") == 0.75
    assert value("accuracy_ratio", scope="new") == 0.7
    assert value("accuracy_ratio", scope="old") == 0.8
    assert value("gap_similarity", pair="positive") == 0.3
    assert value("gap_drift_ratio") == 0.05
    assert value("committed_offset", topic="birds", partition="0") == 70
    assert value("classes") == 2
    assert value("updates_rolled_back_total") == 1
    assert value("update_duration_seconds_sum", phase="train") == 12
    assert value("releases_total", result="published") == 1
    assert value("commit_size_bytes") == 1024
    status = metrics.status()
    assert status["commit"]["number"] == 2
    assert status["report"]["last"] == 0.75


def test_what_became_of_new_adapters_is_counted_under_every_word_there_is_for_it(metrics, registry, tmp_path):
    def counted():
        return [registry.get_sample_value("gapstream_adaptations_total", {"decision": word}) for word in DECISIONS]

    assert counted() == [0.0] * len(DECISIONS)
    made = outcome(tmp_path)
    for kept, epochs in ((True, 1), (False, 1), (False, 0)):
        adaptation = Adaptation(kept=kept, epochs=epochs, drift=0.1, budget=0.25, images=30)
        metrics.committed(commit(tmp_path), replace(made, update=replace(made.update, adaptation=adaptation)))
    metrics.committed(commit(tmp_path), made)
    assert counted() == [1.0] * len(DECISIONS)


def test_the_ranks_of_the_last_update_are_shown_with_the_time_they_waited(metrics, registry, tmp_path):
    # given an update that three ranks shared, and one that two did
    shares = tuple(Share(host, 7, "cpu", 10.0, waited_s) for host, waited_s in (("a", 1.0), ("b", 4.0), ("c", 2.0)))
    metrics.committed(commit(tmp_path), replace(outcome(tmp_path), shares=shares))
    metrics.committed(commit(tmp_path), replace(outcome(tmp_path), shares=shares[:2]))

    # then what is shown is of the last one
    waiting = {
        str(rank): registry.get_sample_value("gapstream_rank_waiting_ratio", {"rank": str(rank), "device": "cpu"})
        for rank in range(3)
    }
    assert waiting == {"0": 0.1, "1": 0.4, "2": None}
    assert registry.get_sample_value("gapstream_ranks") == 2
    assert [rank["host"] for rank in metrics.status()["ranks"]] == ["a", "b"]

    # and a trainer that learns alone is one
    metrics.committed(commit(tmp_path), outcome(tmp_path))
    assert registry.get_sample_value("gapstream_ranks") == 1 and metrics.status()["ranks"] == []


def test_a_record_rejected_after_its_intake_is_counted_and_remembered_once(metrics, registry, tmp_path):
    late = LateRejection(PARTITION, 5, Reason.UNDECODABLE, "not an image")

    metrics.rejected(Rejected(PARTITION, 5, late.reason, late.detail, Raw(None, b"x")), now=100.0)
    metrics.committed(commit(tmp_path), outcome(tmp_path, rejected=(late,)))

    assert registry.get_sample_value("gapstream_rejected_records_total", {"reason": "undecodable"}) == 1
    assert [entry["offset"] for entry in metrics.status()["rejected"]] == [5]


def test_the_newest_rejected_records_that_carry_bytes_get_a_picture_or_none(metrics):
    metrics.consumed(
        Rejected(PARTITION, 1, Reason.MISSING_LABEL, "no label", Raw(None, png_of(8, 8, bytes(72)))), now=1
    )
    metrics.consumed(Rejected(PARTITION, 2, Reason.UNSUPPORTED_FORMAT, "text", Raw(None, b"text")), now=2)
    metrics.consumed(Rejected(PARTITION, 3, Reason.FETCH_FAILED, "gone", None), now=3)

    entries = {entry["offset"]: entry for entry in metrics.status()["rejected"]}
    pictures = metrics.pictures()

    assert {offset: entry["picture"] for offset, entry in entries.items()} == {1: True, 2: True, 3: False}
    assert pictures[entries[1]["number"]].startswith("data:image/jpeg;base64,")
    assert pictures[entries[2]["number"]] is None
    assert len(pictures) == 2
    json.dumps(metrics.status())


def test_readers_are_at_the_newest_release_unless_they_are_held(metrics, registry, tmp_path):
    def shown():
        names = ("gapstream_served_commit_number", "gapstream_release_pinned")
        return [registry.get_sample_value(name) for name in names]

    assert shown() == [0, 0]
    metrics.committed(commit(tmp_path, 2, release=tmp_path), outcome(tmp_path))
    assert shown() == [2, 0]

    held = [1]
    metrics.readers(lambda: held[0])
    assert shown() == [1, 1]
    assert metrics.status()["readers"] == {"commit": 1, "pinned": True}
    held[0] = None
    assert shown() == [2, 0]


def test_while_draining_an_update_does_not_change_the_state(metrics, tmp_path):
    metrics.state("draining")
    metrics.progressed(Progress("train", task=1))
    metrics.committed(commit(tmp_path), outcome(tmp_path))
    assert metrics.status()["state"] == "draining"


def test_the_parity_shown_is_that_of_the_release_that_serves(metrics, registry, tmp_path):
    parity = Parity(3e-7, 2e-6, 2e-6, 0.9999999, 0.99, 68, (1, 3, 64), "CPUExecutionProvider")
    preprocess = Preprocess(128, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    created = "2026-11-21T22:00:00+00:00"
    release = Release(tmp_path, created, ("wren",), preprocess, {}, 20, 10, "fp32", parity, 1e-3, {}, {}, {})
    write_release(release)

    metrics.restored(commit(tmp_path, release=tmp_path))

    assert registry.get_sample_value("gapstream_release_parity_max_abs_error") == 2e-6
    assert registry.get_sample_value("gapstream_release_parity_agreement_ratio") == 0.99
    assert registry.get_sample_value("gapstream_release_timestamp_seconds") == 1795298400


def test_a_release_that_cannot_be_read_does_not_stop_the_agent(metrics, registry, tmp_path):
    metrics.restored(commit(tmp_path, release=tmp_path / "gone"))
    assert math.isnan(registry.get_sample_value("gapstream_release_parity_max_abs_error"))
    assert registry.get_sample_value("gapstream_classes") == 2


def test_a_refused_release_is_counted_as_one(metrics, registry, tmp_path):
    metrics.committed(commit(tmp_path), outcome(tmp_path, refused="old classes fell by 8.0 points, 5.0 are allowed"))
    assert registry.get_sample_value("gapstream_releases_total", {"result": "refused"}) == 1
    assert registry.get_sample_value("gapstream_releases_total", {"result": "published"}) == 0


def test_counters_of_committed_work_go_on_after_a_restart(registry, metrics, tmp_path):
    # given an agent that learned two tasks
    metrics.committed(commit(tmp_path, 1), outcome(tmp_path))
    metrics.committed(commit(tmp_path, 2), outcome(tmp_path))
    before = registry.get_sample_value("gapstream_training_samples_total")

    # when another process continues from its commit and learns one more
    later = CollectorRegistry()
    continued = Metrics(later)
    continued.restored(commit(tmp_path, 2))
    assert later.get_sample_value("gapstream_training_samples_total") == before == 120
    continued.committed(commit(tmp_path, 3), outcome(tmp_path))

    # then nothing was counted twice
    assert later.get_sample_value("gapstream_tasks_total") == 3
    assert later.get_sample_value("gapstream_training_samples_total") == 180


def test_only_the_newest_model_is_in_the_model_series(metrics, registry, tmp_path):
    metrics.committed(commit(tmp_path), outcome(tmp_path))
    metrics.committed(commit(tmp_path, 3, report=report(fusion="faithful")), outcome(tmp_path))
    exposed = generate_latest(registry).decode().splitlines()
    lines = [line for line in exposed if line.startswith("gapstream_model_info")]
    assert len(lines) == 1
    assert 'fusion="faithful"' in lines[0]


def test_a_new_process_says_how_old_the_commit_it_continues_from_is(metrics, registry, tmp_path):
    metrics.restored(commit(tmp_path))
    assert registry.get_sample_value("gapstream_commit_timestamp_seconds") == pytest.approx(time.time(), abs=60)


def test_the_record_rate_is_that_of_the_last_minute(metrics):
    now = int(time.time())
    for second in range(200):
        metrics.consumed(Control(PARTITION, second, ControlKind.FLUSH), now=now - 199 + second)
    metrics._started = now - 200
    assert metrics.status()["stream"]["records_per_s"] == pytest.approx(1.0, abs=0.05)


def test_events_and_scrapes_from_many_threads_lose_nothing(metrics, registry):
    def feed(start):
        for offset in range(start, start + 500):
            metrics.consumed(Record(PARTITION, offset, "wren", b"xyz"), now=1.0)
            if offset % 50 == 0:
                metrics.status()
                generate_latest(registry)

    threads = [threading.Thread(target=feed, args=(start,)) for start in range(0, 2000, 500)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.get_sample_value("gapstream_consumed_bytes_total", {"topic": "birds"}) == 6000
    assert metrics.status()["stream"]["records"] == 2000


def test_records_dated_ahead_are_told_as_totals_and_counted_once(metrics, registry):
    for total in (2, 2, 5):
        metrics.clamped({"birds": total})
    assert registry.get_sample_value("gapstream_future_timestamps_total", {"topic": "birds"}) == 5


def test_a_source_that_waits_says_why(metrics, registry):
    metrics.holding("nobody at home")
    assert (
        registry.get_sample_value("gapstream_source_holding") == 1 and metrics.status()["holding"] == "nobody at home"
    )
    metrics.holding("")
    assert registry.get_sample_value("gapstream_source_holding") == 0 and metrics.status()["holding"] == ""


def test_removed_dead_letters_are_told_as_totals_and_the_detail_of_a_rejection_is_cut(metrics, registry):
    for total in (0, 3, 3, 5):
        metrics.dead_letters_removed(total)
    assert registry.get_sample_value("gapstream_dead_letters_total", {"result": "removed"}) == 5
    metrics.rejected(Rejected(PARTITION, 1, Reason.BAD_SCHEMA, "x" * 10**6), now=1)
    assert len(metrics.status()["rejected"][0]["detail"]) == 1000


def test_credentials_in_the_url_of_a_rejected_record_are_not_on_the_page(metrics):
    url = "https://me:s3cret@images.example.com/a.jpg"
    metrics.holding(f"{url} does not answer")
    metrics.consumed(Rejected(PARTITION, 7, Reason.FETCH_FORBIDDEN, f"{url} is not below an allowed prefix"), now=1.0)
    shown = str(metrics.status())
    assert "s3cret" not in shown and shown.count("https://***@images.example.com") == 2
