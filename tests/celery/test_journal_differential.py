"""The Lua scripts and the Python protocol, verb by verb on the same worlds: equal answers, messages and journals."""

import json
from typing import Any

import pytest
import redis

from agentmesh.journals import tend
from agentmesh.journals.entries import Store
from agentmesh.journals.redis import script
from agentmesh.testing.simulation import Faults, World

PREFIX = "diff:"


class Twin(World):
    """A world whose every verb is done twice: by the pure functions, and by the scripts on a real server."""

    client: Any

    def verb(self, name: str, **args: Any) -> tuple[dict[str, Any], list[str]]:
        store = Store(self.tables, self.now)
        head, lines = tend.ALL[name](store, args)
        reply = self.client.eval(script(name)[0], 1, PREFIX, json.dumps(args), str(self.now), "0")
        told, count = json.loads(reply[0]), reply[1]
        assert (told, reply[2 : 2 + count]) == (head, lines), f"seed {self.seed}, {self.now} ms: {name}({args})"
        sent = list(zip(reply[2 + count :: 2], reply[3 + count :: 2], strict=True))
        assert sent == [(queue, f"{h}{seq}{t}") for queue, h, seq, t in store.sent], f"seed {self.seed}: {name}({args})"
        for _, text, _, _ in store.sent:
            self._send(text.rstrip("#"))
        return head, lines

    def compare(self) -> None:
        """Everything that is kept."""
        for key, events in self.tables.lists.items():
            assert self.client.lrange(PREFIX + key, 0, -1) == events, key
        for key, members in self.tables.zsets.items():
            found = {m: int(s) for m, s in self.client.zrange(PREFIX + key, 0, -1, withscores=True)}
            assert found == members, key
        for key, names in self.tables.sets.items():
            assert self.client.smembers(PREFIX + key) == names, key
        for key, fields in self.tables.hashes.items():
            found = {name: _plain(value) for name, value in self.client.hgetall(PREFIX + key).items()}
            assert found == {name: _plain(value) for name, value in fields.items()}, key


def _plain(value: Any) -> Any:
    """A field as a value: the scripts keep records as JSON and numbers as text."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, str) and value.startswith("{"):
        return _plain(json.loads(value))
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


@pytest.mark.parametrize("weather", [Faults(), Faults(loss=0.2, repeat=0.2, crash=0.12, zombie=0.1)], ids=["bad", "worse"])
def test_the_scripts_do_what_the_protocol_says(valkey: Any, weather: Faults) -> None:
    client = redis.Redis.from_url(valkey.url, decode_responses=True)
    for seed in range(5000, 5060):
        client.flushdb()
        world = Twin(seed, weather)
        world.client = client
        world.run()
        world.compare()
    client.close()
