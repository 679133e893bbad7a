"""The Lua scripts and the Python protocol, verb by verb on the same worlds: equal answers, messages and journals."""

import json
import random
from typing import Any

import pytest
import redis
from redis.exceptions import NoScriptError

from agentmesh.journals import tend
from agentmesh.journals.entries import Store
from agentmesh.journals.redis import script
from agentmesh.journals.tables import Tables
from agentmesh.testing.simulation import Faults, World

PREFIX = "diff:"
BROKER = ("p", "q", "p.suspects", "q.suspects")  # lists of messages, in the same store
VERBS = ("begin", "claim", "renew", "release", "commit", "plan", "hold", "tell", "sweep", "told")
OFTEN = ("claim", "claim", "commit", "commit", "plan", "tell")


class Twin(World):
    """A world whose every verb is done twice: by the pure functions, and by the scripts on a real server."""

    client: Any

    def verb(self, name: str, **args: Any) -> tuple[dict[str, Any], list[str]]:
        reply, sent = both(self.client, self.tables, self.now, name, args, seed=self.seed)
        for unit in sent:
            self._send(unit)
        return reply


def both(
    client: Any, tables: Tables, now: int, name: str, args: dict[str, Any], *, seed: int
) -> tuple[tuple[dict[str, Any], list[str]], list[str]]:
    """The reply of both, and the units for which both sent messages."""
    store = Store(tables, now)
    head, lines = tend.ALL[name](store, args)
    text, sha = script(name)
    given = (1, PREFIX, json.dumps(args), str(now), "0")
    try:
        reply = client.evalsha(sha, *given)
    except NoScriptError:
        reply = client.eval(text, *given)
    told, count = json.loads(reply[0]), reply[1]
    assert (told, reply[2 : 2 + count]) == (head, lines), f"seed {seed}, {now} ms: {name}({args})"
    sent = list(zip(reply[2 + count :: 2], reply[3 + count :: 2], strict=True))
    assert sent == [(queue, f"{h}{seq}{t}") for queue, h, seq, t in store.sent], (
        f"seed {seed}, {now} ms: {name}({args})"
    )
    return (head, lines), [text.rstrip("#") for _, text, _, _ in store.sent]


def compare(client: Any, tables: Tables) -> None:
    """Everything that is kept."""
    for key, events in tables.lists.items():
        if key in BROKER:
            continue
        assert client.lrange(PREFIX + key, 0, -1) == events, key
    for key, members in tables.zsets.items():
        found = {m: int(s) for m, s in client.zrange(PREFIX + key, 0, -1, withscores=True)}
        assert found == members, key
    for key, names in tables.sets.items():
        assert client.smembers(PREFIX + key) == names, key
    for key, fields in tables.hashes.items():
        kept = {name: _plain(value) for name, value in client.hgetall(PREFIX + key).items()}
        assert kept == {name: _plain(value) for name, value in fields.items()}, key


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


@pytest.mark.parametrize(
    "weather", [Faults(), Faults(loss=0.2, repeat=0.2, crash=0.12, zombie=0.1)], ids=["bad", "worse"]
)
def test_the_scripts_do_what_the_protocol_says(valkey: Any, weather: Faults) -> None:
    client = redis.Redis.from_url(valkey.url, decode_responses=True)
    for seed in range(5000, 5060):
        client.flushdb()
        world = Twin(seed, weather)
        world.client = client
        world.run()
        compare(client, world.tables)
    client.close()


class Scramble:
    """Verbs in any order with any arguments that the codec may make, also such as no sane worker would send."""

    def __init__(self, client: Any, seed: int) -> None:
        self.client, self.seed, self.now = client, seed, 1_700_000_000_000
        self.rng, self.tables = random.Random(seed), Tables()
        self.leases: list[tuple[str, int, int]] = [("s|r0|1", 1, 1)]
        self.last: tuple[str, dict[str, Any]] = ("sweep", self.sweep())
        self.runs = ["r0", "r1"]

    def step(self) -> None:
        """One verb; now and then the last one once more."""
        self.now += self.rng.choice([0, 1, 40, 700, 2_500, 4_100, -300])
        queue = self.rng.choice(BROKER)
        if self.tables.lists[queue]:
            self.tables.lists[queue].clear()
            self.client.delete(queue)
        elif self.rng.random() < 0.3:
            self.tables.lists[queue].append("m")
            self.client.lpush(queue, "m")
        if self.rng.random() > 0.1:
            name = self.rng.choice([*VERBS, *OFTEN])
            self.last = name, getattr(self, name)()
        (head, _), _ = both(self.client, self.tables, self.now, *self.last, seed=self.seed)
        if self.last[0] == "claim" and "ok" in head:
            self.leases.append((self.last[1]["unit"], head["fence"], head["version"]))
        self.runs = sorted(k[4:] for k in self.tables.hashes if k.startswith("run:")) or ["r0"]

    def claim(self) -> dict[str, Any]:
        z = self.tables.zsets
        queued = sorted(unit for key in list(z) if key.startswith("q:") for unit in z[key])
        units = [*queued * 4, *z["leased"], *[u for u in z["due"] if u[0] != "g"], *z["held"]] or ["s|r0|9"]
        rng = self.rng
        args: dict[str, Any] = {
            "unit": rng.choice(units),
            "worker": rng.choice(["v", "w", "v/1", "w/2"]),
            "token": rng.choice("tu"),
            "ttl": 3_000,
        }
        args |= {"version": rng.choice([0, 0, 2]), "crew": "c", "crew_version": rng.choice(["", "", "", "2"])}
        if rng.random() < 0.3:
            args["apart"] = 1
        if args["unit"][0] == "s" and rng.random() < 0.4:
            args["ask"] = 1
        if rng.random() < 0.3:
            args |= {"rate_ms": 500, "burst": 2}
        return args

    def commit(self) -> dict[str, Any]:
        unit, fence, version = self.lease("s")
        run, n = unit.split("|")[1], int(unit.split("|")[2])
        how = self.rng.choice(["done", "done", "done", "done", "failed", "retried", "doubt"])
        args: dict[str, Any] = {
            "unit": unit,
            "fence": fence,
            "how": how,
            "event": f'{{"e":"x","n":{n},"é":"\\u0000 €"}}',
        }
        args["version"] = self.rng.choice([version, len(self.tables.lists[f"ev:{run}"])])
        if self.rng.random() < 0.7:
            args["usage"] = {"turns": 1, "tokens": self.rng.randint(1, 500), "usd": self.rng.choice([0.5, 0.25])}
        if how == "retried":
            args["delay"] = self.rng.choice([0, 900])
        elif self.rng.random() < 0.8:
            args["next"] = self.next(run)
        return args

    def plan(self) -> dict[str, Any]:
        unit, fence, version = self.lease("a")
        run = unit.split("|")[1]
        version = self.rng.choice([version, len(self.tables.lists[f"ev:{run}"])])
        return {"run": run, "fence": fence, "version": version, "next": self.next(run)}

    def lease(self, letter: str) -> tuple[str, int, int]:
        """One that stands, mostly; else an old or a made up one."""
        kept = [lease for lease in self.leases[-9:] if lease[0][0] == letter]
        good = [lease for lease in kept if lease[0] in self.tables.zsets["leased"]]
        made_up = (f"{letter}|r0" + "|1" * (letter == "s"), self.rng.randint(1, 5), 1)
        return self.rng.choice((good if self.rng.random() < 0.9 else kept) or kept or [made_up])

    def next(self, run: str) -> dict[str, Any]:
        """Nothing, an end, a lone step or a gather."""
        rng, kind = self.rng, self.rng.choice(["", "lone", "lone", "gather", "gather", "gather"])
        kind = "end" if rng.random() < 0.04 else kind
        marks = self.tables.hashes[f"st:{run}"].items()
        carried = [int(k) for k, mark in marks if k.isdigit() and (mark == "E0" or str(mark)[:2] == "D:")]
        if carried and "~" in run and rng.random() < 0.7:  # a retry opens a gather again, around what it was given
            return self.wide(run, max(1, min(carried) - rng.randint(0, 1)), rng.randint(1, 12))
        first = 1 + max((int(k) for k in self.tables.hashes[f"st:{run}"] if k.isdigit()), default=0)
        if kind == "end":
            n = int(run.rpartition("/")[2]) if "/" in run else 0
            end = {"status": rng.choice(["done", "failed"]), "event": '{"e":"RunDone"}'}
            return {"end": end | ({"up": f'{{"e":"StepDone","n":{n}}}', "up_ok": rng.randint(0, 1)} if n else {})}
        if kind == "lone":
            return {"plans": [self.planned(run, first, ended=False)]}
        if not kind:
            return {}
        return self.wide(run, first, rng.randint(1, 12))

    def wide(self, run: str, first: int, k: int) -> dict[str, Any]:
        """A gather of k; of what the journal has already, a replay would plan nothing."""
        rng, known = self.rng, self.tables.hashes[f"st:{run}"]
        gather = {"first": first, "last": first + k - 1, "need": rng.randint(1, k), "everyone": rng.randint(0, 1)}
        gather |= {"deadline": rng.choice([0, 0, 1_500]), "window": rng.choice([0, 0, 1, 3])}
        new = [n for n in range(first, first + k) if str(known.get(str(n)))[:1] != "E" or rng.random() < 0.2]
        return {"plans": [self.planned(run, n) for n in new], "gather": gather}

    def planned(self, run: str, n: int, *, ended: bool = True) -> dict[str, Any]:
        rng = self.rng
        state = rng.choice(
            ["queued", "queued", "queued", "held", "due", "child" if run.count("/") < 2 else "queued", "ended"]
        )
        state = "queued" if state == "ended" and not ended else state
        cut = str(self.tables.hashes[f"st:{run}"].get(str(n))).startswith("D:")
        state = rng.choice(["queued", "held"]) if cut else state
        kind = {"child": "Delegate", "held": rng.choice(["Approve", "Call"]), "due": rng.choice(["Sleep", "Call"])}.get(
            state, "Call"
        )
        out: dict[str, Any] = {"n": n, "kind": kind, "state": state, "event": f'{{"e":"StepPlanned","n":{n}}}'}
        if state == "child":
            out["child"] = {"spec": self.spec(f"{run}/{n}") | {"parent": run, "n": n}, "started": '{"e":"RunStarted"}'}
        else:
            out["wire"] = wire(f"s|{run}|{n}", rng.choice("pq"))
        if state == "queued" and rng.random() < 0.4:
            out |= rng.choice([{"once": 1}, {"once": 1, "rec": 1}, {"once": 1, "digest": "d"}])
        if cut or (state == "held" and rng.random() < 0.4):
            out |= {"once": 1, "digest": "d"}
        return out | {
            "held": {"held": "approve"},
            "due": {"due": 1_200},
            "ended": {"end": f'{{"e":"StepFailed","n":{n}}}'},
        }.get(state, {})

    def spec(self, run: str) -> dict[str, Any]:
        return {"crew": "c", "version": "", "agent": "A", "wire": wire(f"a|{run}", "q")}

    def begin(self) -> dict[str, Any]:
        rng, run = self.rng, self.rng.choice(["r0", "r1", "r2", "r0~2", "r1~2"])
        spec = (
            self.spec(run)
            | rng.choice([{}, {"finish": wire(f"f|{run}", "p")}])
            | {"on_limit": rng.choice(["hold", "fail"])}
        )
        spec |= rng.choice([{}, {"lim_turns": 3}, {"lim_tokens": 800}, {"lim_cost_usd": 1.5}, {"lim_seconds": 6.5}])
        return {
            "run": run,
            "spec": spec,
            "started": '{"e":"RunStarted"}',
            "digest": rng.choice("ddd2"),
            "next": self.next(run),
        } | ({"next": {}, "carried": self.carried(run)} if "~" in run else {})

    def carried(self, run: str) -> list[dict[str, Any]]:
        """Of a run before this one and its sub-agents, some of which the new one will find to be begun otherwise."""
        rng, old = self.rng, run.partition("~")[0]
        below = sorted(k[3:] for k in self.tables.lists if k.startswith(f"ev:{old}/") and self.tables.lists[k])
        out = []
        for was in [old, *below]:
            ns = sorted(int(k) for k in self.tables.hashes[f"st:{was}"] if k.isdigit())
            kept = [n for n in ns if rng.random() < 0.5]
            text = rng.choice(['{"e":"RunStarted"}', '{"e":"RunStarted"}', '{"e":"RunStarted","é":1}'])
            events = [{"at": self.now - 70, "event": text}] + [
                {"at": self.now - 60, "event": f'{{"n":{n}}}'} for n in kept
            ]
            cut = [[n, rng.choice("dde")] for n in ns if n not in kept]
            out.append({"from": was, "run": run + was[len(old) :], "events": events, "kept": kept, "cut": cut})
        return out

    def renew(self) -> dict[str, Any]:
        return {
            "worker": self.rng.choice("vw"),
            "leases": [list(lease[:2]) for lease in self.leases[-3:]],
            "ttl": 3_000,
        }

    def release(self) -> dict[str, Any]:
        return {
            "worker": self.rng.choice("vw"),
            "crashed": self.rng.randint(0, 1),
            "below": self.rng.randint(0, 1),
            "queues": self.rng.choice([[], ["p", "q", "q.suspects"]]),
        }

    def hold(self) -> dict[str, Any]:
        unit, fence, _ = self.lease(self.rng.choice("as"))
        return {"unit": unit, "fence": fence, "why": self.rng.choice(["replay", "in_doubt"])}

    def tell(self) -> dict[str, Any]:
        rng, run, n = self.rng, self.rng.choice(self.runs), self.rng.randint(0, 9)
        held = sorted(self.tables.zsets["held"])
        if held and rng.random() < 0.8:
            _, run, *rest = rng.choice(held).split("|")
            n = int(rest[0]) if rest else 0
        kind = rng.choice(
            [
                "Approved",
                "Approved",
                "Denied",
                "StepResolved",
                "StepResolved",
                "StepRevived",
                "LimitRaised",
                "RunCancelled",
            ]
        )
        kind = "RunCancelled" if rng.random() < 0.04 else kind
        out: dict[str, Any] = {"run": run, "kind": kind, "event": f'{{"e":"{kind}"}}', "n": n}
        if kind == "StepResolved":
            out["action"] = rng.choice(["done", "failed", "retry"])
        if kind == "LimitRaised":
            out |= {"limits": {"turns": rng.randint(3, 9), "cost_usd": 2.75}, "n": 0}
        if kind == "RunCancelled":
            out |= {"n": 0} | ({"up": '{"e":"StepFailed"}'} if "/" in run else {})
        return out

    def sweep(self) -> dict[str, Any]:
        rng = self.rng
        out: dict[str, Any] = {
            "worker": rng.choice("vw"),
            "empty": rng.choice([[], ["q"], ["p", "q", "p.suspects", "q.suspects"]]),
            "ttl": 3_000,
        }
        out |= {"limit": rng.choice([2, 50]), "retain": rng.choice([4_000, 10**9])}
        out |= {"look": 1} if rng.random() < 0.6 else {}
        return out | ({"boot": rng.choice("bbbc")} if rng.random() < 0.3 else {})

    def told(self) -> dict[str, Any]:
        return {"run": self.rng.choice(self.runs)}


def wire(unit: str, queue: str) -> str:
    return f"{queue}\0{unit}#\0"


def test_the_scripts_do_what_the_protocol_says_whatever_is_asked(valkey: Any) -> None:
    client = redis.Redis.from_url(valkey.url, decode_responses=True)
    for seed in range(300):
        client.flushdb()
        scramble = Scramble(client, seed)
        for _ in range(90):
            scramble.step()
        compare(client, scramble.tables)
    client.close()


def test_a_retry_is_carried_alike(valkey: Any) -> None:
    """At-most-once calls in every state a cancelled run may leave them in, then planned again in every way."""
    client = redis.Redis.from_url(valkey.url, decode_responses=True)
    doubts = 0
    for seed in range(300):
        client.flushdb()
        world = Scramble(client, seed)
        rng = world.rng

        def do(name: str, args: dict[str, Any], world: Scramble = world) -> dict[str, Any]:
            return both(client, world.tables, world.now, name, args, seed=world.seed)[0][0]

        def call(n: int, run: str, rng: random.Random = rng) -> dict[str, Any]:
            state = rng.choice([{"state": "queued"}, {"state": "held", "held": "approve"}])
            once = rng.choice(
                [{"once": 1, "digest": "d"}, {"once": 1, "digest": "d"}, {"once": 1, "rec": 1, "digest": "d"}, {}]
            )
            event = f'{{"e":"StepPlanned","n":{n}}}'
            return {"n": n, "kind": "Call", "event": event, "wire": wire(f"s|{run}|{n}", "q")} | state | once

        def gather(run: str, ns: list[int], rng: random.Random = rng) -> dict[str, Any]:
            joined = {"first": 1, "last": 6, "need": rng.randint(1, 6), "everyone": rng.randint(0, 1), "deadline": 0}
            return {"plans": [call(n, run) for n in ns], "gather": joined | {"window": rng.choice([0, 2])}}

        def work(run: str, rng: random.Random = rng, world: Scramble = world) -> None:
            for n in range(1, 7):
                if rng.random() < 0.3:
                    do("tell", {"run": run, "kind": "Approved", "event": '{"e":"Approved"}', "n": n})
                who = {"worker": "w", "token": f"{run}{n}", "ttl": 3_000, "version": 0, "crew": "c", "crew_version": ""}
                claimed = do("claim", {"unit": f"s|{run}|{n}", **who})
                if "ok" in claimed and rng.random() < 0.5:
                    how = rng.choice(["done", "failed", "retried", "doubt"])
                    done = {"unit": f"s|{run}|{n}", "fence": claimed["fence"], "how": how, "version": 0, "event": "{}"}
                    do("commit", done | ({"delay": 900} if how == "retried" else {}))
            if rng.random() < 0.4:
                do("release", {"worker": "w", "crashed": 1, "queues": []})

        begun = {"spec": world.spec("r0") | {"on_limit": "hold"}, "started": '{"e":"RunStarted"}', "digest": "d"}
        do("begin", {"run": "r0", **begun, "next": gather("r0", [1, 2, 3, 4, 5, 6])})
        work("r0")
        do("tell", {"run": "r0", "kind": "RunCancelled", "event": '{"e":"RunCancelled"}', "n": 0})
        world.now += 4_000
        do("sweep", {"worker": "v", "limit": 50, "ttl": 3_000, "empty": []})
        kept = [n for n in range(1, 7) if rng.random() < 0.3]
        new = [n for n in range(1, 7) if n not in kept]
        carried = {"from": "r0", "run": "r0~2", "kept": kept, "cut": [[n, rng.choice("ddde")] for n in new]}
        carried["events"] = [{"at": 5, "event": '{"e":"RunStarted"}'}]
        do("begin", {"run": "r0~2", **begun, "spec": world.spec("r0~2"), "next": {}, "carried": [carried]})
        who = {"worker": "w", "token": "t", "ttl": 3_000, "version": 0, "crew": "c", "crew_version": ""}
        claimed = do("claim", {"unit": "a|r0~2", **who})
        do("plan", {"run": "r0~2", "fence": claimed["fence"], "version": 1, "next": gather("r0~2", new)})
        work("r0~2")
        compare(client, world.tables)
        doubts += sum("StepInDoubt" in line for line in world.tables.lists["ev:r0~2"])
    assert doubts > 30
    client.close()
