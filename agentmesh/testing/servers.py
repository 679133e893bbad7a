"""Real servers for tests and benchmarks, on loopback: a Valkey and a RabbitMQ that can be killed and restarted."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from celery import Celery

from agentmesh.celery.consumer import broker_error
from agentmesh.runtime.valkey import server_binary

READY_S = 10.0
RABBIT_READY_S = 60.0  # it takes 4 s on an idle machine, and many times that on a busy one
RABBIT = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # the one in PATH changes the user
ERL_CALL = Path("/usr/lib/erlang/bin/erl_call")


class _ServerProcess:
    """A server's process."""

    process: "subprocess.Popen[bytes] | None" = None

    @property
    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        """Of the server's process (RabbitMQ's is Erlang's); 0 when it never ran."""
        return self.process.pid if self.process else 0


class ValkeyServer(_ServerProcess):
    """A Valkey on a Unix socket, with an append-only file that outlives `kill`.

    Attributes:
        url: for redis-py and the journal.
        broker_url: for Celery.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "v.sock"
        self.url = f"unix://{self.socket}?db=0"
        self.broker_url = f"redis+socket://{self.socket}?virtual_host=0"

    def restart(self) -> None:
        """Start it over the data it had; come back when it answers."""
        argv = [str(server_binary()), "--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.folder)]
        # `no`: every write is in the file before its answer, and a SIGKILL loses none. Under `everysec` a slow fsync holds
        # writes back in the server's memory for up to 2 s, and what a kill then loses depends on the disk.
        argv += [
            "--save",
            "",
            "--appendonly",
            "yes",
            "--appendfsync",
            "no",
            "--loglevel",
            "warning",
            "--logfile",
            "valkey.log",
        ]
        self.process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        until = time.monotonic() + READY_S
        with redis.Redis.from_url(self.url) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.RedisError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL; the data stays."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def flush(self) -> None:
        """Empty the server; start it if it does not run."""
        if not self.alive:
            self.restart()
        with redis.Redis.from_url(self.url) as client:
            client.flushall()


class RabbitServer(_ServerProcess):
    """A private RabbitMQ node on free loopback ports; its data outlives `kill`.

    Attributes:
        url: for Celery; `broker_url` is the same.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self._dist_port, self._epmd_port = _free_ports(3)
        self.node = f"mesh{self.port}@localhost"
        self.url = self.broker_url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        self._epmd: subprocess.Popen[bytes] | None = None
        (folder / ".erlang.cookie").write_text(secrets.token_hex(16))
        (folder / ".erlang.cookie").chmod(0o400)
        (folder / "rabbitmq.conf").write_text("log.file.level = warning\n")
        (folder / "plugins").write_text("[].")

    @staticmethod
    def missing() -> str:
        """What is not installed; "" when all is."""
        lacking = [str(p) for p in (RABBIT, ERL_CALL) if not p.exists()] + ([] if shutil.which("epmd") else ["epmd"])
        return f"{', '.join(lacking)} is not installed: apt-get install rabbitmq-server" if lacking else ""

    def restart(self) -> None:
        """Start it over the data it had; come back when it speaks AMQP."""
        if self._epmd is None:  # a private one, or Erlang starts one that never ends
            argv = ["epmd", "-port", str(self._epmd_port), "-address", "127.0.0.1"]
            self._epmd = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)
        with (self.folder / "out.log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(RABBIT)], env=self._env(), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        app = Celery("ask", set_as_current=False, broker=self.url)
        until = time.monotonic() + RABBIT_READY_S
        while (error := broker_error(app, 2.0)) is not None:
            if not self.alive or time.monotonic() > until:
                raise RuntimeError(f"RabbitMQ does not start ({error}); see {self.folder / 'out.log'}")
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL; the data stays."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def sync_queues(self) -> None:
        """Write the names of its queues to disk now, not after 3 s: a younger quorum queue does not survive `kill`."""
        self.evaluate("[dets:sync(T) || T <- dets:all()], ok.")

    def close(self) -> None:
        """Kill it, and its port mapper."""
        self.kill()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()
            self._epmd = None

    def flush(self) -> None:
        """Delete all queues; start the server if it does not run."""
        if not self.alive:
            self.restart()
        self.evaluate(
            '[catch rabbit_amqqueue:delete(Q, false, false, <<"flush">>) || Q <- rabbit_amqqueue:list()], ok.'
        )

    def queues(self) -> list[str]:
        """The names of its queues, sorted."""
        names = "[binary_to_list(element(4, element(2, Q))) || Q <- rabbit_amqqueue:list()]"
        return sorted(json.loads(self.evaluate(f"{names}.").replace("\n", "")))

    def set_env(self, **values: int) -> None:
        """Set limits of the server as rabbitmq.conf would, for connections and channels to come."""
        for name, value in values.items():
            self.evaluate(f"application:set_env(rabbit, {name}, {value}).")

    def evaluate(self, erlang: str) -> str:
        """The value of an Erlang expression in the server, without the second that its own tools take."""
        cookie = (self.folder / ".erlang.cookie").read_text()
        argv = [str(ERL_CALL), "-c", cookie, "-name", self.node, "-h", f"ask{os.getpid()}", "-e"]
        env = {**os.environ, "ERL_EPMD_PORT": str(self._epmd_port), "HOME": str(self.folder)}
        done = subprocess.run(
            argv, check=False, env=env, input=f"{erlang}\n", capture_output=True, text=True, timeout=30
        )
        if not done.stdout.startswith("{ok, "):
            raise RuntimeError(f"RabbitMQ does not evaluate {erlang!r}: {done.stdout}{done.stderr}")
        return done.stdout[len("{ok, ") : -1]

    def _env(self) -> dict[str, str]:
        folder = str(self.folder)
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RABBITMQ_", "ERL_"))},
            "HOME": folder,
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_MNESIA_BASE": folder,
            "RABBITMQ_LOG_BASE": folder,
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1 +sbwt none",
            "RUNNING_UNDER_SYSTEMD": "1",  # then the script becomes the Erlang process, and its pid is the server's
        }


@contextlib.contextmanager
def running_server(kind: Any) -> Iterator[Any]:
    """A running ValkeyServer or RabbitServer, in a folder that is deleted with it."""
    folder = Path(tempfile.mkdtemp(prefix="mesh-"))  # short: a socket's path may have about 100 bytes
    server = kind(folder)
    try:
        server.restart()
        yield server
    finally:
        getattr(server, "close", server.kill)()
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
