"""The README says what is true: its metrics, commands, keys and links are those of the code."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry
from pydantic import BaseModel

from agent import cli
from agent.config import Config
from exporter.metrics import Metrics

TOP = Path(__file__).parent.parent
README = (TOP / "README.md").read_text(encoding="utf-8")


def metrics_table() -> str:
    """The README's table, as it follows from the metrics an agent exposes."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    rows = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for family in registry.collect():
        if not family.name.startswith("gapstream_"):
            continue
        kind = {"counter": "counter", "info": "info", "stateset": "state set"}.get(family.type, family.type)
        name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = ", ".join(label_names(metrics, family.name))
        rows.append(f"| `{name}` | {kind} | {labels} | {family.documentation} |")
    return "\n".join(rows)


def label_names(metrics: Metrics, family: str) -> tuple[str, ...]:
    for instrument in vars(metrics).values():
        if getattr(instrument, "_name", None) == family:
            return instrument._labelnames
    return ()


def keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    found = set()
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= keys(inner, f"{prefix}{name}.")
        found.add(prefix + name)
    return found


def test_the_table_of_metrics_is_that_of_a_running_agent():
    assert metrics_table() in README, "expected in README.md:\n" + metrics_table()


def alerts_table() -> str:
    """The README's table, as it follows from the alert rules."""
    rules = yaml.safe_load((TOP / "deploy/prometheus/alerts.yaml").read_text(encoding="utf-8"))
    rows = ["| alert | severity | what it means | what to do |", "|---|---|---|---|"]
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        told = rule["annotations"]
        cells = f"`{rule['alert']}`", rule["labels"]["severity"], told["description"], told["runbook"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def test_the_table_of_alerts_is_that_of_the_rules():
    assert alerts_table() in README, "expected in README.md:\n" + alerts_table()


def test_advice_for_one_method_says_so_and_names_settings_that_exist():
    rules = yaml.safe_load((TOP / "deploy/prometheus/alerts.yaml").read_text(encoding="utf-8"))
    sections = "|".join(Config.model_fields)
    named = set()
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        advice = rule["annotations"]["runbook"]
        named |= set(re.findall(rf"\b(?:{sections})\.[a-z_]+(?:\.[a-z_]+)*", advice))
        for method in re.findall(r"\bmethod\.([a-z]+)\.", advice):
            assert f"with {method}" in advice.lower(), rule["alert"]
    assert named
    assert named - keys(Config) == set()


def test_the_table_of_rows_is_that_of_the_dashboard():
    dashboard = json.loads((TOP / "deploy/grafana/dashboards/gapstream.json").read_text(encoding="utf-8"))
    titles = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    table = README.partition("| row | look here for |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| ([^|]+?) \|", table, re.MULTILINE) == titles


def test_every_command_shown_can_be_parsed():
    shown = re.findall(r"^\.venv/bin/gapstream (.+)$", README.replace("\\\n", ""), re.MULTILINE)
    assert shown
    for line in shown:
        cli.parser().parse_args(shlex.split(line, comments=True))


def test_every_command_named_exists():
    for name in re.findall(r"`gapstream (\w+)", README):
        assert name in cli.COMMANDS


def test_every_make_target_named_exists():
    targets = re.findall(r"^([\w-]+):", (TOP / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for name in re.findall(r"^make (\S+)|`make ([\w-]+)`", README, re.MULTILINE):
        assert "".join(name) in targets


def test_every_key_named_is_a_setting():
    sections = "|".join(Config.model_fields)
    named = set(re.findall(rf"`((?:{sections})\.[a-z_.]+)`", README)) | set(re.findall(r"--set ([a-z_.]+)=", README))
    files = {name for name in named if name.endswith((".json", ".onnx"))}
    assert named - files
    assert named - files - keys(Config) == set()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_every_file_linked_is_there(path):
    assert (TOP / path).exists()
