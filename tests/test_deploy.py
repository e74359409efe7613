"""What is shipped beside the code says what the code does: alert rules, dashboard, service unit."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from agent import cli
from agent.config import load
from exporter.metrics import Metrics
from exporter.serving_metrics import KafkaMetrics, ServeMetrics
from streams.record import Reason

DEPLOY = Path(__file__).parent.parent / "deploy"
DASHBOARD = DEPLOY / "grafana/dashboards/gapstream.json"


def program(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed; to run this test: apt-get install {package}")
    return path


def registry_of(made: Callable[[CollectorRegistry], object]) -> CollectorRegistry:
    registry = CollectorRegistry()
    made(registry)
    return registry


def kafka_metrics(registry: CollectorRegistry) -> KafkaMetrics:
    return KafkaMetrics(registry, Reason)


def exposed() -> set[str]:
    """Every metric and series name of an agent and of a server."""
    names = set()
    for family in chain(*(registry_of(made).collect() for made in (Metrics, ServeMetrics, kafka_metrics))):
        suffixes = {
            "counter": ["_total"],
            "histogram": ["", "_bucket", "_sum", "_count"],
            "info": ["_info"],
        }.get(family.type, [""])
        names |= {family.name + suffix for suffix in suffixes}
    return names


def panels() -> list[dict]:
    return [panel for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"] if panel["type"] != "row"]


def test_alert_rules_and_prometheus_config_are_valid():
    promtool = program("promtool", "prometheus")
    subprocess.run([promtool, "check", "config", DEPLOY / "prometheus/prometheus.yml"], check=True, timeout=60)


def test_every_alert_fires_on_its_symptom_and_is_silent_beside_it():
    promtool = program("promtool", "prometheus")
    tests = DEPLOY / "prometheus/alerts_test.yaml"
    done = subprocess.run([promtool, "test", "rules", tests], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_and_says_what_to_do():
    rules = (DEPLOY / "prometheus/alerts.yaml").read_text(encoding="utf-8")
    tests = (DEPLOY / "prometheus/alerts_test.yaml").read_text(encoding="utf-8")
    names = re.findall(r"alert: (\w+)", rules)
    assert names
    assert rules.count("runbook:") == rules.count("severity:") == len(names)
    for name in names:
        assert f"alertname: {name}}}" in tests, f"{name} has no test that it stays silent"
        assert f'alertname="{name}"' in tests, f"{name} has no test that it fires"


def test_alerts_and_panels_use_only_series_that_exist():
    queries = [target["expr"] for panel in panels() for target in panel["targets"]]
    used = set(re.findall(r"gapstream_\w+", (DEPLOY / "prometheus/alerts.yaml").read_text(encoding="utf-8")))
    for query in queries:
        used |= set(re.findall(r"gapstream_\w+", re.sub(r"by \([^)]*\)", "", query)))
    assert used - exposed() == set()


def test_every_metric_is_on_the_dashboard():
    shown = " ".join(target["expr"] for panel in panels() for target in panel["targets"])
    ours = {name for name in exposed() if name.startswith("gapstream_") and not name.endswith(("_sum", "_count"))}
    missing = {name for name in ours if name not in shown and name.replace("_bucket", "_sum") not in shown}
    assert missing == set()


MEASURES = {
    "bytes": r"_bytes",
    "seconds": r"_seconds",
    "samples": r"_samples",
    "steps": r"_steps",
    "epochs": r"_epoch",
    "loss": r"_loss",
    "distance": r"_distance",
    "largest difference": r"_max_abs_error",
    "cosine": r"_similarity",
    "ratio": r"_ratio",
}
"""What is measured -> the names of metrics that do; the others count."""


def measured(query: str) -> str:
    metric = re.findall(r"[a-z_]{10,}", query.partition("{")[0])[-1]
    return next((measure for measure, name in MEASURES.items() if re.search(name, metric)), "number")


def right_axis(panel: dict) -> dict[str, str]:
    """The queries of a panel that the right axis is for -> the unit there."""
    found = {}
    for override in panel["fieldConfig"]["overrides"]:
        properties = {one["id"]: one["value"] for one in override["properties"]}
        if properties.get("custom.axisPlacement") == "right":
            assert override["matcher"]["id"] == "byFrameRefID"
            assert properties["custom.axisLabel"], panel["title"]
            found[override["matcher"]["options"]] = properties["unit"]
    return found


def test_every_panel_says_what_it_shows():
    assert [panel["title"] for panel in panels() if len(panel.get("description", "")) < 20] == []


def test_series_of_several_agents_can_be_told_apart():
    for panel in panels():
        for target in panel["targets"]:
            # a panel that adds instances up has no label of them left
            together = re.search(r"\b(sum|count)\b", target["expr"]) and "instance" not in "".join(
                re.findall(r"by \(([^)]*)\)", target["expr"])
            )
            if panel["type"] == "table":
                assert "instance" in target["expr"].partition("(")[2].partition(")")[0], panel["title"]
            elif not together:
                assert "{{instance}}" in target["legendFormat"], panel["title"]


def test_an_axis_has_one_unit():
    for panel in panels():
        if panel["type"] == "timeseries":
            axes = right_axis(panel)
            left = {measured(target["expr"]) for target in panel["targets"] if target["refId"] not in axes}
            right = {measured(target["expr"]) for target in panel["targets"] if target["refId"] in axes}
            assert len(left) == 1 and len(right) <= 1 and not left & right, panel["title"]


def test_firing_alerts_are_seen_from_afar():
    (panel,) = [panel for panel in panels() if panel["title"] == "Firing alerts"]
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["color"] == {"mode": "thresholds"}
    assert defaults["thresholds"] == {
        "mode": "absolute",
        "steps": [{"color": "green", "value": None}, {"color": "red", "value": 1}],
    }
    assert panel["options"]["colorMode"] == "background"


def test_tables_show_one_row_for_each_thing_and_no_column_of_the_query_s_own():
    for panel in panels():
        if panel["type"] == "table":
            steps = {step["id"]: step.get("options", {}) for step in panel["transformations"]}
            assert ("merge" in steps) == (len(panel["targets"]) > 1), panel["title"]
            hidden = steps["organize"]["excludeByName"]
            values = ["Value"] if len(panel["targets"]) == 1 else [f"Value #{one['refId']}" for one in panel["targets"]]
            for column in ("Time", *values):
                assert hidden.get(column) or column in steps["organize"].get("renameByName", {}), panel["title"]
            assert all(target["format"] == "table" and target["instant"] for target in panel["targets"])


@pytest.mark.parametrize("title", ["Rejected", "Answered with an error"])
def test_the_total_is_drawn_only_where_no_reason_is(title, tmp_path):
    promtool = program("promtool", "prometheus")
    (panel,) = [panel for panel in panels() if panel["title"] == title]
    query = re.sub(r"\{[^}]*\}", "", panel["targets"][0]["expr"]).replace("$__rate_interval", "5m")
    metric = re.findall(r"gapstream_\w+", query)[0]

    def case(bomb: str, samples: list[dict]) -> dict:
        values = {"bomb": bomb, "empty": "0x60"}
        series = [{"series": f'{metric}{{reason="{name}"}}', "values": value} for name, value in values.items()]
        return {
            "interval": "1m",
            "input_series": series,
            "promql_expr_test": [{"expr": query, "eval_time": "30m", "exp_samples": samples}],
        }

    cases = [case("0+60x60", [{"labels": '{reason="bomb"}', "value": 1}]), case("0x60", [{"labels": "{}", "value": 0}])]
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"tests": cases}))
    done = subprocess.run(
        [promtool, "test", "rules", tmp_path / "test.yaml"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_settings_in_the_compose_file_and_the_manifest_are_valid(tmp_path):
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    config = load(None, compose["services"]["agent"]["environment"])
    assert config.source.kafka.topics == ("images",)
    command = compose["services"]["producer"]["command"]
    assert cli.parser().parse_args(command).topic == "images"

    manifests = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))
    (settings,) = [one["data"] for one in manifests if one["kind"] == "ConfigMap"]
    (tmp_path / "gapstream.toml").write_text(settings["gapstream.toml"])
    assert load(tmp_path / "gapstream.toml", {}).source.kind == "kafka"


def test_the_image_has_every_package_and_nothing_of_the_tests():
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert names == {"agent", "exporter", "streams", "pyproject.toml", "constraints.txt", "LICENSE", "README.md"}
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {name.removeprefix("!") for name in allowed if name.startswith("!")} == names
