"""What the next request is taken to need is known from those that came, before any has ended."""

from agentmesh.inference.request import DemandEstimate, InferenceRequest


def test_what_came_says_what_comes() -> None:
    need = DemandEstimate()
    for _ in range(64):
        need.arrived(InferenceRequest((1,) * 100, 32))
    assert 132 < need.tokens < 134


def test_what_ended_says_how_long_answers_are_and_what_is_cached() -> None:
    need, request = DemandEstimate(), InferenceRequest((1,) * 100, 1000)
    for _ in range(80):
        need.arrived(request)
    assert 355 < need.tokens < 357  # a first guess of an answer's length
    for _ in range(80):
        need.ended(request, cached_tokens=96, answer_tokens=6)
        need.arrived(request)
    assert 10 < need.tokens < 12
