import os
import re
import socket
import subprocess
import threading
import time
from contextlib import contextmanager

import pytest

from exporter.serve import Server
from exporter.systemd import supervised
from tests.processes import gapstream, get
from tests.test_deploy import DEPLOY, program
from tests.test_serve import wait_for

UNITS = DEPLOY / "systemd"


class Agent:
    """What supervised is told about; its parts are switched by the tests."""

    def __init__(self):
        self.reasons = []
        self.is_ready = True
        self.stop = threading.Event()

    @contextmanager
    def supervised(self, env):
        with supervised(lambda: self.reasons, lambda: self.is_ready, lambda: "consuming; 10 classes", self.stop, env):
            yield


@pytest.fixture
def agent():
    return Agent()


@pytest.fixture
def systemd(tmp_path):
    """systemd's end of the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        end.settimeout(60)
        yield end


def env(systemd, watchdog_s=0.15):
    return {
        "NOTIFY_SOCKET": systemd.getsockname(),
        "WATCHDOG_USEC": str(int(watchdog_s * 1e6)),
        "WATCHDOG_PID": str(os.getpid()),
    }


def told(systemd) -> list[str]:
    return systemd.recv(4096).decode().splitlines()


def until(systemd, line: str, limit=50) -> list[str]:
    for _ in range(limit):
        lines = told(systemd)
        if line in lines:
            return lines
    raise AssertionError(f"systemd was never told {line}")


def test_systemd_is_told_ready_once_and_what_the_agent_does(agent, systemd):
    with agent.supervised(env(systemd)):
        assert {"READY=1", "STATUS=consuming; 10 classes"} <= set(told(systemd))
        assert "READY=1" not in told(systemd)


def test_until_it_is_ready_the_start_is_given_more_time(agent, systemd):
    agent.is_ready = False
    with agent.supervised(env(systemd)):
        first = told(systemd)
        assert "READY=1" not in first
        assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in first)
        agent.is_ready = True
        until(systemd, "READY=1")


def test_the_watchdog_is_pinged_only_while_every_loop_lives(agent, systemd):
    with agent.supervised(env(systemd)):
        until(systemd, "WATCHDOG=1")
        agent.reasons = ["the pipeline loop was last seen 70 s ago"]
        told(systemd)  # perhaps sent before
        assert not any("WATCHDOG=1" in told(systemd) for _ in range(5))
        agent.reasons = []
        until(systemd, "WATCHDOG=1")


def test_stopping_is_said_at_once_and_the_pings_go_on_to_the_end(agent, systemd):
    with agent.supervised(env(systemd, watchdog_s=30)):
        told(systemd)
        agent.stop.set()
        lines = told(systemd)
        assert "STOPPING=1" in lines
        assert "WATCHDOG=1" in lines


def test_an_abstract_address_is_understood(agent):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(f"\0gapstream-test-{os.getpid()}")
        end.settimeout(10)
        with agent.supervised({"NOTIFY_SOCKET": f"@gapstream-test-{os.getpid()}"}):
            assert "READY=1" in told(end)


def test_without_systemd_nothing_runs(agent):
    with agent.supervised({}):
        assert "systemd" not in [thread.name for thread in threading.enumerate()]


def test_a_socket_that_is_gone_is_said_once_and_does_no_harm(agent, systemd, tmp_path, caplog):
    gone = {**env(systemd, watchdog_s=0.03), "NOTIFY_SOCKET": str(tmp_path / "gone")}
    asked = threading.Semaphore(0)
    with supervised(lambda: asked.release() or [], lambda: True, lambda: "", agent.stop, gone):
        for _ in range(5):
            assert asked.acquire(timeout=10)
    assert caplog.text.count("systemd does not listen") == 1


@pytest.mark.parametrize(
    ("unit", "drop_in"), [("gapstream.service", "gpu.conf"), ("gapstream-serve.service", "serve-kafka.conf")]
)
def test_the_units_and_their_drop_ins_are_valid(unit, drop_in, tmp_path):
    analyze = program("systemd-analyze", "systemd")
    command = tmp_path / "gapstream"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    folder = tmp_path / f"{unit}.d"
    folder.mkdir()
    for name, place in ((unit, tmp_path), (drop_in, folder)):
        text = (UNITS / name).read_text(encoding="utf-8")
        (place / name).write_text(text.replace("/opt/gapstream/bin/gapstream", str(command)))
    done = subprocess.run([analyze, "verify", "--man=no", tmp_path / unit], capture_output=True, text=True, timeout=60)
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if "gapstream" in line]
    assert done.returncode == 0 and complaints == []


@pytest.mark.parametrize("name", ["gapstream.service", "gapstream-serve.service"])
def test_a_service_that_hangs_is_ended_and_has_files_for_many_clients(name):
    unit = (UNITS / name).read_text(encoding="utf-8")
    assert {"Type=notify", "WatchdogSignal=SIGABRT", "Environment=PYTHONFAULTHANDLER=1"} <= set(unit.splitlines())
    assert re.search(r"^WatchdogSec=\d+$", unit, re.MULTILINE)
    assert int(re.search(r"^LimitNOFILE=(\d+)$", unit, re.MULTILINE)[1]) >= 16384


def test_a_server_tells_systemd_that_it_answers_before_there_is_a_release(systemd, tmp_path):
    command = gapstream("serve", state__path=tmp_path / "state", serve__port=0)
    process = subprocess.Popen(command, env=os.environ | {"NOTIFY_SOCKET": systemd.getsockname()})
    try:
        assert "STATUS=no release answers yet" in until(systemd, "READY=1")
        until(systemd, "WATCHDOG=1")
    finally:
        process.terminate()
        assert process.wait(20) == 0


def test_a_server_whose_event_loop_is_blocked_is_not_alive(tmp_path, monkeypatch):
    class Blocked(Server):
        async def _on_labels(self, request):
            blocked.set()
            time.sleep(3)

    monkeypatch.setattr("exporter.serve.LOOP_SILENT_S", 2)
    blocked = threading.Event()
    server = Blocked(tmp_path / "state")
    assert not server.answering and server.why_not_alive() == []
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.answering)
        assert server.why_not_alive() == []
        asking = threading.Thread(target=get, args=(f"http://127.0.0.1:{server.port}/v1/labels",))
        asking.start()
        assert blocked.wait(10)
        wait_for(lambda: server.why_not_alive() and "event loop was last seen" in server.why_not_alive()[0])
        asking.join()
        wait_for(lambda: server.why_not_alive() == [])
    finally:
        server.stop()
        thread.join(20)
