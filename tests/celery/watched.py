"""The crew that the observability tests run: a nested crew, a retry, a tool that fails; spans go to a file a process."""

import json
import logging
import os
import time

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

from agentmesh import Agent, Context, Crew, ToolContext, ToolError, tool


class ToFile(SpanExporter):
    """Appends spans as JSON lines; what is written outlives the process."""

    def export(self, spans):
        with open(f"{os.environ['WATCHED']}/spans-{os.getpid()}", "a") as out:
            out.writelines(
                json.dumps(json.loads(span.to_json(indent=None)) | {"pid": os.getpid()}) + "\n" for span in spans
            )
        return SpanExportResult.SUCCESS


if "WATCHED" in os.environ:  # a worker process, not the test's own
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ToFile()))
    trace.set_tracer_provider(provider)


@tool(retries=1)
def flaky(c: ToolContext = ToolContext()) -> str:
    """Works the second time."""
    logging.getLogger("users.own").info("attempt %d", c.attempt)
    if c.attempt == 1:
        raise OSError("no luck")
    return "luck"


@tool
def broken() -> str:
    """Never works."""
    raise ValueError("broken for good")


@tool
def look_up(word: str) -> str:
    """Waits for the test's leave.

    Args:
        word: the word.
    """
    while not os.path.exists(f"{os.environ['WATCHED']}/go"):
        time.sleep(0.01)
    with trace.get_tracer("users.own").start_as_current_span("own"):
        return f"meaning of {word}"


class Worker(Agent):
    """Looks one thing up."""

    tools = (look_up,)


class Lead(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        notes = ctx.gather([Worker().on(f"{task}-{i}") for i in range(4)])
        luck = ctx.do(flaky.on())
        try:
            ctx.do(broken.on())
        except ToolError:
            return f"{' '.join(notes)} {luck}"
        return "never"


crew = Crew(Lead(), Worker(), name="watched", model="openai:fake")
