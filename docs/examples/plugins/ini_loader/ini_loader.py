"""INI files as documents: each section is a heading, each option a line."""

import configparser

from agentmesh.errors import DocumentError
from agentmesh.rag.documents import Document
from agentmesh.rag.loaders import decode, markdown


def read(data: bytes, name: str, encoding: str) -> Document:
    """See Loader."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(decode(data, name, encoding))
    except configparser.Error as e:
        raise DocumentError(f"{name!r} is not an INI file: {e.message.splitlines()[0]}") from None
    sections = [f"# {s}\n\n" + "\n".join(f"{k}: {v}" for k, v in parser[s].items()) for s in parser.sections()]
    return markdown("\n\n".join(sections))
