"""The bare hand-written loop that agentmesh is measured against: the official openai client, asyncio, no durability.

Prints a JSON line: wall and CPU seconds of the runs.
"""

import asyncio
import json
import sys
import time
from typing import Any

import openai

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}


async def one(client: openai.AsyncOpenAI, task: str) -> str:
    """One run: ask, call the tool, ask again."""
    messages: list[Any] = [
        {"role": "system", "content": "Look the word up, then answer."},
        {"role": "user", "content": task},
    ]
    while True:
        reply = await client.chat.completions.create(model="fake", messages=messages, tools=[TOOL])
        message = reply.choices[0].message
        if not message.tool_calls:
            return message.content or ""
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            word = json.loads(call.function.arguments)["word"]  # type: ignore[union-attr]
            messages.append({"role": "tool", "tool_call_id": call.id, "content": f"meaning of {word}"})


async def main(url: str, runs: int, at_once: int) -> None:
    """So many runs, so many at a time."""
    async with openai.AsyncOpenAI(base_url=url, api_key="k") as client:
        room = asyncio.Semaphore(at_once)

        async def limited(i: int) -> None:
            async with room:
                await one(client, f"word{i}")

        await asyncio.gather(*[limited(i) for i in range(20)])
        began, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*[limited(i) for i in range(runs)])
        print(json.dumps({"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
