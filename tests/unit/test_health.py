"""The body of a health probe: the counts that anybody may see, and the problems."""

import gzip
import json
import socket
from dataclasses import replace
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from agentmesh.errors import ConfigError
from agentmesh.observability.engine_status import EngineStatus, read_statuses
from agentmesh.observability.metrics import metrics_app
from agentmesh.worker.health_server import Health, HealthServer

WELL = EngineStatus("host:1/a", 7, "m", "cuda:0", at_s=100.0, in_flight=3)


def test_all_is_well() -> None:
    now = Health(2, 2, True, [WELL], now_s=109.0)
    assert now.is_healthy
    assert now.counts == {"workers": {"expected": 2, "ready": 2}, "journal": True, "engines": {"all": 1, "healthy": 1}}
    assert "problems" not in now.report
    (engine,) = now.report["engines"]
    assert (engine["in_flight"], engine["age_s"], engine["unhealthy_reason"]) == (3, 9.0, "")


def test_each_reason_is_told() -> None:
    silent, stuck = replace(WELL, at_s=90.0), replace(WELL, device="cuda:1", stuck_s=12.3)
    now = Health(3, 2, False, [silent, stuck, WELL], now_s=101.0)
    assert not now.is_healthy
    assert now.report["problems"] == [
        "the journal's server does not respond",
        "2 of 3 workers consume",
        "the worker of 'm' on cuda:0 has not reported for 11 s",
        "the worker of 'm' on cuda:1 has 3 steps in flight and its engine has made no progress for 12 s",
    ]
    assert now.counts["engines"] == {"all": 3, "healthy": 1}


def test_a_status_file_of_an_older_worker_is_read(tmp_path: Path) -> None:
    report = {"worker": "w", "pid": 7, "model": "m", "device": "cpu", "at_s": 1.0, "in_hand": 3}
    (tmp_path / "engine-7.json").write_text(json.dumps(report))
    assert read_statuses(str(tmp_path), ["w"]) == [EngineStatus("w", 7, "m", "cpu", at_s=1.0, in_flight=3)]


def test_one_reason_is_enough() -> None:
    assert not Health(1, 1, True, [replace(WELL, stuck_s=10.1)], now_s=101.0).is_healthy
    assert Health(1, 1, True, [replace(WELL, stuck_s=9.9)], now_s=101.0).is_healthy
    assert Health(0, 0, True).report == {"ready": True, "workers": {"expected": 0, "ready": 0}, "journal": True}


def ask(url: str, **headers: str) -> tuple[int, str, bytes]:
    try:
        with urlopen(Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read()
    except HTTPError as e:
        return e.code, e.headers["Content-Type"], e.read()


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


V6 = pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback"))


@pytest.mark.parametrize("host", ["127.0.0.1", V6])
def test_probes_and_prometheus_are_answered_at_one_address(host: str, tmp_path: Path) -> None:
    page = metrics_app(str(tmp_path), lambda: None, lambda: (2, 1))
    journal_is_up = True
    server = HealthServer((host, 0), page=page, health=lambda: Health(2, 2, journal_is_up, now_s=0.0))
    at = f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}"
    try:
        assert ask(f"{at}/health/live") == (200, "application/json", b'{"live": true}')
        assert ask(f"{at}/health/ready?verbose=1")[0] == 200
        journal_is_up = False
        status, _, body = ask(f"{at}/health/")
        assert (status, json.loads(body)["problems"]) == (503, ["the journal's server does not respond"])
        assert ask(f"{at}/elsewhere")[0] == 404
        status, kind, plain = ask(f"{at}/metrics")
        assert (status, kind.partition(";")[0]) == (200, "text/plain")
        assert b'agentmesh_workers{state="ready"} 1.0' in plain
        _, kind, body = ask(f"{at}/metrics", Accept="application/openmetrics-text; version=1.0.0")
        assert (kind.partition(";")[0], body[-6:]) == ("application/openmetrics-text", b"# EOF\n")
        assert gzip.decompress(ask(f"{at}/metrics", **{"Accept-Encoding": "gzip"})[2]) == plain
        assert b"agentmesh_workers" not in ask(f"{at}/metrics?name[]=agentmesh_journal_up")[2]
        with pytest.raises(ConfigError, match=f"--metrics cannot listen at {host}:{server.port} .*choose another port"):
            HealthServer((host, server.port), page=page, health=lambda: Health(0, 0, True))
    finally:
        server.close()
