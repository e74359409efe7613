"""The command line: exit codes, messages, and no torch where none is needed."""

import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from agent.cli import COMMANDS, main
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


def test_every_command_explains_itself(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as exit_:
            main([name, "--help"])
        assert exit_.value.code == 0


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
    assert f"cannot serve /metrics on 127.0.0.1:{port}" in capsys.readouterr().err


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
