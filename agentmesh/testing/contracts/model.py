"""The contract of a Model."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar
from unittest import SkipTest

from agentmesh.errors import ModelError
from agentmesh.message import Message, ToolSpec, tool_result, user
from agentmesh.model import Answer, Model, Prompt, RetryLater, Thought
from agentmesh.testing.contracts.base import Contract, check

T = TypeVar("T")
FINISHES = ("stop", "length", "tool_calls")
DOUBLE = ToolSpec(
    "double", "Doubles a number.",
    {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]},
)  # fmt: skip
CANCELLED_AFTER_S = (0.0, 0.001, 0.01, 0.1)


class ModelContract(Contract):
    """Tests of a Model.

    Attributes:
        model_name: the model of the prompts: the text after the colon.
        counts_usage: whether answers have their numbers of tokens.
        calls_tools: whether the model calls a tool when the prompt demands it.
        timeout_s: of one request, in seconds.
    """

    model_name = "any"
    counts_usage = True
    calls_tools = True
    timeout_s = 60.0

    def make(self) -> Model:
        """A new model."""
        raise NotImplementedError(f"{type(self).__name__} needs `make`")

    def make_failing(self) -> Model:
        """A model whose requests fail, such as one of a server that does not respond."""
        raise SkipTest("`make_failing` is not overridden: the errors of the model are not tested")

    def prompt(self, *messages: Message, tools: Sequence[ToolSpec] = ()) -> Prompt:
        """The prompt of a test."""
        return Prompt(self.model_name, messages or (user("Say hello."),), tools)

    # ---- answers -------------------------------------------------------------------------------
    def test_an_answer_is_a_message_of_the_assistant(self) -> None:
        """With text, without tool calls, and with its finish reason."""
        answer = self._ask()
        assert isinstance(answer, Answer), f"`ask` returned {answer!r}, which is not an Answer"
        assert answer.message.role == "assistant", f"the answer's role is {answer.message.role!r}, not 'assistant'"
        assert answer.message.text, "the answer has no text"
        assert not answer.message.tool_calls, "the answer calls a tool, and the prompt had none"
        assert answer.finish in FINISHES, f"`finish` is {answer.finish!r}, which is not one of {FINISHES}"
        assert Message.from_json(json.loads(json.dumps(answer.message.to_json()))) == answer.message, "it is not JSON"

    def test_usage_is_counted(self) -> None:
        """In tokens, and as JSON."""
        usage = self._ask().usage
        assert min(usage.input_tokens, usage.output_tokens, usage.cost_usd) >= 0, f"usage is negative: {usage}"
        if self.counts_usage:
            assert usage.input_tokens > 0, "no input tokens are counted"
            assert usage.output_tokens > 0, "no output tokens are counted"

    def test_on_token_gets_the_text_of_the_answer(self) -> None:
        """In pieces, in order, on the thread of the event loop."""
        pieces: list[str] = []
        threads: set[int] = set()

        def on_token(text: str) -> None:
            pieces.append(text)
            threads.add(threading.get_ident())

        async def ask(model: Model) -> tuple[Answer, int]:
            return await model.ask(self.prompt(), on_token), threading.get_ident()

        answer, thread = self._with_model(ask)
        assert threads <= {thread}, "`on_token` was called from another thread than the event loop's"
        streamed = "".join(p for p in pieces if not isinstance(p, Thought))
        assert streamed == answer.message.text, f"the pieces are {streamed!r} and the answer is {answer.message.text!r}"

    # ---- tools ---------------------------------------------------------------------------------
    def test_a_prompt_with_tools_is_answered(self) -> None:
        """By a call with a name, an id and JSON text, and its result by an answer; without `calls_tools`, by text."""
        request = user("Call the tool `double` with the number 21.")
        answer = self._ask(self.prompt(request, tools=[DOUBLE]))
        calls = answer.message.tool_calls
        if not self.calls_tools:
            assert not calls, "it calls a tool; set `calls_tools = True`"
            return
        assert calls, "it did not call the tool; set `calls_tools = False` if it never calls any"
        assert answer.finish in ("tool_calls", "length"), f"`finish` is {answer.finish!r} and it calls a tool"
        assert calls[0].name == DOUBLE.name, f"it calls {calls[0].name!r}, which is not a tool of the prompt"
        assert calls[0].id, "a tool call has no id"
        assert len({c.id for c in calls}) == len(calls), "two tool calls have one id"
        assert isinstance(calls[0].arguments, str), "arguments are JSON text, not an object"
        results = [tool_result(call, "42") for call in calls]
        after = self._ask(self.prompt(request, answer.message, *results, tools=[DOUBLE]))
        assert after.message.text or after.message.tool_calls, "after the tool's result the answer is empty"

    # ---- concurrency ---------------------------------------------------------------------------
    def test_requests_run_at_the_same_time(self) -> None:
        """On one event loop."""

        async def several(model: Model) -> list[Answer]:
            return await asyncio.gather(*[model.ask(self.prompt()) for _ in range(8)])

        assert all(answer.message.text for answer in self._with_model(several)), "an answer has no text"

    def test_one_object_serves_several_event_loops(self) -> None:
        """One after another, and two at the same time in two threads."""
        model, both_answered = self.make(), threading.Barrier(2)
        outcomes: list[Answer | Exception] = [self._on_a_loop(model), self._on_a_loop(model)]

        def ask() -> None:
            try:
                outcomes.append(self._on_a_loop(model, lambda: both_answered.wait(self.timeout_s)))
            except Exception as e:
                outcomes.append(e)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * self.timeout_s)
        for outcome in outcomes:
            assert isinstance(outcome, Answer), f"a request on the event loop of another thread raised {outcome!r}"
        assert len(outcomes) == 4, "a request on the event loop of another thread did not end"

    def test_a_cancelled_request_leaves_nothing_open(self) -> None:
        """No task of it is running after `close`, and the model answers afterwards."""

        async def cancel(model: Model) -> tuple[Answer, set[Any]]:
            before = asyncio.all_tasks()
            for wait_s in CANCELLED_AFTER_S:
                request = asyncio.ensure_future(model.ask(self.prompt(), lambda text: None))
                await asyncio.sleep(wait_s)
                request.cancel()
                done, _ = await asyncio.wait({request}, timeout=self.timeout_s)
                assert done, f"a request that was cancelled after {wait_s} s did not end"
                if not request.cancelled():
                    request.result()
            answer = await model.ask(self.prompt())
            await model.close()
            await asyncio.sleep(0.05)
            return answer, asyncio.all_tasks() - before

        answer, tasks = self._with_model(cancel)
        assert answer.message.text, "after a cancelled request the answer has no text"
        assert not tasks, f"tasks are running after `close`: {tasks}"

    def test_it_answers_again_after_close(self) -> None:
        """`close` releases connections and can be called between requests."""

        async def twice(model: Model) -> Answer:
            await model.ask(self.prompt())
            await model.close()
            return await model.ask(self.prompt())

        assert self._with_model(twice).message.text, "after `close` the answer has no text"

    # ---- errors --------------------------------------------------------------------------------
    def test_a_failure_is_a_model_error_or_asks_for_a_retry(self) -> None:
        """So that the engine knows whether to retry."""
        model = self.make_failing()
        try:
            self._on_a_loop(model)
        except (ModelError, RetryLater) as e:
            if str(e):
                return
            raise AssertionError(f"it raised a {type(e).__name__} without a message") from e
        except Exception as e:
            raise AssertionError(f"it raised {type(e).__name__}: {e}; raise a ModelError or RetryLater") from e
        raise AssertionError("a model that fails has answered")

    # ---- parts ---------------------------------------------------------------------------------
    def _ask(self, prompt: Prompt | None = None) -> Answer:
        return self._with_model(lambda model: model.ask(prompt or self.prompt()))

    def _on_a_loop(self, model: Model, before_close: Callable[[], Any] = lambda: None) -> Answer:
        async def ask() -> Answer:
            try:
                return await asyncio.wait_for(model.ask(self.prompt()), self.timeout_s)
            finally:
                before_close()
                await model.close()

        return asyncio.run(ask())

    def _with_model(self, work: Callable[[Model], Coroutine[Any, Any, T]]) -> T:
        async def main() -> T:
            model = self.make()
            try:
                return await asyncio.wait_for(work(model), self.timeout_s)
            finally:
                await model.close()

        return asyncio.run(main())


def check_model(make: Callable[[], Model], **attributes: Any) -> None:
    """Run ModelContract against what `make` gives; `attributes` are the contract's.

    Raises:
        AssertionError: a promise is broken.
    """
    check(ModelContract, make, **attributes)
