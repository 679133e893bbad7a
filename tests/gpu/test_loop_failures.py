"""Which request is blamed when the engine's loop dies."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from agentmesh.errors import ModelError
from agentmesh.inference.engine import InferenceEngine
from agentmesh.inference.request import InferenceRequest
from agentmesh.testing.tiny_models import make_model

WAIT_S = 30
POISON = 299


def test_a_suspect_is_not_blamed_for_a_fault_that_passes_while_it_is_tried(
    make_engine: Callable[..., InferenceEngine],
) -> None:
    """It died twice in the company of a poison, and once more, alone, of something else."""
    model, seen, passing = make_model(), list[list[int]](), list[bool]()
    forward = model.forward

    def faulty(*args: Any, **kwargs: Any) -> Any:
        both.wait(WAIT_S)
        ids = kwargs["input_ids"][0].tolist()
        seen.append(ids)
        if POISON in ids:
            raise RuntimeError("poison")
        if len(seen) > 2 and not passing:  # now each is alone
            passing.append(True)
            raise RuntimeError("passing")
        return forward(*args, **kwargs)

    engine, both = make_engine(model=model), threading.Event()
    model.forward = faulty
    innocent, culprit = engine.submit(InferenceRequest((5, 6, 7), 4)), engine.submit(InferenceRequest((5, POISON), 4))
    both.set()
    assert len(innocent.result(WAIT_S).tokens) == 4
    with pytest.raises(ModelError, match="poison"):
        culprit.result(WAIT_S)
    assert passing
