"""Agents that come with agentmesh."""

from agentmesh_agents.reader import Note, Reader
from agentmesh_agents.writer import Page, Writer

__all__ = ["Note", "Page", "Reader", "Writer"]
