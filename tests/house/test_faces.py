"""What a user sees of an agent and a crew: the words below, and no other without a reason."""

from agentmesh import Agent, Crew, Queue

DOES = {"on", "flow", "ask", "call_tools"}
SAYS = {
    "model",
    "instructions",
    "tools",
    "team",
    "options",
    "queue",
    "retries",
    "timeout_s",
    "name",
    "output",
    "task_type",
}
HOLDS = {"lead", "agents", "queues", "limits", "schedules"}
GIVEN = {"name", "model", "version", "deps"}


class Echo(Agent):
    """Says what it is told."""


def public(names: object) -> set[str]:
    assert isinstance(names, list)
    return {name for name in names if not name.startswith("_")}


def test_the_words_of_an_agent() -> None:
    assert public(dir(Echo())) == DOES | SAYS


def test_the_words_of_a_crew() -> None:
    assert public(dir(Crew(Echo()))) == {"agent"} | HOLDS | GIVEN


def test_the_queues_of_a_crew_are_a_mapping() -> None:
    crew = Crew(Echo(), name="shop", queues=[Queue("web"), Queue("slow", concurrency=2)])
    assert list(crew.queues) == ["web", "slow"]
    assert crew.queues["slow"].concurrency == 2
    assert crew.queues.first == "web"
    assert crew.queues.broker_name("web") == "agentmesh.shop.web"
