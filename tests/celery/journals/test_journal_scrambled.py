"""The Lua scripts and the Python protocol agree on arbitrary calls, including those that no worker makes."""

import random
from typing import Any

from agentmesh.journal.transaction import Tables

VERBS = ("begin", "claim", "renew", "release", "commit", "plan", "hold", "signal", "sweep", "notified")
OFTEN = ("claim", "claim", "commit", "commit", "plan", "signal")


class Scramble:
    """Verbs in any order with any arguments that the codec may make, also such as no sane worker would send."""

    def __init__(self, alike: Any, seed: int) -> None:
        self.alike, self.seed, self.now = alike, seed, 1_700_000_000_000
        self.rng, self.tables = random.Random(seed), Tables()
        self.leases: list[tuple[str, int, int]] = [("s|r0|1", 1, 1)]
        self.last: tuple[str, dict[str, Any]] = ("sweep", self.sweep())
        self.runs = ["r0", "r1"]

    def step(self) -> None:
        """One verb; now and then the last one once more."""
        self.now += self.rng.choice([0, 1, 40, 700, 2_500, 4_100, -300])
        queue = self.rng.choice(self.alike.brokers)
        if self.tables.lists[queue]:
            self.tables.lists[queue].clear()
            self.alike.client.delete(queue)
        elif self.rng.random() < 0.3:
            self.tables.lists[queue].append("m")
            self.alike.client.lpush(queue, "m")
        if self.rng.random() > 0.1:
            name = self.rng.choice([*VERBS, *OFTEN])
            self.last = name, getattr(self, name)()
        (head, _), _ = self.alike.both(self.tables, self.now, *self.last, seed=self.seed)
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
        kind = rng.choice(["Ask", "Call"]) if state == "queued" else kind
        out: dict[str, Any] = {"n": n, "kind": kind, "state": state, "event": f'{{"e":"StepPlanned","n":{n}}}'}
        if rng.random() < 0.6:  # else it is of a time when entries did not say their lane, and their kind implied it
            lane = {"Delegate": "child", "Approve": "held", "Sleep": "due"}.get(kind, "queued")
            out |= {"kind": rng.choice([kind, "New"]), "lane": lane}
            if lane == "queued":
                del out["kind"], out["lane"]
            if kind == "Ask":
                out["limited"] = 1
        if state == "child":
            out["child"] = {
                "spec": self.alike.spec(f"{run}/{n}") | {"parent": run, "n": n},
                "started": '{"e":"RunStarted"}',
            }
        else:
            out["wire"] = self.alike.wire(f"s|{run}|{n}", rng.choice("pq"))
        if state == "queued" and rng.random() < 0.4:
            out |= rng.choice([{"once": 1}, {"once": 1, "rec": 1}, {"once": 1, "digest": "d"}])
        if cut or (state == "held" and rng.random() < 0.4):
            out |= {"once": 1, "digest": "d"}
        return out | {
            "held": {"held": rng.choice(["approve", "approve", "signal:x"])},
            "due": {"due": 1_200},
            "ended": {"end": f'{{"e":"StepFailed","n":{n}}}'},
        }.get(state, {})

    def begin(self) -> dict[str, Any]:
        rng, run = self.rng, self.rng.choice(["r0", "r1", "r2", "r0~2", "r1~2"])
        spec = (
            self.alike.spec(run)
            | rng.choice([{}, {"finish": self.alike.wire(f"f|{run}", "p")}])
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

    def signal(self) -> dict[str, Any]:
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

    def notified(self) -> dict[str, Any]:
        return {"run": self.rng.choice(self.runs)}


def test_the_scripts_do_what_the_protocol_says_whatever_is_asked(alike: Any) -> None:
    for seed in range(300):
        alike.client.flushdb()
        scramble = Scramble(alike, seed)
        for _ in range(90):
            scramble.step()
        alike.compare(scramble.tables)
