import json
import socket
import threading
import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry

from exporter import http
from exporter.http import StatusServer
from exporter.metrics import Metrics


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def metrics(registry):
    return Metrics(registry)


@pytest.fixture
def reasons():
    return {"live": [], "ready": ["no commit yet"]}


@pytest.fixture
def server(registry, metrics, reasons):
    server = StatusServer(
        "127.0.0.1", 0, registry, lambda: reasons["live"], lambda: reasons["ready"], lambda: metrics.status()
    )
    server.start()
    yield server
    server.stop()


def get(server, path, **headers):
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def test_metrics_are_those_of_the_registry(server, metrics):
    metrics.cut("samples", samples=5, classes=1)
    code, headers, body = get(server, "/metrics")
    assert code == 200
    assert headers["Content-Type"].startswith("text/plain")
    assert 'gapstream_task_cuts_total{reason="samples"} 1.0' in body


def test_many_scrapes_at_once_are_made_once_and_soon_anew(server, metrics, monkeypatch):
    before = get(server, "/metrics")[2]
    metrics.cut("samples", samples=5, classes=1)
    assert get(server, "/metrics")[2] == before

    monkeypatch.setattr(http, "FRESH_S", 0)
    assert 'gapstream_task_cuts_total{reason="samples"} 1.0' in get(server, "/metrics")[2]


def test_openmetrics_is_given_to_who_asks_for_it(server):
    _, headers, body = get(server, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert body.endswith("# EOF\n")


def test_health_is_200_or_503_with_the_reasons(server, reasons):
    assert get(server, "/livez")[0] == get(server, "/healthz")[0] == 200
    code, _, body = get(server, "/readyz")
    assert code == 503
    assert json.loads(body) == {"status": "failing", "reasons": ["no commit yet"]}

    reasons["live"].append("the stream loop was last seen 40 s ago")
    reasons["ready"].clear()
    assert get(server, "/livez")[0] == get(server, "/healthz")[0] == 503
    assert get(server, "/readyz")[0] == 200


def test_status_is_json_and_leaves_the_report_to_its_own_path(server, metrics):
    status = json.loads(get(server, "/status.json")[2])
    assert status["state"] == "starting"
    assert "report" not in status
    assert json.loads(get(server, "/report.json")[2]) is None


def test_pictures_are_asked_for_only_on_their_own_path(registry):
    server = StatusServer("127.0.0.1", 0, registry, list, list, dict, pictures=lambda: {7: "data:image/jpeg;base64,AA"})
    server.start()
    try:
        assert json.loads(get(server, "/pictures.json")[2]) == {"7": "data:image/jpeg;base64,AA"}
    finally:
        server.stop()


def test_the_page_needs_nothing_from_elsewhere(server):
    code, headers, body = get(server, "/")
    assert code == 200
    assert headers["Content-Type"].startswith("text/html")
    assert "http://" not in body.replace("http://www.w3.org/", "")
    assert "https://" not in body


def test_an_unknown_path_is_404_and_names_the_known_ones(server):
    code, _, body = get(server, "/nothing")
    assert code == 404
    assert "/metrics" in json.loads(body)["paths"]


def test_other_verbs_are_refused(server):
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/metrics", data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=5)
    assert error.value.code == 405


def test_a_failing_status_is_a_500_and_the_server_goes_on(registry):
    def broken():
        raise RuntimeError("no")

    server = StatusServer("127.0.0.1", 0, registry, list, list, broken)
    server.start()
    try:
        assert get(server, "/status.json")[0] == 500
        assert get(server, "/livez")[0] == 200
    finally:
        server.stop()


def test_a_client_that_says_nothing_does_not_keep_others_waiting(server):
    with socket.create_connection(("127.0.0.1", server.port)):
        assert get(server, "/livez")[0] == 200


def test_many_who_never_end_their_request_stop_no_probe_and_take_no_thread(server):
    before = threading.active_count()
    clients = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(http.MAX_CONNECTIONS)]
    for client in clients:
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")

    assert get(server, "/livez")[0] == 200
    assert get(server, "/readyz")[0] == 503
    assert get(server, "/metrics")[0] == 200

    assert threading.active_count() < before + 10
    for client in clients:
        client.close()


def test_pages_that_take_long_keep_neither_probes_nor_metrics_waiting(registry):
    go = threading.Event()
    server = StatusServer("127.0.0.1", 0, registry, list, list, dict, pictures=lambda: dict(wait=go.wait(20)))
    server.start()
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
    try:
        for client in slow:
            client.sendall(b"GET /pictures.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert get(server, "/livez")[0] == get(server, "/metrics")[0] == get(server, "/status.json")[0] == 200
    finally:
        go.set()
        server.stop()
        for client in slow:
            client.close()


def test_a_page_whose_name_was_made_to_point_here_reads_nothing(server, registry):
    assert get(server, "/status.json", Host="rebound.example:9187")[0] == 403
    assert get(server, "/livez", Host=f"localhost:{server.port}")[0] == 200
    named = StatusServer("127.0.0.1", 0, registry, list, list, dict, allowed_hosts=["agent"])
    named.start()
    assert get(named, "/livez", Host="agent:9187")[0] == 200
    named.stop()


def test_a_taken_port_is_a_clear_error(server, registry):
    with pytest.raises(OSError, match=rf"cannot serve on 127.0.0.1:{server.port} .*http.port to 0"):
        StatusServer("127.0.0.1", server.port, registry, list, list, dict)


def test_the_serving_loop_says_that_it_lives(registry, metrics):
    seen = threading.Event()
    server = StatusServer("127.0.0.1", 0, registry, list, list, dict, lambda loop, now: seen.set())
    server.start()
    assert seen.wait(10)
    server.stop()


def test_stop_frees_the_port_and_ends_the_thread(registry):
    server = StatusServer("127.0.0.1", 0, registry, list, list, dict)
    server.start()
    port = server.port
    server.stop()
    again = StatusServer("127.0.0.1", port, registry, list, list, dict)
    again.stop()
    assert "http" not in [thread.name for thread in threading.enumerate()]
