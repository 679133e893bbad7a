"""What a failover to a replica loses: acknowledged writes that the replica had not yet, when the primary is killed.

    python bench/failover.py [--kills 20] [--writers 8]

A primary and its replica on this machine; writers write as fast as they are answered; the primary is SIGKILLed and the
replica promoted, as Sentinel would. Once as it comes, and once with every write followed by `WAIT 1`, which answers when
the replica has it. Over a network the lag, and with it the loss, grows by the way between the two.
"""

import argparse
import contextlib
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator

import redis
from common import machine, median

from agentmesh.runtime.valkey import server_binary

LOAD_S = 0.5


@contextlib.contextmanager
def server(*options: str) -> Iterator[tuple[int, "subprocess.Popen[bytes]"]]:
    """A Valkey on a free port, without a disk."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        argv = [str(server_binary()), "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", ""]
        process = subprocess.Popen([*argv, "--repl-diskless-sync-delay", "0", *options], stdout=subprocess.DEVNULL)
        try:
            with redis.Redis(port=port) as client:
                while True:
                    with contextlib.suppress(redis.ConnectionError):
                        client.ping()
                        break
                    time.sleep(0.01)
            yield port, process
        finally:
            process.kill()
            process.wait()


def one_kill(writers: int, *, wait: bool) -> tuple[int, int]:
    """How many writes were acknowledged, and how many of them the promoted replica lacks."""
    with server() as (port, primary), server("--replicaof", "127.0.0.1", str(port)) as (replica_port, _):
        with redis.Redis(port=replica_port, decode_responses=True) as replica:
            while replica.info("replication")["master_link_status"] != "up":  # type: ignore[index]
                time.sleep(0.01)
            acknowledged = [0] * writers

            def write(i: int) -> None:
                with redis.Redis(port=port) as client, contextlib.suppress(redis.RedisError):
                    while True:
                        pipe = client.pipeline(transaction=False)
                        pipe.rpush(f"w{i}", acknowledged[i])
                        if wait:
                            pipe.execute_command("WAIT", 1, 1000)
                        answers = pipe.execute()
                        if not wait or answers[1] >= 1:
                            acknowledged[i] += 1

            threads = [threading.Thread(target=write, args=(i,)) for i in range(writers)]
            for thread in threads:
                thread.start()
            time.sleep(LOAD_S)
            primary.kill()
            for thread in threads:
                thread.join()
            replica.replicaof("NO", "ONE")  # type: ignore[no-untyped-call]
            there = [int(replica.llen(f"w{i}")) for i in range(writers)]  # type: ignore[arg-type]
        return sum(acknowledged), sum(max(0, a - t) for a, t in zip(acknowledged, there, strict=True))


def main() -> None:
    """Print both rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--writers", type=int, default=8)
    given = parser.parse_args()
    print(f"{given.kills} primaries killed under {given.writers} writers; {machine()}")
    for wait in (False, True):
        found = [one_kill(given.writers, wait=wait) for _ in range(given.kills)]
        lost = [n for _, n in found]
        rate = median([n for n, _ in found]) / LOAD_S
        print(
            f"{'WAIT 1' if wait else 'as it comes':12} {rate:7.0f} writes/s   lost per failover: "
            f"median {median([float(n) for n in lost]):.0f}, most {max(lost)} ({max(lost) / rate * 1e3:.1f} ms of writes), "
            f"nothing in {lost.count(0)} of {given.kills}"
        )


if __name__ == "__main__":
    main()
