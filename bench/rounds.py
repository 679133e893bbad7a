"""CPU per tool round in one run of 40 rounds: late rounds beside round 5. A journal that grows must not cost by its square.

    python bench/rounds.py [--rounds 40] [--runs 40]

Runs go side by side on a worker in this process; a round is one LLM call and one tool call. CPU is the process's own.
"""

import argparse
import asyncio
import time

from common import machine, valkey

from agentmesh import Agent, tool
from agentmesh.celery.event_loop import run_sync
from agentmesh.config import Config
from agentmesh.definitions.crew import Crew
from agentmesh.mesh import Mesh
from agentmesh.testing import ScriptedModel, says, uses


@tool
async def look_up(word: str) -> str:
    """Looks a word up."""
    return f"meaning of {word}"


class Looker(Agent):
    """Looks up one word after the other."""

    tools = (look_up,)


def main() -> None:
    """Print CPU per round for growing numbers of rounds, and the ratio of late rounds to round 5."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--runs", type=int, default=100)
    given = parser.parse_args()
    wanted = [0]

    def model(prompt: object) -> object:
        done = sum(m.role == "tool" for m in prompt.messages)  # type: ignore[attr-defined]
        return uses("look_up", word=f"w{done}") if done < wanted[0] else says("done")

    with valkey() as server:
        config = Config(broker=server.broker_url, journal=server.url)
        mesh = Mesh(Crew(Looker(), name="rounds", model=ScriptedModel(model)), config=config)  # type: ignore[arg-type]

        def cost(rounds: int) -> float:
            """CPU ms of a run of so many rounds."""
            wanted[0] = rounds

            async def all_of() -> None:
                runs = [await mesh.begin(mesh.crew.lead, "x") for _ in range(given.runs)]
                await asyncio.gather(*[r.result() for r in runs])

            began = time.process_time()
            run_sync(all_of())
            return (time.process_time() - began) / given.runs * 1e3

        with mesh.worker():
            cost(given.rounds)
            three, seven = cost(3), cost(7)
            near, far = cost(given.rounds - 4), cost(given.rounds + 4)
        mesh.close()
    early, late = (seven - three) / 4, (far - near) / 8
    print(f"{given.runs} runs side by side; {machine()}")
    print(f"round 5: {early:.2f} ms CPU   round {given.rounds}: {late:.2f} ms CPU   ratio {late / early:.2f}")


if __name__ == "__main__":
    main()
