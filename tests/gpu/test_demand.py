"""The estimate of a request's tokens is learned from earlier requests, before any of them has ended."""

from agentmesh.inference.request import DemandEstimate, InferenceRequest


def test_what_came_says_what_comes() -> None:
    demand = DemandEstimate()
    for _ in range(64):
        demand.arrived(InferenceRequest((1,) * 100, 32))
    assert 132 < demand.tokens < 134


def test_what_ended_says_how_long_answers_are_and_what_is_cached() -> None:
    demand, request = DemandEstimate(), InferenceRequest((1,) * 100, 1000)
    for _ in range(80):
        demand.arrived(request)
    assert 355 < demand.tokens < 357  # a first guess of an answer's length
    for _ in range(80):
        demand.ended(request, cached_tokens=96, answer_tokens=6)
        demand.arrived(request)
    assert 10 < demand.tokens < 12
