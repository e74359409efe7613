"""The command line: exit codes, messages, and no torch where none is needed."""

import argparse
import os
import re
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image

from agent import cli
from agent.cli import COMMANDS, main, parser
from agent.commits import CommitStore
from agent.config import Config, load
from tests.fakes import ListSource, pipeline, records
from tests.test_worker import wait_until


def settings(**values: object) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


def get(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=5) as answer:
        return answer.read()


@pytest.fixture
def archive(tmp_path) -> Path:
    for number, name in enumerate(["ant", "bee"]):
        (tmp_path / "archive" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (0, number, 0)).save(tmp_path / "archive" / name / "1.png")
    return tmp_path / "archive"


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    from tests.test_text import Exports
    from tests.tiny import tiny_clip

    return Exports(tiny_clip(), tmp_path_factory.mktemp("made")).release().path


def test_wrong_usage_is_exit_code_2(capsys):
    for arguments in ([], ["fly"], ["predict"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
    assert "usage: gapstream" in capsys.readouterr().err


def test_a_wrong_configuration_is_exit_code_78_with_all_mistakes(capsys):
    assert main(["run", *settings(task__sampels=3, http__port="x")]) == 78
    message = capsys.readouterr().err
    assert "task.sampels" in message and "http.port" in message
    assert main(["run", "--set", "nonsense"]) == 78


def shown(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_command_once_below_its_group(capsys):
    text = shown(capsys, "--help")
    for name, command in COMMANDS.items():
        assert len(re.findall(rf"^  {name} +{re.escape(command.help)}$", text, re.MULTILINE)) == 1
        assert text.index(f"\n{command.group}:\n") < text.index(f"\n  {name} ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example_that_works(name, capsys):
    text = shown(capsys, name, "--help")

    example = text.partition("example:\n  ")[2].partition("\n")[0]
    program, *words = shlex.split(example.partition(" > ")[0])  # what follows is the shell's
    assert (program, words[0]) == ("gapstream", name)
    chosen = parser().parse_args(words)
    assert callable(chosen.function)
    assert all(action.help for action in argparse_actions(name))


def argparse_actions(name: str) -> list[argparse.Action]:
    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    chosen = commands.choices[name]
    chosen.fill()
    return chosen._actions


def test_the_version_is_that_of_the_installed_package(capsys):
    assert shown(capsys, "--version") == f"gapstream {metadata.version('gapstream')}\n"


def test_help_waits_for_no_heavy_library():
    code = f"""
import sys
from agent.cli import main
def heavy(*names):
    for name in names:
        try:
            main([name, "--help"])
        except SystemExit:
            pass
    return {{"torch", "open_clip", "kafka"}} & set(sys.modules)
assert not heavy(*{[name for name, command in COMMANDS.items() if command.group != "Kafka"]})
assert heavy("produce", "dlq") == {{"kafka"}}
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


def completions(line: str) -> list[str]:
    """What a shell is offered after `line`, as argcomplete's bash function asks for it: written to descriptor 8."""
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    command = ["bash", "-c", 'exec "$0" -m agent 8>&1 9>/dev/null 1>/dev/null 2>&1', sys.executable]
    done = subprocess.run(command, env={**os.environ, **asked, "COMP_TYPE": "9"}, stdout=subprocess.PIPE, text=True)
    return [word.rstrip() for word in done.stdout.split("\n")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("gapstream ", {*COMMANDS, "-h", "--help", "--version"}),
        ("gapstream re", {"releases", "report"}),
        ("gapstream rollback --n", {"--newest"}),
        ("gapstream bench --m", {"--methods"}),
        ("gapstream dlq re", {"replay"}),
        ("gapstream produce --order ", {"classes", "shuffled", "blurry"}),
    ],
)
def test_a_shell_can_complete_commands_options_and_choices(line, expected):
    assert set(completions(line)) == expected


def test_completion_imports_the_command_that_is_typed_alone():
    loud = {**os.environ, "_ARGCOMPLETE": "1", "COMP_LINE": "gapstream predict --", "COMP_POINT": "20"}
    code = "import sys; from agent.cli import parser; parser(); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], env=loud, stdout=subprocess.PIPE, text=True, check=True)
    commands = {name.rpartition(".")[2] for name in done.stdout.split() if name.startswith("agent.commands.")}
    assert commands == {"arguments", "predict"}


@pytest.mark.parametrize(
    ("configured", "in_force"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {}),
    ],
)
def test_threads_that_wait_let_go_of_their_cores_unless_the_environment_says_how_they_wait(
    monkeypatch, capsys, configured, in_force
):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what `main` sets is taken back after the test
        monkeypatch.delenv(name)
    for name, value in configured.items():
        monkeypatch.setenv(name, value)
    main(["config", "--example"])
    assert {name: value for name, value in os.environ.items() if name == "GOMP_SPINCOUNT"} == in_force


@pytest.mark.parametrize("file", ["cli.py", "__main__.py"])
def test_global_completion_finds_its_mark(file):
    # activate-global-python-argcomplete looks there, the former for the installed command
    assert "PYTHON_ARGCOMPLETE_OK" in (Path(cli.__file__).parent / file).read_text(encoding="utf-8")[:1024]


def test_config_prints_what_is_in_force(tmp_path, capsys):
    assert main(["config", *settings(task__samples=17)]) == 0
    (tmp_path / "printed.toml").write_text(capsys.readouterr().out)
    assert load(tmp_path / "printed.toml", {}).task.samples == 17


def test_config_example_is_the_defaults_explained(tmp_path, capsys):
    assert main(["config", "--example"]) == 0
    (tmp_path / "example.toml").write_text(printed := capsys.readouterr().out)
    assert load(tmp_path / "example.toml", {}).task == Config().task
    assert "# The task is cut after this number of samples." in printed


def test_a_second_agent_on_a_state_folder_exits_with_a_clear_message(tmp_path, archive, capsys):
    first = CommitStore(tmp_path / "state", 3)
    first.lock()
    assert main(["run", *settings(state__path=tmp_path / "state", source__archive__path=archive)]) == 1
    assert "in use by another agent" in capsys.readouterr().err


def test_a_commit_of_another_stream_exits_with_a_clear_message(tmp_path, archive, capsys):
    agent = pipeline(tmp_path / "state", ListSource(records("a")))
    agent.run()
    agent.commits.close()
    assert main(["run", *settings(state__path=tmp_path / "state", source__archive__path=archive)]) == 1
    assert "learned from another stream" in capsys.readouterr().err


def test_an_empty_archive_exits_with_a_clear_message(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["run", *settings(state__path=tmp_path / "state", source__archive__path=tmp_path / "empty")]) == 1
    assert capsys.readouterr().err.startswith("gapstream: no images in")


def test_a_taken_port_exits_with_a_clear_message(tmp_path, archive, capsys):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        where = settings(state__path=tmp_path / "state", source__archive__path=archive, http__port=port)
        assert main(["run", *where]) == 1
    assert f"cannot serve on 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_that_cannot_be_had_end_the_agent_with_one_clear_error(tmp_path, archive, capsys):
    where = settings(state__path=tmp_path / "state", source__archive__path=archive, http__enabled="false")
    assert main(["run", *where, *settings(model__name="ViT-B-32", model__pretrained="none.pt")]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("gapstream: the trainer could not be set up: ModelError: ")
    assert "none.pt" in message


def test_predict_and_report_say_when_there_is_nothing_yet(tmp_path, capsys):
    (tmp_path / "state").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    assert main(["predict", str(tmp_path / "1.png"), *settings(state__path=tmp_path / "state")]) == 1
    assert "no release in" in capsys.readouterr().err
    assert main(["report", *settings(state__path=tmp_path / "state")]) == 1
    assert "nothing is committed in" in capsys.readouterr().err


def test_predict_answers_without_torch(tmp_path, release):
    # given a release, a good image and a bad one
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "red.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    arguments = ["predict", "--model", str(release), "--top", "2", str(tmp_path / "bad.png"), str(tmp_path / "red.png")]
    code = f"import sys; from agent.cli import main; e = main({arguments}); print('torch' in sys.modules); sys.exit(e)"

    # when
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"COLUMNS": "200"})

    # then the good one is answered, the bad one named, and the exit code says that not all went well
    assert done.stdout.count("%") == 2 and "red.png" in done.stdout
    assert "bad.png: " in done.stderr
    assert done.stdout.endswith("False\n")
    assert done.returncode == 1


def test_predict_scores_names_that_were_never_learned(tmp_path, release, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "red.png")
    ask = ["predict", "--model", str(release), "--top", "0", str(tmp_path / "red.png")]

    assert main([*ask, "--name", "zebra", "--name", "cat"]) == 0

    printed = capsys.readouterr().out
    assert printed.count("%") == 4 and "zebra" in printed
    assert main([*ask, "--name", ""]) == 1
    assert "expected 1 to 200, not all blank" in capsys.readouterr().err


def test_health_and_status_are_served_while_the_agent_runs(tmp_path):
    # given an agent in the middle of an update
    archive = tmp_path / "archive"
    for name in ("ant", "busy 60"):
        (archive / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(archive / name / "1.png")
    order = ["source.archive.class_order=ant,busy 60", "source.archive.classes_per_task=1"]
    agent = subprocess.Popen(
        [sys.executable, "-m", "tests.fake_agent", str(tmp_path / "state"), str(archive), *order],
        stderr=subprocess.PIPE,
        text=True,
    )
    address = ""
    for line in agent.stderr:
        if "status page on " in line:
            address = line.split("status page on ")[1].strip()
        if "busy now" in line:
            break

    # when, then it is alive, ready with the release of the first task, and says what it does
    try:
        for path in ("livez", "readyz", "healthz"):
            assert b'"ok"' in get(address + path)
        wait_until(lambda: b'gapstream_state="training"} 1.0' in get(address + "metrics"))
        assert b'"number": 1' in get(address + "status.json")
    finally:
        agent.terminate()
        agent.communicate(timeout=10)


def test_an_agent_that_has_released_nothing_is_not_ready(tmp_path):
    archive = tmp_path / "archive"
    (archive / "busy 60").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(archive / "busy 60" / "1.png")
    agent = subprocess.Popen(
        [sys.executable, "-m", "tests.fake_agent", str(tmp_path / "state"), str(archive)],
        stderr=subprocess.PIPE,
        text=True,
    )
    address = next(line for line in agent.stderr if "status page on " in line).split("status page on ")[1].strip()
    try:
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(address + "readyz")
        assert refused.value.code == 503
        assert b"nothing is released yet" in refused.value.read()
    finally:
        agent.terminate()
        agent.communicate(timeout=10)


def test_the_agent_process_imports_no_torch():
    modules = "agent.cli, agent.run, agent.parts, agent.commands.run, agent.worker, exporter.metrics"
    code = f"import sys, {modules}; assert not {{'torch', 'open_clip', 'onnxruntime'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "agent", "config"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("[model]")
