"""The shared Valkey: there while anyone uses it, restarted when it dies, gone with the last, however that one went."""

import fcntl
import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import redis
from celery import Celery

from agentmesh.celery.app import celery_settings
from agentmesh.errors import ConfigError
from agentmesh.runtime import valkey as room
from agentmesh.runtime.valkey import EmbeddedValkey

USER = "import sys; from pathlib import Path; from agentmesh.runtime.valkey import EmbeddedValkey as V\n"
USER += "v = V.join(Path(sys.argv[1])); print(v.url, flush=True); sys.stdin.read()"


@pytest.fixture
def folder():
    folder = Path(tempfile.mkdtemp(prefix="mesh-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def user(folder):
    """Starts processes that use the folder's Valkey until their stdin ends."""
    processes = []

    def start():
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        argv = [sys.executable, "-c", USER, str(folder)]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def pid_of(client):
    return client.info("server")["process_id"]


def gone(url):
    with redis.Redis.from_url(url) as client:
        try:
            client.ping()
        except redis.ConnectionError:
            return True
    return False


def test_two_share_one_server_and_the_last_ends_it(folder, eventually):
    one, other = EmbeddedValkey.join(folder), EmbeddedValkey.join(folder)
    assert one.url == other.url
    assert one.url.startswith("unix://")
    assert stat.S_IMODE((folder / "valkey").stat().st_mode) == 0o700
    with redis.Redis.from_url(one.url, decode_responses=True) as client:
        assert client.config_get("appendonly", "appendfsync", "maxmemory-policy") == {
            "appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction",
        }  # fmt: skip
        one.leave()
        one.leave()
        client.set("k", "kept")
    other.leave()
    eventually(lambda: gone(one.url))
    again = EmbeddedValkey.join(folder)
    with redis.Redis.from_url(again.url, decode_responses=True) as client:
        assert client.get("k") == "kept"
    again.leave()


def test_who_joins_while_the_last_one_leaves_gets_a_server(folder):
    for _ in range(20):
        share = EmbeddedValkey.join(folder)
        with redis.Redis.from_url(share.url) as client:
            assert client.ping()
        share.leave()


def test_who_joins_while_the_last_keeper_is_ending_starts_the_next(folder, eventually):
    last = EmbeddedValkey.join(folder)
    place = folder.resolve() / "valkey"
    last.leave()
    eventually(lambda: not room._has_watchdog(place))
    ending = os.open(place / "keeper.lock", os.O_RDWR)  # the lock that a keeper has for a moment longer than its users'
    fcntl.flock(ending, fcntl.LOCK_EX)
    timer = threading.Timer(0.3, os.close, [ending])
    timer.start()
    share = EmbeddedValkey.join(folder)
    timer.join()
    with redis.Redis.from_url(share.url) as client:
        assert client.ping()
    share.leave()


def test_celery_speaks_to_it(folder):
    share = EmbeddedValkey.join(folder)
    with Celery("c", set_as_current=False) as app:
        app.conf.update(celery_settings(share.broker_url))
        app.send_task("t", queue="q")
    with redis.Redis.from_url(share.url) as client:
        assert client.llen("q") == 1
    share.leave()


def test_users_that_are_killed_count_no_more(user, eventually):
    users = [user() for _ in range(3)]  # at once: they meet at the gate
    url, *others = [process.stdout.readline().strip() for process in users]
    assert others == [url, url]
    for process in users[:2]:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with redis.Redis.from_url(url) as client:
        assert client.ping()
    users[2].send_signal(signal.SIGKILL)
    users[2].wait()
    eventually(lambda: gone(url))


def test_a_server_that_dies_is_started_again_with_its_data(folder, eventually):
    share = EmbeddedValkey.join(folder)
    with redis.Redis.from_url(share.url, decode_responses=True) as client:
        for round_ in range(3):
            client.rpush("list", round_)
            pid = pid_of(client)
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: pid_of(client) != pid)  # noqa: B023
            eventually(client.ping)  # it answers for itself before it has read its data
        assert client.lrange("list", 0, -1) == ["0", "1", "2"]
    share.leave()
    eventually(lambda: gone(share.url))


def test_hand_over_from_a_killed_user_to_the_next(user, eventually):
    process = user()
    url = process.stdout.readline().strip()
    with redis.Redis.from_url(url, decode_responses=True) as client:
        client.set("k", "kept")
        for _ in range(5):
            following = user()
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert following.stdout.readline().strip() == url
            assert client.get("k") == "kept"
            process = following


def test_a_killed_keeper_is_replaced_by_the_next_to_join(folder, eventually):
    share = EmbeddedValkey.join(folder)
    with redis.Redis.from_url(share.url, decode_responses=True) as client:
        client.set("k", "kept")
        server = pid_of(client)
        keeper = int(Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(keeper, signal.SIGKILL)
        eventually(lambda: not room._has_watchdog(folder.resolve() / "valkey"))
        following = EmbeddedValkey.join(folder)
        assert following.url == share.url
        assert client.get("k") == "kept"
        pid = pid_of(client)
        assert pid != server
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: pid_of(client) != pid)
    share.leave()
    following.leave()
    eventually(lambda: gone(share.url))


def test_a_path_too_long_for_a_socket_gets_a_port_with_a_password(folder, eventually):
    deep = folder / ("long" * 30)
    share, other = EmbeddedValkey.join(deep), EmbeddedValkey.join(deep)
    assert share.url == other.url
    assert share.url.startswith("redis://:")
    with redis.Redis.from_url(share.url, decode_responses=True) as client:
        client.set("k", "v")
        pid = pid_of(client)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: pid_of(client) != pid)
        assert client.get("k") == "v"
    with redis.Redis.from_url("redis://" + share.url.partition("@")[2]) as stranger, pytest.raises(redis.RedisError):
        stranger.get("k")
    assert stat.S_IMODE((deep / "valkey" / "secret.conf").stat().st_mode) == 0o600
    share.leave()
    other.leave()
    eventually(lambda: gone(share.url))


def test_without_the_wheel_the_error_says_to_pass_a_broker(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"no embedded Valkey is installed .*--broker redis://"):
        EmbeddedValkey.join(folder)


def test_a_folder_that_cannot_be_made_is_named(folder):
    (folder / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot hold the embedded Valkey"):
        EmbeddedValkey.join(folder / "file")


def test_a_folder_that_cannot_be_written_in_is_named_too(folder):
    """As on a full disk, where empty files can still be made."""
    (folder / "valkey" / "address.new").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"cannot hold the embedded Valkey \(Is a directory\)"):
        EmbeddedValkey.join(folder)
    (folder / "valkey" / "address.new").rmdir()
    EmbeddedValkey.join(folder).leave()  # nobody holds the gate
