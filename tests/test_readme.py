"""The pages say what is true: their metrics, alerts, commands, keys, numbers and links are those of the code."""

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
from streams.record import Reason

TOP = Path(__file__).parent.parent
ROOMS = ("agent", "streams", "exporter", "deploy")
PAGES = {
    path.relative_to(TOP).as_posix(): path.read_text(encoding="utf-8")
    for path in (TOP / "README.md", *(page for room in ROOMS for page in sorted((TOP / room).rglob("*.md"))))
}
"""Every page, by its path from the top of the repository."""
README = PAGES["README.md"]
METHODS = PAGES["agent/methods/README.md"]
OPERATIONS = PAGES["deploy/README.md"]
EVERYTHING = "\n".join(PAGES.values())

LINKS = sorted({(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)})


def rules() -> list[dict]:
    groups = yaml.safe_load((TOP / "deploy/prometheus/alerts.yaml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def metrics_table() -> str:
    """The table of metrics, as it follows from those an agent exposes."""
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


def anchors(page: str) -> set[str]:
    """The anchors that a code host gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_rows(text: str, head: str) -> dict[str, list[str]]:
    """The rows of the table that begins with `head`: the method in the first cell -> the other cells."""
    table = text[text.index(head) :].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {re.findall(r"`(\w[^`]*)`", row[0])[0]: row[1:] for row in rows}


def test_the_first_page_stays_short():
    assert len(README.splitlines()) <= 150


def test_the_table_of_metrics_is_that_of_a_running_agent():
    assert metrics_table() in OPERATIONS, "expected in deploy/README.md:\n" + metrics_table()


def alerts_table() -> str:
    """The table of alerts, as it follows from the alert rules."""
    rows = ["| alert | severity | what it means | what to do |", "|---|---|---|---|"]
    for rule in rules():
        told = rule["annotations"]
        cells = f"`{rule['alert']}`", rule["labels"]["severity"], told["description"], told["runbook"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def test_the_table_of_alerts_is_that_of_the_rules():
    assert alerts_table() in OPERATIONS, "expected in deploy/README.md:\n" + alerts_table()


def test_advice_for_one_method_says_so_and_names_settings_that_exist():
    sections = "|".join(Config.model_fields)
    named = set()
    for rule in rules():
        advice = rule["annotations"]["runbook"]
        named |= set(re.findall(rf"\b(?:{sections})\.[a-z_]+(?:\.[a-z_]+)*", advice))
        for method in re.findall(r"\bmethod\.([a-z]+)\.", advice):
            assert f"with {method}" in advice.lower(), rule["alert"]
    assert named
    assert named - keys(Config) == set()


def test_advice_points_at_chapters_that_are_there():
    pointers = [
        (rule["alert"], page, anchor)
        for rule in rules()
        for page, anchor in re.findall(r"([\w/.-]+\.md)(?:#([\w-]+))?", rule["annotations"]["runbook"])
    ]
    assert pointers
    for alert, page, anchor in pointers:
        assert page in PAGES and anchor in anchors(page), alert


def test_the_table_of_rows_is_that_of_the_dashboard():
    dashboard = json.loads((TOP / "deploy/grafana/dashboards/gapstream.json").read_text(encoding="utf-8"))
    titles = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    table = OPERATIONS.partition("| row | look here for |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| ([^|]+?) \|", table, re.MULTILINE) == titles


def test_the_numbers_of_the_methods_are_the_same_wherever_they_stand():
    short = table_rows(README, "| method | Avg % |")
    full = table_rows(METHODS, "| Method | Avg % |")
    assert short.keys() == full.keys()
    for method, (avg, last, forgetting, retention, _) in short.items():
        means = [cell.partition(" ±")[0] for cell in full[method]]
        assert [avg, last, forgetting, retention] == [means[0], means[1], means[2], means[4]], method
    (command,) = re.findall(r"^\.venv/bin/gapstream bench .+?$.+?$", README, re.MULTILINE | re.DOTALL)
    assert command in METHODS


def test_the_wire_format_lists_every_reason_and_every_header_of_a_dead_letter():
    page = PAGES["deploy/wire-format.md"]
    table = page.partition("| reason | what was wrong |")[2].partition("\n\n")[0]
    assert {
        name for row in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE) for name in row.strip("`").split("`, `")
    } == {*Reason}
    source = (TOP / "streams/dead_letter_format.py").read_text(encoding="utf-8")
    headers = set(re.findall(r'"((?:__connect|gapstream)\.errors)(\.[\w.-]+)"', source))
    assert headers
    for prefix, name in headers:
        assert f"`{prefix}{name}`" in page or f"`{name}`" in page, prefix + name


def test_every_command_shown_can_be_parsed():
    shown = re.findall(r"(?:^ *|`)[\w./]*/bin/gapstream ([^`\n]+)", EVERYTHING.replace("\\\n", ""), re.MULTILINE)
    assert shown
    for line in shown:
        cli.parser().parse_args(shlex.split(line.partition(" > ")[0], comments=True))


def test_every_command_named_exists():
    for name in re.findall(r"`gapstream (\w+)", EVERYTHING):
        assert name in cli.COMMANDS


def test_every_test_named_is_there():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", EVERYTHING)
    assert len(named) > 20
    for path, name in named:
        assert f"def {name}(" in (TOP / path).read_text(encoding="utf-8"), f"{path}::{name}"


def test_every_measurement_named_can_be_run():
    named = {
        a or b.replace(".", "/") for a, b in re.findall(r"python (?:(tests/\S+)\.py|-m (tests[\w.]+))", EVERYTHING)
    }
    assert named
    for name in named:
        assert (TOP / f"{name}.py").exists(), name


def test_every_make_target_named_exists():
    targets = re.findall(r"^([\w-]+):", (TOP / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for name in re.findall(r"^make (\S+)|`(?:\w+=\w+ )?make ([\w-]+)`", EVERYTHING, re.MULTILINE):
        assert "".join(name) in targets


def test_every_key_named_is_a_setting():
    sections = "|".join(Config.model_fields)
    named = set(re.findall(rf"`((?:{sections})\.[a-z_.]+)(?: = [^`]+)?`", EVERYTHING))
    named |= set(re.findall(r"--set ([a-z_.]+)=", EVERYTHING))
    named |= set(re.findall(rf"`\[((?:{sections})(?:\.[a-z_]+)*)\]`", EVERYTHING))
    files = {name for name in named if name.endswith((".json", ".onnx", ".data"))}
    assert named - files
    assert named - files - keys(Config) == set()


@pytest.mark.parametrize("path", sorted(set(re.findall(rf"`((?:{'|'.join(ROOMS)}|tests)/[\w./-]*)`", EVERYTHING))))
def test_every_file_named_is_there(path):
    assert (TOP / path).exists()


def test_what_is_said_to_be_in_a_file_is_in_it():
    said = re.findall(r"(?:`(\w+)`|\b([A-Z_]{5,}))(?: and `\w+`)?(?:, both)? (?:of|in)\s+`([\w/]+\.py)`", EVERYTHING)
    assert {first or second for first, second, _ in said} >= {"METHODS", "SOURCES", "PRECISIONS", "CutRule"}
    for first, second, path in said:
        assert re.search(rf"\b{first or second}\b", (TOP / path).read_text(encoding="utf-8")), (first or second, path)


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_every_link_leads_somewhere(page, link):
    path, _, anchor = link.partition("#")
    target = ((TOP / page).parent / path).resolve() if path else TOP / page
    assert target.exists()
    if anchor:
        assert anchor in anchors(target.relative_to(TOP).as_posix())
