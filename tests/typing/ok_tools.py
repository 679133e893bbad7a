"""Tools: what `.on()` takes and gives, for `def` and `async def`, with and without arguments to the decorator."""

from collections.abc import Coroutine
from typing import Annotated, Any, assert_type

from pydantic import BaseModel, Field

from agentmesh import Agent, Context, Tool, ToolContext, tool
from agentmesh.testing import FakeMesh


class Forecast(BaseModel):
    sky: str


@tool
def price(item: str, count: int = 1) -> float:
    """The price."""
    return 4.5 * count


@tool(timeout_s=20, retries=2, delivery="idempotent")
def stock(item: Annotated[str, Field(description="what the shop calls it")], c: ToolContext = ToolContext()) -> int:
    """How many there are."""
    return c.attempt


@tool
async def forecast(city: str) -> Forecast:
    """The weather."""
    return Forecast(sky="clear")


@tool(name="wind", approve=False)
async def wind_of(city: str) -> list[int]:
    """The wind."""
    return [3, 4]


@tool
def anything(item: str) -> Any:
    """Whatever there is."""
    return item


async def call(**arguments: str) -> list[str]:
    return sorted(arguments.values())


remote = Tool.from_schema("remote", {"type": "object", "properties": {"a": {"type": "string"}}}, call, retries=1)


class Desk(Agent):
    tools = (price, stock, forecast, wind_of, anything, remote)

    def flow(self, task: str, ctx: Context) -> str:
        assert_type(ctx.do(price.on(task, count=2)), float)
        assert_type(ctx.do(stock.on(task)), int)
        sky = ctx.do(forecast.on(task))
        assert_type(sky, Forecast)
        assert_type(ctx.do(wind_of.on(task)), list[int])
        assert_type(ctx.do(remote.on(a="x")), list[str])
        return sky.sky


def direct() -> None:
    assert_type(price("tea"), float)
    assert_type(stock("tea"), int)
    coroutine: Coroutine[Any, Any, Forecast] = forecast("Lima")
    coroutine.close()


async def awaited() -> None:
    assert_type(await forecast("Lima"), Forecast)
    assert_type(await wind_of("Lima"), list[int])


one: Tool[[str, int], float] = price
two: Tool[[str], Forecast] = forecast
assert FakeMesh(Desk()).run("Lima") == "clear"
