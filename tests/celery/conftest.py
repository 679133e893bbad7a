"""A real Valkey and a real RabbitMQ for the tests of this folder."""

import contextlib
import os
import time
from collections.abc import Iterator

import pytest
import redis

from agentmesh.testing.servers import RabbitServer, ValkeyServer, a_server


@pytest.fixture(scope="session")
def _valkey_server() -> Iterator[ValkeyServer]:
    with a_server(ValkeyServer) as server:
        yield server


@pytest.fixture(scope="session")
def _rabbit_server() -> Iterator[RabbitServer]:
    if missing := RabbitServer.missing():
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    with a_server(RabbitServer) as server:
        yield server


@pytest.fixture
def valkey(_valkey_server: ValkeyServer) -> ValkeyServer:
    """An empty Valkey: `.url` for redis-py, `.broker_url` for Celery, `.kill()` and `.restart()` for chaos."""
    _valkey_server.flush()
    return _valkey_server


@pytest.fixture
def rabbitmq(_rabbit_server: RabbitServer) -> RabbitServer:
    """A RabbitMQ without queues: `.url` for Celery, `.kill()` and `.restart()` for chaos, `.evaluate()` for its limits."""
    _rabbit_server.flush()
    return _rabbit_server


@pytest.fixture
def eventually():
    """`eventually(condition)` waits until it is true, and fails after 15 s."""

    def wait(condition, timeout_s=15.0):
        until = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(redis.RedisError):
                if condition():
                    return
            assert time.monotonic() < until, f"not within {timeout_s} s"
            time.sleep(0.005)

    return wait
