"""A model that repeats what it is told: `echo:any`."""

from collections.abc import Callable

from agentmesh.message import Usage, assistant
from agentmesh.model import Answer, Model, Prompt


class Echo(Model):
    """Says the last message again, after its own name."""

    async def ask(self, prompt: Prompt, on_token: Callable[[str], None] | None = None) -> Answer:
        """See Model."""
        text = f"{prompt.model}: {prompt.messages[-1].text}"
        if on_token is not None:
            on_token(text)
        words = sum(len(m.text.split()) for m in prompt.messages)
        return Answer(assistant(text), Usage(input_tokens=words, output_tokens=len(text.split())))
