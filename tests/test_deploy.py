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
