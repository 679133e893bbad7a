"""A tiny made model in an engine, on the CPU and on a GPU; each test has its own. `pytest -m gpu` runs those on a GPU."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from agentmesh.gpu.batching import Shape
from agentmesh.gpu.engine import Engine
from agentmesh.testing.tiny import made_model

torch.set_num_threads(1)  # two threads for so small a model wait for each other more than they compute
WHERE, GPUS = ["cpu"], list[str]()
if torch.cuda.is_available():
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    GPUS = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    torch.cuda.init()  # before a test hides the GPU from the processes it starts
    WHERE.append(pytest.param("cuda", marks=pytest.mark.gpu))  # type: ignore[arg-type]
SMALL = Shape(pages=80, page_tokens=16, batch_tokens=64, batch_requests=32)


@pytest.fixture(params=WHERE)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the test's models are, those of its worker processes too; of several GPUs it is the first."""
    if request.param == "cuda":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", GPUS[0])
    elif GPUS:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return str(request.param)


@pytest.fixture
def gpus(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that takes two GPUs where there are two."""
    if device == "cuda":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(GPUS[:2]))


@pytest.fixture
def make_engine(device: str) -> Iterator[Callable[..., Engine]]:
    """Makes engines around fresh models, and closes them."""
    made: list[Engine] = []

    def make(shape: Shape = SMALL, *, model: Any = None, **more: Any) -> Engine:
        made.append(Engine((made_model() if model is None else model).to(device), shape, **more))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine()
