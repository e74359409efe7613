"""Prometheus watches an agent that really learns, and a server beside it: every panel has data, every rule works."""

from __future__ import annotations

import math
import shutil
import urllib.parse
from contextlib import ExitStack
from pathlib import Path

from agent.cli import main
from streams.archive_folder import ArchiveFolder
from tests.processes import free_port, gapstream, get, running, until
from tests.test_deploy import DEPLOY, panels, program

WITHOUT_DATA = {
    "Lost to retention": "a folder has no retention",
    "Age of records at intake": "a folder does not say when an image was made",
    **dict.fromkeys(
        ("Messages answered", "Answered with an error", "Messages that wait", "Time of a batch", "Transactions"),
        "no topic is answered",
    ),
    "Age of the states": "the agent is no site of a fleet",
    "Time that ranks wait": "no other rank shares its updates",
}
ROUNDS = 4
"""A bundled class is so many classes here, for a stream that lasts."""


def images(folder: Path) -> tuple[Path, Path]:
    """A stream of bundled images in 32 classes, with two broken ones in each, and a probe of two other classes."""
    bundled = ArchiveFolder("bundled", "train")
    learned = bundled.classes[:-2]
    for name in bundled.classes:
        for number, image in enumerate(bundled.images(name, 20 * ROUNDS if name in learned else 5)):
            place = folder / "stream" / f"{name} {number % ROUNDS}" if name in learned else folder / "probe" / name
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.jpg").write_bytes(image.read())
    bundled.close()
    for place in (folder / "stream").iterdir():
        whole = next(place.iterdir()).read_bytes()
        (place / "0-cut.jpg").write_bytes(whole[:-150])
        (place / "0-page.jpg").write_bytes(b"<!DOCTYPE html>")
    return folder / "stream", folder / "probe"


def test_every_panel_has_data_and_every_rule_evaluates(tmp_path):
    prometheus = program("prometheus", "prometheus")
    stream, probe = images(tmp_path)
    state, log = tmp_path / "state", tmp_path / "agent.log"
    agent, server, watcher = (f"127.0.0.1:{free_port()}" for _ in range(3))
    shutil.copy(DEPLOY / "prometheus/alerts.yaml", tmp_path)
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 500ms, evaluation_interval: 1s}\n"
        "rule_files: [alerts.yaml]\n"
        "scrape_configs:\n"
        f"  - {{job_name: gapstream, static_configs: [{{targets: ['{agent}'], labels: {{model: a}}}}]}}\n"
        f"  - {{job_name: gapstream-serve, static_configs: [{{targets: ['{server}'], labels: {{model: a}}}}]}}\n"
    )

    def ask(query: str) -> list[float]:
        answer = get(f"http://{watcher}/api/v1/query?" + urllib.parse.urlencode({"query": query}))
        assert answer is None or answer["status"] == "success", query
        return [float(one["value"][1]) for one in answer["data"]["result"]] if answer else []

    with ExitStack() as processes:
        # given an agent that learns slowly enough to be watched, crosses its gap budget and rejects records
        learning = gapstream(
            "run",
            state__path=state, state__keep_commits=5, http__port=agent.rpartition(":")[2],
            source__archive__path=stream, source__archive__rate=12, source__archive__seed=1,
            evaluation__probe_archive=probe, evaluation__holdout_fraction=0.2,
            method__name="mgclip", method__mgclip__drift_budget=0.001,
        )  # fmt: skip
        processes.enter_context(running(learning, log))
        serving = gapstream("serve", state__path=state, serve__port=server.rpartition(":")[2])
        processes.enter_context(running(serving, tmp_path / "serve.log"))
        command = [
            prometheus,
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'tsdb'}",
        ]
        processes.enter_context(
            running([*command, f"--web.listen-address={watcher}", "--log.level=error"], tmp_path / "prometheus.log")
        )

        # when the server is asked for something and for nonsense, and readers are sent back
        image = next(stream.rglob("1*.jpg")).read_bytes()
        until(lambda: get(f"http://{server}/v1/classify", image), "an answer", tmp_path / "serve.log")
        get(f"http://{server}/v1/classify", b"no image")
        until(lambda: ask("gapstream_tasks_total >= 2"), "two tasks learned", log)
        assert main(["rollback", "1", "--set", f"state.path={state}"]) == 0
        until(lambda: ask("gapstream_served_commit_number == 1 and gapstream_release_pinned == 1"), "held back", log)
        until(lambda: ask('sum(increase(gapstream_serve_requests_total{code="422"}[1m])) >= 0'), "two scrapes", log)

        # then
        empty = []
        for panel in panels():
            for target in panel["targets"]:
                query = target["expr"].replace("$__rate_interval", "1m").replace("$job", "gapstream")
                query = query.replace("$server", server).replace("$instance", agent)
                # a panel shows a span of time: what is there only while a task is trained may be gone by now
                shown = ask(f"max_over_time(({query})[2m:500ms])")
                if not any(map(math.isfinite, shown)) and panel["title"] not in WITHOUT_DATA:
                    empty.append((panel["title"], query))
        assert empty == []
        groups = get(f"http://{watcher}/api/v1/rules")["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []
        assert len(rules) == (DEPLOY / "prometheus/alerts.yaml").read_text().count("alert:")

        assert ask("sum(gapstream_updates_rolled_back_total) > 0")
        until(lambda: any((get(f"http://{agent}/pictures.json") or {}).values()), "a rejected record is pictured", log)
