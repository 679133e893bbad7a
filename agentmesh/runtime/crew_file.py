"""Load a crew from a Python file or an installed module."""

import importlib
import importlib.metadata
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

from agentmesh.definitions.crew import Crew
from agentmesh.errors import DefinitionError, MeshError, did_you_mean
from agentmesh.models.registry import is_importable


def load_crew(path: str) -> Crew:
    """The crew of a file, `crew.py`, or an installed module, `package.module`; with `:name` where it has several.

    Raises:
        DefinitionError: there is no file, it raises, or it defines no crew or several.
    """
    file, _, name = path.partition(":")
    source = Path(file)
    if not source.is_file():
        if source.suffix != ".py" and "." in file and file.replace(".", "").isidentifier() and is_importable(file):
            return _crew_among(vars(importlib.import_module(file)), file, name)
        raise DefinitionError(
            f"file {file!r} does not exist", hint="pass the path of a Python file that defines a Crew"
        )
    folder = str(source.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(source.stem, source)
    if spec is None or spec.loader is None:
        raise DefinitionError(f"{file!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[source.stem] = module
    try:
        spec.loader.exec_module(module)
    except MeshError:
        raise
    except SyntaxError as e:
        raise DefinitionError(f"{e.filename or file}, line {e.lineno}: {type(e).__name__}: {e.msg}") from e
    except (Exception, SystemExit) as e:  # a file that calls sys.exit() must not end this process
        line = next(
            (f.lineno for f in reversed(traceback.extract_tb(e.__traceback__)) if Path(f.filename).name == source.name),
            "?",
        )
        raise DefinitionError(f"{file}, line {line}: {type(e).__name__}: {e}") from e
    return _crew_among(vars(module), file, name)


def _crew_among(names: dict[str, Any], file: str, name: str) -> Crew:
    crews = {k: v for k, v in names.items() if isinstance(v, Crew)}
    if name:
        if name not in crews:
            raise DefinitionError(
                f"{file} has no Crew {name!r}",
                hint=f"use one of: {', '.join(crews) or 'none'}.{did_you_mean(name, crews)}",
            )
        return crews[name]
    if not crews:
        raise DefinitionError(f"{file} defines no Crew", hint="add `crew = Crew(YourAgent())`")
    if len({id(c) for c in crews.values()}) > 1:
        raise DefinitionError(
            f"{file} defines {len(crews)} crews ({', '.join(crews)})", hint=f"choose one: {file}:{next(iter(crews))}"
        )
    return next(iter(crews.values()))
