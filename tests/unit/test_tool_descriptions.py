"""What a model reads of a tool: from its docstring, in four styles, and from its annotations."""

from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field

from agentmesh import Agent, Context, ToolContext, ToolSignatureError, tool
from agentmesh.definitions.parameters import read_docstring
from agentmesh.testing import FakeMesh, says, uses

GOOGLE = """The price of an item.

    In euros, with tax: as of today.

    Args:
        item: what the shop
            calls it.
        count (int, optional): how many.

    Returns:
        Euros.

    Raises:
        TryAgain: there is none.
    """
NUMPY = """The price of an item.

    In euros, with tax: as of today.

    Parameters
    ----------
    item : str
        what the shop
        calls it.
    count : int, default 1
        how many.

    Returns
    -------
    float
        Euros.
    """
REST = """The price of an item.

    In euros, with tax: as of today.

    :param item: what the shop
        calls it.
    :param int count: how many.
    :returns: Euros.
    """
EPYDOC = """The price of an item.

    In euros, with tax: as of today.

    @param item: what the shop
        calls it.
    @param count: how many.
    @return: Euros.
    """


@pytest.mark.parametrize("doc", [GOOGLE, NUMPY, REST, EPYDOC], ids=["google", "numpy", "rest", "epydoc"])
def test_a_docstring_describes_the_tool_and_its_parameters(doc: str) -> None:
    def price(item: str, count: int = 1) -> float:
        return 4.5 * count

    price.__doc__ = doc
    spec = tool(price).spec
    assert spec.description == "The price of an item.\n\nIn euros, with tax: as of today."
    assert spec.parameters["properties"] == {
        "item": {"type": "string", "description": "what the shop calls it."},
        "count": {"type": "integer", "default": 1, "description": "how many."},
    }


@pytest.mark.parametrize(
    ("doc", "description", "parameters"),
    [
        ("", "", {}),
        ("Adds.", "Adds.", {}),
        ("Adds: two numbers\n\nto one.", "Adds: two numbers\n\nto one.", {}),
        ("Adds.\n\nArguments:\n    a: one\n    `b`: two", "Adds.", {"a": "one", "b": "two"}),
        ("Adds.\n\nExample:\n    add(1, 2)\n\nArgs:\n    a: one", "Adds.\n\nExample:\nadd(1, 2)", {"a": "one"}),
        (
            "Adds.\n\nExamples\n--------\nIt is easy.\n\n>>> add(1, 2)\n3",
            "Adds.\n\nExample:\nIt is easy.\n>>> add(1, 2)\n3",
            {},
        ),
        ("Adds.\n\nSource:\n    A book, page 3.", "Adds.", {}),
        ("Adds.\n\nArgs:\n    a: at 12:30: noon\n\nMore text.", "Adds.", {"a": "at 12:30: noon"}),
    ],
)
def test_docstrings_of_every_kind(doc: str, description: str, parameters: dict[str, str]) -> None:
    assert read_docstring(doc) == (description, parameters)


def test_an_annotation_describes_a_parameter_and_comes_before_the_docstring() -> None:
    @tool
    def price(
        item: Annotated[str, Field(description="its name", min_length=2)],
        count: Annotated[int, Field(ge=1)] = 1,
        day: Annotated[int, Field(alias="weekday", description="0 is Monday")] = 0,
    ) -> str:
        """The price.

        Args:
            item: not this.
            count: how many.
        """
        return f"{item} {count} {day}"

    assert price.spec.parameters["properties"] == {
        "item": {"type": "string", "minLength": 2, "description": "its name"},
        "count": {"type": "integer", "minimum": 1, "default": 1, "description": "how many."},
        "weekday": {"type": "integer", "default": 0, "description": "0 is Monday"},
    }
    with pytest.raises(ToolSignatureError, match="item: String should have at least 2 characters"):
        price.on("t")

    class Desk(Agent):
        tools = (price,)

    run = FakeMesh(Desk(), model=[uses("price", item="tea", weekday=2), says("done")]).start("x")
    assert [m.text for m in run.messages() if m.role == "tool"] == ["tea 1 2"]

    class Flow(Agent):
        def flow(self, task: str, ctx: Context) -> str:
            return ctx.do(price.on("tea", day=3))

    assert FakeMesh(Flow()).run("x") == "tea 1 3"


def test_fields_of_a_model_keep_their_descriptions() -> None:
    class Order(BaseModel):
        item: str = Field(description="its name")

    @tool
    def place(order: Order) -> str:
        """Places an order."""
        return order.item

    schema: dict[str, Any] = dict(place.spec.parameters)
    assert schema["$defs"]["Order"]["properties"]["item"]["description"] == "its name"


def test_a_default_that_is_a_field_is_what_the_field_says() -> None:
    @tool
    def find(city: str = Field(description="its name"), days: int = Field(3, ge=1)) -> tuple[str, int]:
        return city, days

    assert find.spec.parameters["required"] == ["city"]
    assert find.spec.parameters["properties"]["city"]["description"] == "its name"
    assert find.bind(find.call_from_json('{"city": "Lima"}').arguments, ToolContext())() == ("Lima", 3)
    with pytest.raises(ToolSignatureError, match="city: Field required"):
        find.on()
