"""The public test kit: scripted models, a mesh without servers, a fake OpenAI server, chaos. Our own tests use nothing else."""

from agentmesh.models.scripted import Reply, ScriptedModel, says, uses
from agentmesh.testing.server import FakeOpenAI
from agentmesh.testing.world import FakeMesh

__all__ = ["FakeMesh", "FakeOpenAI", "Reply", "ScriptedModel", "says", "uses"]
