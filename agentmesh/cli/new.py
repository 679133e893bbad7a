"""`agentmesh new`: a folder with a small crew, its test and a README to start from."""

from pathlib import Path

from agentmesh.errors import ConfigError, DefinitionError
from agentmesh.runtime.process_exit import DONE

CREW = '''"""A clerk that looks prices up: a crew of one agent with one tool."""

from agentmesh import Agent, Crew, TryAgain, tool

PRICES = {"tea": 4.5, "cake": 6.0}


@tool
def price(item: str) -> float:
    """The price of an item in euros.

    Args:
        item: what the shop calls it.
    """
    if item not in PRICES:
        raise TryAgain(f"unknown item {item!r}; use one of: {', '.join(PRICES)}")  # goes to the model, not to the user
    return PRICES[item]


class Clerk(Agent):
    """Answers questions about prices."""

    model = "local:smollm2"  # runs on any CPU; too small to call tools, which "openai:gpt-5-mini" can
    instructions = "Look prices up before you answer."
    tools = (price,)


crew = Crew(Clerk())
'''
TEST = '''"""The crew with a scripted model: needs no key and no server."""

from agentmesh.testing import FakeMesh, says, uses

from crew import crew


def test_a_price_is_looked_up() -> None:
    run = FakeMesh(crew, model=[uses("price", item="tea"), says("Tea is 4.50 euros.")]).start("What does tea cost?")
    assert run.result() == "Tea is 4.50 euros."
    assert run.messages()[-2].text == "4.5"  # what the model gets from the tool


def test_the_model_is_told_of_an_unknown_item() -> None:
    run = FakeMesh(crew, model=[uses("price", item="gold"), says("There is no gold.")]).start("What does gold cost?")
    assert run.result() == "There is no gold."
    assert "use one of: tea, cake" in run.messages()[-2].text
'''
README = """# {name}

`crew.py` has an agent with a tool, `test_crew.py` tests it with a scripted model: `python -m pytest`. Its model, SmolLM2, needs no key
and no server (`pip install 'agentmesh-celery[local]'`, `agentmesh models pull smollm2`), but is too small to call the tool. For good
answers set another model in `crew.py`, set OPENAI_API_KEY or OPENAI_BASE_URL, and: `agentmesh run crew.py "What does tea cost?"`
"""
NEXT = """cd {name} && python -m pytest
agentmesh models pull smollm2
agentmesh run crew.py "What does tea cost?"
"""
MAX_NAME_BYTES = 255  # of a file name on most systems


def make_new(name: str) -> int:
    """Make the folder with its three files, and print the next commands.

    Raises:
        DefinitionError: the name is not valid, or the folder exists and is not empty.
        ConfigError: the folder cannot be written.
    """
    bad = not name.strip(" .") or not name.isprintable() or any(c in name for c in "/\\\"'$`") or name.startswith("-")
    if bad or len(name.encode()) > MAX_NAME_BYTES:
        raise DefinitionError(f"{name!r} is not a valid folder name", hint="use a name such as 'shop'")
    folder = Path(name)
    try:
        if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
            raise DefinitionError(f"{name!r} already exists and is not an empty folder", hint="choose another name")
        folder.mkdir(exist_ok=True)
        for file, text in (("crew.py", CREW), ("test_crew.py", TEST), ("README.md", README.replace("{name}", name))):
            (folder / file).write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError(
            f"{name!r} cannot be made: {e.strerror or e}", hint="run the command in a folder you can write to"
        ) from None
    quoted = f'"{name}"' if " " in name else name
    print(NEXT.replace("{name}", quoted), end="")
    return DONE
