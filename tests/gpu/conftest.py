"""A tiny made model in an engine, on whatever device there is; each test has its own."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from agentmesh.gpu.batching import Shape
from agentmesh.gpu.engine import Engine
from agentmesh.testing.tiny import made_model

torch.set_num_threads(1)  # two threads for so small a model wait for each other more than they compute
SMALL = Shape(pages=80, page_tokens=16, batch_tokens=64, batch_requests=32)


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """Makes engines around fresh models, and closes them."""
    made: list[Engine] = []

    def make(shape: Shape = SMALL, *, model: Any = None, **more: Any) -> Engine:
        made.append(Engine(made_model() if model is None else model, shape, **more))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine()
