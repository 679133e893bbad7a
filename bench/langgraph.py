"""LLM steps a second of one agentmesh worker beside LangGraph's compiled graph without a checkpointer, in the same minute.

    python bench/langgraph.py [--runs 400] [--rounds 3]

Both do the run of `bench/steps.py`: ask, call a tool, ask again, 50 at a time, against the fake server. LangGraph and
langchain-openai are installed into an environment of their own below .agentmesh/, once. LangGraph keeps nothing; agentmesh
journals every step.
"""

import argparse
import json
import os
import subprocess
import time
import venv
from pathlib import Path

from common import fake_server, machine, median, valkey
from steps import AT_ONCE, HERE, mesh_runs

from agentmesh.config import Config
from agentmesh.mesh import Mesh
from agentmesh.models.registry import ModelRegistry
from agentmesh.runtime.crew_file import load_crew
from agentmesh.worker.asyncio_worker import worker_command
from agentmesh.worker.supervisor import Supervisor

PLACE = Path(".agentmesh") / "bench-langgraph"

GRAPH = """
import asyncio, json, sys, time
from typing import Annotated, TypedDict
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages

url, runs, at_once = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

@tool
async def look_up(word: str) -> str:
    "Looks a word up."
    return f"meaning of {word}"

class State(TypedDict):
    messages: Annotated[list, add_messages]

model = ChatOpenAI(model="fake", base_url=url, api_key="k").bind_tools([look_up])

async def ask(state):
    return {"messages": [await model.ainvoke(state["messages"])]}

async def act(state):
    calls = state["messages"][-1].tool_calls
    return {"messages": [ToolMessage(await look_up.ainvoke(c["args"]), tool_call_id=c["id"]) for c in calls]}

graph = StateGraph(State)
graph.add_node("ask", ask)
graph.add_node("act", act)
graph.add_edge(START, "ask")
graph.add_conditional_edges("ask", lambda s: "act" if s["messages"][-1].tool_calls else END)
graph.add_edge("act", "ask")
compiled = graph.compile()

async def main():
    room = asyncio.Semaphore(at_once)
    async def one(i):
        async with room:
            first = [SystemMessage("Look the word up, then answer."), HumanMessage(f"word{i}")]
            await compiled.ainvoke({"messages": first})
    await asyncio.gather(*[one(i) for i in range(20)])
    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*[one(i) for i in range(runs)])
    print(json.dumps({"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}))

asyncio.run(main())
"""


def environment() -> tuple[Path, str]:
    """The interpreter that has LangGraph, and LangGraph's version."""
    python = PLACE / "bin" / "python"
    if not (PLACE / "ready").exists():
        print("installing langgraph and langchain-openai into an environment of their own …", flush=True)
        venv.create(PLACE, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "langgraph", "langchain-openai"], check=True)
        (PLACE / "ready").touch()
    look = "import importlib.metadata as m; print(m.version('langgraph'))"
    return python, subprocess.run([python, "-c", look], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    python, version = environment()
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    graph: list[tuple[float, float]] = []
    mesh_took: list[tuple[float, float]] = []
    with valkey() as server, fake_server() as url:
        os.environ |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "k"}
        config = Config(broker=server.broker_url, journal=server.url)
        crew = str(HERE / "crew.py")
        mesh = Mesh(load_crew(crew), config=config, models=ModelRegistry())
        supervisor = Supervisor([worker_command(config, crews=[crew], queues=[], concurrency=0)])
        supervisor.start()
        supervisor.wait_ready(20)
        for _ in range(given.rounds):
            argv = [str(python), "-c", GRAPH, url, str(given.runs), str(AT_ONCE)]
            told = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True, env=clean).stdout)
            graph.append((told["wall_s"], told["cpu_s"]))
            wall, cpu, _ = mesh_runs(mesh, list(supervisor.pids.values()), server.url, given.runs, None)
            mesh_took.append((wall, cpu))
            time.sleep(0.2)
        supervisor.stop()
        supervisor.join(10)
        mesh.close()
    print(f"{given.runs} runs of 2 LLM calls + 1 tool, {AT_ONCE} at a time, {given.rounds} rounds; {machine()}")
    rates = {}
    for name, found in {f"LangGraph {version}, no checkpointer": graph, "agentmesh, journaled": mesh_took}.items():
        rates[name] = 2 * given.runs / median([wall for wall, _ in found])
        print(
            f"{name:<36} {rates[name]:6.0f} LLM steps/s   {median([cpu for _, cpu in found]) / given.runs * 1e3:5.2f} ms CPU a run"
        )
    first, second = rates.values()
    print(f"ratio of LLM steps/s {second / first:.2f}")


if __name__ == "__main__":
    main()
