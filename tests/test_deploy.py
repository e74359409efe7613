"""What is shipped beside the code says what the code does: alert rules, dashboard, service unit."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from agent import cli
from agent.config import Config, load
from exporter.metrics import Metrics
from exporter.serving_metrics import KafkaMetrics, ServeMetrics
from streams.record import Reason

TOP = Path(__file__).parent.parent
DEPLOY = TOP / "deploy"
DASHBOARD = DEPLOY / "grafana/dashboards/gapstream.json"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


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
    done = subprocess.run([promtool, "test", "rules", tests], capture_output=True, text=True, timeout=240)
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
    "files": r"_files",
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


VERSION = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def manifests() -> dict[tuple[str, str], dict]:
    """What kubectl is given, by kind and name."""
    text = [(DEPLOY / name).read_text(encoding="utf-8") for name in ("kubernetes.yaml", "kubernetes-monitoring.yaml")]
    found = [one for part in text for one in yaml.safe_load_all(part)]
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


def deployments() -> list[dict]:
    return [one for (kind, _), one in manifests().items() if kind == "Deployment"]


def jobs_in(text: str) -> set[str]:
    return set(re.findall(r'job="([\w-]+)"', text))


ALERT_JOBS = jobs_in((DEPLOY / "prometheus/alerts.yaml").read_text(encoding="utf-8"))
"""The job names that the alerts ask for."""


def test_the_settings_in_the_compose_file_and_the_manifest_are_valid(tmp_path):
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    config = load(None, compose["services"]["agent"]["environment"])
    assert config.source.kafka.topics == ("images",)
    command = compose["services"]["producer"]["command"]
    assert cli.parser().parse_args(command).topic == "images"

    settings = manifests()["ConfigMap", "gapstream"]["data"]
    (tmp_path / "gapstream.toml").write_text(settings["gapstream.toml"])
    config = load(tmp_path / "gapstream.toml", {})
    assert config.source.kind == "kafka"


def test_in_the_image_everything_listens_where_others_can_reach_it():
    config = load(None, dict(re.findall(r"(GAPSTREAM_\w+)=(\S+)", DOCKERFILE)))
    assert config.http.host == config.serve.host == "0.0.0.0"
    assert config.state.path == Path("/var/lib/gapstream/state")


def test_images_are_pinned_to_this_version():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    used = [service["image"] for service in compose["services"].values()]
    for deployment in deployments():
        for container in deployment["spec"]["template"]["spec"]["containers"]:
            used.append(container["image"])
            assert container["imagePullPolicy"] == "IfNotPresent"
    assert {image for image in used if "gapstream" in image} == {f"gapstream:{VERSION}"}
    assert [image for image in used if ":" not in image or image.endswith(":latest")] == []


def test_pods_bear_the_job_names_that_the_alerts_ask_for():
    assert sorted(ALERT_JOBS) == ["gapstream", "gapstream-serve"]
    monitor = manifests()["PodMonitor", "gapstream"]["spec"]
    (selected,) = monitor["selector"]["matchExpressions"]
    plain = yaml.safe_load((DEPLOY / "prometheus/kubernetes.yml").read_text(encoding="utf-8"))
    relabeled = plain["scrape_configs"][0]["relabel_configs"]
    static = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8"))
    pods = [deployment["spec"]["template"] for deployment in deployments()]
    label = monitor["jobLabel"]

    assert {pod["metadata"]["labels"][label] for pod in pods} == set(selected["values"]) == ALERT_JOBS
    assert all("model" in pod["metadata"]["labels"] for pod in pods) and monitor["podTargetLabels"] == ["model"]
    [ports] = {tuple(port["name"] for port in pod["spec"]["containers"][0]["ports"]) for pod in pods}
    assert [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]] == list(ports)
    meta = "__meta_kubernetes_pod_label_" + re.sub(r"\W", "_", label)
    assert {"source_labels": [meta], "target_label": "job"} in relabeled
    assert {"source_labels": [meta], "regex": "|".join(sorted(ALERT_JOBS)), "action": "keep"} in relabeled
    assert {one["job_name"] for one in static["scrape_configs"]} == ALERT_JOBS


def test_the_scrape_job_for_pods_is_valid(tmp_path):
    promtool = program("promtool", "prometheus")
    config = yaml.safe_load((DEPLOY / "prometheus/kubernetes.yml").read_text(encoding="utf-8"))
    # Debian's promtool is built without Kubernetes; where the pods come from is the one thing it does not see.
    assert config["scrape_configs"][0].pop("kubernetes_sd_configs") == [{"role": "pod"}]
    config["rule_files"] = []
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    subprocess.run([promtool, "check", "config", tmp_path / "prometheus.yml"], check=True, timeout=60)


def test_pods_neither_fill_their_node_nor_change_the_owner_of_every_commit():
    for deployment in deployments():
        pod = deployment["spec"]["template"]["spec"]
        for volume in pod["volumes"]:
            assert "emptyDir" not in volume or volume["emptyDir"].get("sizeLimit"), deployment["metadata"]["name"]
        security = pod["securityContext"]
        assert "fsGroup" not in security or security["fsGroupChangePolicy"] == "OnRootMismatch"
        for container in pod["containers"]:
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()


def test_servers_are_scaled_and_only_read_the_state():
    everything = manifests()
    scaler = everything["HorizontalPodAutoscaler", "gapstream-serve"]["spec"]
    target = scaler["scaleTargetRef"]
    deployment = everything[target["kind"], target["name"]]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert "replicas" not in deployment["spec"], "apply would undo what the autoscaler did"
    assert container["resources"]["requests"]["cpu"], "a share of nothing"
    assert container["args"][0] == "serve" and cli.parser().parse_args(container["args"])
    [state] = [mount for mount in container["volumeMounts"] if mount["name"] == "state"]
    assert state["readOnly"] is True


def stages() -> dict[str, list[str]]:
    """The instructions of each stage of the image, comments and line breaks taken out."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[str]] = {"": []}
    for line in filter(None, (re.sub(r" +", " ", line).strip() for line in text.splitlines())):
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            found[match[2]] = [line]
        else:
            found[list(found)[-1]].append(line)
    return found


def test_the_image_has_every_package_and_nothing_of_the_tests():
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    packages = {"agent", "exporter", "streams"}
    assert names == packages | {"pyproject.toml", "MANIFEST.in", "constraints.txt", "LICENSE", "README.md"}
    allowed = (TOP / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {name.removeprefix("!") for name in allowed if name.startswith("!")} == names
    assert not list(DEPLOY.glob("*.dockerignore")), "only BuildKit reads it there"


def test_an_edit_of_the_sources_leaves_the_layer_of_the_dependencies_alone():
    made = stages()
    for name in ("build-cuda", "build-cpu"):
        assert made[name][0] == f"FROM build AS {name}"
        assert not any(line.startswith("COPY") for line in made[name])
    assert [line for line in made["build"] if line.startswith("COPY")] == ["COPY pyproject.toml constraints.txt ./"]
    assert "RUN uv pip install --no-deps ." in made["package"]
    for name in ("cuda", "cpu"):
        assert made[name][0] == f"FROM base AS {name}"
        copies = [line for line in made[name] if line.startswith("COPY")]
        assert copies == [
            f"COPY --from={stage} /opt/gapstream /opt/gapstream" for stage in (f"build-{name}", "package")
        ]


def test_whatever_the_image_installs_has_the_versions_that_were_tested():
    made = stages()
    for line in made["build-cuda"] + made["build-cpu"]:
        for command in re.findall(r"uv pip install [^&]+", line):
            assert "-c constraints.txt" in command or command.strip().endswith("-r torch.txt")
    assert "onnxruntime-gpu ; python_version < '3'" in DOCKERFILE, "the image for CPUs has no second onnxruntime"
    assert re.search(r"^ARG BASE=python:\d+\.\d+\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)
    assert made["base"][0] == "FROM ${BASE} AS base" and made["build"][0] == "FROM ${BASE} AS build"
    assert re.search(r"pip install --no-cache-dir uv==\d", made["build"][1])


def test_nothing_can_be_installed_inside_the_image():
    made = stages()
    assert "python -m venv --without-pip /opt/gapstream" in made["build"][1]
    assert any("pip uninstall" in line for line in made["base"])
    assert not any("uv" in line.split() for name in ("base", "cpu", "cuda") for line in made[name])


def test_the_ports_and_the_health_checks_are_those_of_the_configuration():
    ports = {str(Config().http.port), str(Config().serve.port)}
    (exposed_ports,) = re.findall(r"^EXPOSE (.+)$", DOCKERFILE, re.MULTILINE)
    assert set(exposed_ports.split()) == ports
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for name, port in (("agent", Config().http.port), ("serve", Config().serve.port)):
        assert f"127.0.0.1:{port}/livez" in " ".join(services[name]["healthcheck"]["test"])


def test_wheel_and_sdist_bring_the_versions_that_were_tested(tmp_path):
    # given the sources as they are in the repository, with a small file for each large one
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "MANIFEST.in", "constraints.txt", "LICENSE", "README.md"):
        shutil.copy(TOP / name, source)
    for package in ("agent", "exporter", "streams"):
        shutil.copytree(TOP / package, source / package, ignore=shutil.ignore_patterns("*.safetensors", "*.zip"))
    build = "import sys; from setuptools import build_meta as b; to = sys.argv[1]; b.build_wheel(to); b.build_sdist(to)"

    # when both are built
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, check=True, capture_output=True, timeout=120)

    # then
    tested = (TOP / "constraints.txt").read_bytes()
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith("constraints.txt")]
        assert name.endswith(".data/data/share/gapstream/constraints.txt") and wheel.read(name) == tested
        assert not [name for name in wheel.namelist() if name.startswith("tests")]
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        (file,) = [one for one in sdist.getmembers() if one.name.endswith("/constraints.txt")]
        assert sdist.extractfile(file).read() == tested
        assert not [one for one in sdist.getmembers() if "/tests/" in one.name]


def test_what_is_installed_comes_from_a_wheel_or_the_repository_and_has_the_versions_that_were_tested():
    places = [
        "README.md",
        "deploy/README.md",
        "deploy/systemd/gapstream.service",
        "deploy/systemd/gapstream-serve.service",
    ]
    text = "\n".join((TOP / place).read_text(encoding="utf-8") for place in places)
    commands = re.findall(r"pip install .*", text)
    assert len(commands) >= 2
    for command in commands:
        assert "-c constraints.txt" in command and "gapstream-*.whl" in command, command
