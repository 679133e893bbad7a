"""Tools that come with agentmesh."""

from agentmesh_tools.files import Piece, in_folder

__all__ = ["Piece", "in_folder"]
