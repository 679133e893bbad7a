"""The supervisor: workers come back, drain, and never outlive it. Real processes, without Celery but for the last."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import redis
from celery import Celery

from agentmesh.worker import supervisor as supervise
from agentmesh.worker.process import RESTART_S, Command
from agentmesh.worker.supervisor import Supervisor

FRONT = """
import argparse, os, signal, sys, threading, time
from pathlib import Path
from agentmesh.worker.process import announce_ready, exit_with_parent
parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path); parser.add_argument("grace_s", type=float)
parser.add_argument("--worker-name"); parser.add_argument("--ready-fd", type=int)
given = parser.parse_args()
exit_with_parent(given.grace_s)
told = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: told.set())
"""
# Ready at once; leaves a file when it has drained.
GENTLE = FRONT + (
    "announce_ready(given.ready_fd)\ntold.wait()\n"
    "(given.folder / given.worker_name.replace('/', '-')).write_text('drained')"
)
LEAVES = FRONT + (
    "announce_ready(given.ready_fd)\nwhile not told.wait(0.01) and not (given.folder / 'enough').exists(): pass"
)
DEAF = FRONT + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nannounce_ready(given.ready_fd)\ntime.sleep(600)"
WITH_A_CHILD = FRONT + (
    "child = os.fork()\n"
    "if child == 0: time.sleep(600)\n"
    "(given.folder / 'child').write_text(str(child))\nannounce_ready(given.ready_fd)\ntime.sleep(600)"
)
RETURNS = "import sys; sys.exit({})"

OUTER = """
import sys, pathlib
from agentmesh.worker.supervisor import Supervisor
folder, drain_s, count, code = pathlib.Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
s = Supervisor([[sys.executable, "-c", code, str(folder), str(drain_s)]] * count, drain_s=drain_s)
import threading
def tell():
    s.wait_ready(20)
    print(*s.pids.values(), flush=True)
threading.Thread(target=tell, daemon=True).start()
heavy = {"celery", "kombu", "redis", "billiard"} & set(sys.modules)
sys.exit(s.run() if not heavy else f"too heavy: {heavy}")
"""


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))


@pytest.fixture
def supervised():
    """Makes supervisors on threads, and ends them."""
    made = []

    def make(*codes, folder, grace_s=10.0, **options):
        argvs = [[sys.executable, "-c", code, str(folder), str(grace_s)] for code in codes]
        supervisor = Supervisor(argvs, **options)
        made.append(supervisor)
        supervisor.start()
        return supervisor

    yield make
    for supervisor in made:
        supervisor.stop(now=True)
        assert supervisor.join(20)


@pytest.fixture
def outer(tmp_path):
    """Starts a supervisor in a process of its own; answers it and its workers' pids."""
    made = []

    def start(code, *, count=2, drain_s=20.0):
        argv = [sys.executable, "-c", OUTER, str(tmp_path), str(drain_s), str(count), code]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        pids = [int(pid) for pid in process.stdout.readline().split()]
        made.append((process, pids))
        assert len(pids) == count
        return process, pids

    yield start
    for process, pids in made:
        process.kill()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


class Wanted:
    """A spare worker that is wanted when the test says so."""

    def __init__(self, folder):
        self.command = Command((sys.executable, "-c", LEAVES, str(folder), "10"))
        self.now = self.closed = False

    def is_needed(self):
        return self.now

    def close(self):
        self.closed = True


def lives(pid):
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_ready_when_every_worker_says_so_and_drained_by_stop(supervised, tmp_path):
    supervisor = supervised(GENTLE, GENTLE, folder=tmp_path)
    assert supervisor.wait_ready(20)
    names = supervisor.names
    assert len(set(names)) == 2
    supervisor.stop()
    assert supervisor.join(20)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(n.replace("/", "-") for n in names)


def test_a_killed_worker_is_named_and_comes_back_under_another_name(supervised, tmp_path, eventually):
    deaths = []
    supervisor = supervised(GENTLE, folder=tmp_path, on_death=lambda name, code: deaths.append((name, code)))
    assert supervisor.wait_ready(20)
    killed = []
    for _ in range(3):
        ((name, pid),) = supervisor.pids.items()
        killed.append((name, -signal.SIGKILL))
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: supervisor.names and supervisor.names[0] not in {n for n, _ in killed})
    eventually(lambda: deaths == killed)


def test_an_on_death_that_raises_stops_nothing(supervised, tmp_path, eventually):
    asked = threading.Event()

    def on_death(name, code):
        asked.set()
        raise OSError("the store is down")

    supervisor = supervised(GENTLE, folder=tmp_path, on_death=on_death)
    assert supervisor.wait_ready(20)
    (pid,) = supervisor.pids.values()
    os.kill(pid, signal.SIGKILL)
    assert asked.wait(20)
    eventually(lambda: supervisor.pids and pid not in supervisor.pids.values())


def test_what_a_killed_worker_forked_goes_with_it(supervised, tmp_path, eventually):
    supervisor = supervised(WITH_A_CHILD, folder=tmp_path)
    assert supervisor.wait_ready(20)
    child = int((tmp_path / "child").read_text())
    (pid,) = supervisor.pids.values()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not lives(child))


def pauses(caplog):
    return [float(r.getMessage().split()[-2]) for r in caplog.records if "; restarting in" in r.getMessage()]


def test_only_workers_that_die_before_they_are_ready_back_off(supervised, tmp_path, eventually, caplog):
    supervisor = supervised(GENTLE, folder=tmp_path)
    for death in range(4):
        eventually(lambda: supervisor.health == (1, 1))
        (pid,) = supervisor.pids.values()
        os.kill(pid, signal.SIGKILL)
        eventually(lambda seen=death: len(pauses(caplog)) > seen)
    assert pauses(caplog) == [RESTART_S] * 4
    supervisor.stop(now=True)
    assert supervisor.join(20)
    caplog.clear()
    supervised(RETURNS.format(1), folder=tmp_path)
    eventually(lambda: len(pauses(caplog)) >= 4)
    assert pauses(caplog)[:4] == [RESTART_S, 2 * RESTART_S, 4 * RESTART_S, 8 * RESTART_S]


@pytest.mark.parametrize("code", [2, 4])
def test_a_worker_that_cannot_ever_start_ends_the_supervisor_with_its_code(code):
    assert Supervisor([[sys.executable, "-c", RETURNS.format(code)]]).run() == code


def test_a_worker_that_fails_otherwise_is_tried_again(supervised, tmp_path, eventually):
    deaths = []
    supervised(RETURNS.format(1), folder=tmp_path, on_death=lambda name, code: deaths.append(code))
    eventually(lambda: deaths[:3] == [1, 1, 1])


def test_a_worker_that_does_not_drain_is_killed_at_the_end_of_its_time(outer, eventually):
    process, pids = outer(DEAF, drain_s=0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 1
    eventually(lambda: not any(map(lives, pids)))


@pytest.mark.parametrize("quiet", [False, True])
def test_a_quiet_stop_says_nothing_of_who_is_killed_at_its_end(supervised, tmp_path, caplog, quiet):
    supervisor = supervised(DEAF, folder=tmp_path, drain_s=0.05)
    assert supervisor.wait_ready(20)
    supervisor.stop(quiet=quiet)
    assert supervisor.join(20)
    assert ("killed after a drain" in caplog.text) is not quiet


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_signal_kills_at_once(outer, eventually, number, code):
    process, pids = outer(DEAF, drain_s=600.0)
    process.send_signal(number)

    def again():  # two that come before Python looks are one
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(0.05) or True
        if any(map(lives, pids)):  # else it has heard, and leaves: by now a signal would end it as any program
            process.send_signal(number)

    eventually(again)
    assert process.returncode == code
    eventually(lambda: not any(map(lives, pids)))


def test_the_first_signal_drains_and_ends_with_zero(outer, tmp_path):
    process, _ = outer(GENTLE)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("code", "drain_s", "left"), [(GENTLE, 10.0, 2), (DEAF, 0.3, 0), (WITH_A_CHILD, 0.3, 1)])
def test_nobody_outlives_a_killed_supervisor(outer, tmp_path, eventually, code, drain_s, left):
    process, pids = outer(code, count=1 if code is WITH_A_CHILD else 2, drain_s=drain_s)
    process.kill()
    process.wait()
    if code is WITH_A_CHILD:
        pids.append(int((tmp_path / "child").read_text()))
    eventually(lambda: not any(map(lives, pids)))
    assert len(list(tmp_path.iterdir())) == left


def test_real_workers_go_on_after_a_kill_and_drain(valkey, eventually):
    script = Path(__file__).with_name("counting_worker.py")
    argv = [sys.executable, str(script), valkey.broker_url, valkey.url, "50", "20"]
    supervisor = Supervisor([argv, argv])
    supervisor.start()
    try:
        assert supervisor.wait_ready(20)
        dead, pid = next(iter(supervisor.pids.items()))
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: dead not in supervisor.names)  # a plain task that it still takes from the broker is lost
        with (
            Celery("ask", set_as_current=False, broker=valkey.broker_url) as app,
            redis.Redis.from_url(valkey.url, decode_responses=True) as client,
        ):
            eventually(lambda: len(supervisor.names) == 2)
            # both wait at the broker
            eventually(lambda: sum("b" in c["flags"] for c in client.client_list()) == 2)
            for _ in range(80):
                app.send_task("count", (1.0,), queue="q")
            eventually(lambda: client.get("begun") == "80")
            supervisor.stop()
            assert supervisor.join(20)
            assert client.get("ended") == "80"
    finally:
        supervisor.stop(now=True)
        assert supervisor.join(20)


def test_a_spare_worker_is_there_only_while_it_is_wanted(supervised, tmp_path, eventually, monkeypatch):
    monkeypatch.setattr(supervise, "STANDBY_POLL_S", 0.05)
    spare, deaths = Wanted(tmp_path), []
    supervisor = supervised(
        GENTLE, folder=tmp_path, standby=[spare], on_death=lambda name, code: deaths.append((name, code))
    )
    assert supervisor.wait_ready(20)
    (kept,) = supervisor.names
    spare.now = True
    eventually(lambda: len(supervisor.names) == 2)
    (first,) = set(supervisor.names) - {kept}
    assert first.endswith("-standby")
    assert supervisor.health == (1, 1)
    os.kill(supervisor.pids[first], signal.SIGKILL)  # it is still wanted
    eventually(lambda: len(supervisor.names) == 2 and first not in supervisor.names)
    (second,) = set(supervisor.names) - {kept}
    spare.now = False
    (tmp_path / "enough").touch()  # it exits on its own
    eventually(lambda: (second, 0) in deaths)
    eventually(lambda: supervisor.names == [kept])
    (tmp_path / "enough").unlink()
    spare.now = True
    eventually(lambda: len(supervisor.names) == 2)
    supervisor.stop()
    assert supervisor.join(20)
    assert deaths[0] == (first, -signal.SIGKILL)
    assert spare.closed
    assert supervisor.names == []
