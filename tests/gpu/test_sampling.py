"""Sampling: which tokens may be drawn, how often, and independence from the other requests of a batch."""

import math

import pytest
import torch

from agentmesh.inference import sampling
from agentmesh.inference.sampling import DrawOptions, draw, noise

V = 3000


def scores(n: int = 1, v: int = V, spread: float = 3.0) -> torch.Tensor:
    """Of a bfloat16 model, so that many are equal."""
    return (torch.randn(n, v, generator=torch.Generator().manual_seed(n * v)) * spread).bfloat16().float()


def may_come(row: torch.Tensor, top_k: int, top_p: float) -> set[int]:
    """By the definitions, over the whole vocabulary."""
    if top_k:
        row = row.masked_fill(row < row.sort(descending=True).values[top_k - 1], -math.inf)
    least = row[row > -math.inf].min()
    if top_p < 1:
        shares, ids = row.double().softmax(0).sort(descending=True)
        least = row[ids[int((shares.cumsum(0) - shares < top_p).sum()) - 1]]
    return set((row >= least).nonzero()[:, 0].tolist())


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (40, 1.0), (0, 0.6), (0, 0.97), (200, 0.9), (5, 0.01)])
@pytest.mark.parametrize("candidates", [1024, 16])
def test_what_may_come_comes_and_nothing_else(
    top_k: int, top_p: float, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "CANDIDATES", candidates)  # with 16 most do not end among them
    row = scores(spread=2.0)
    known = may_come(row[0], top_k, top_p)
    many = 4000
    drawn = draw(row.expand(many, V), [DrawOptions(1.0, top_k, top_p, i, 0) for i in range(many)])
    assert set(drawn.tolist()) <= known
    shares = torch.full((V,), -math.inf).index_copy(0, torch.tensor(sorted(known)), row[0][sorted(known)]).softmax(0)
    often = (shares > 20 / many).nonzero()[:, 0].tolist()
    assert set(often) <= set(drawn.tolist())
    likeliest = int(shares.argmax())
    share, found = float(shares[likeliest]), float((drawn == likeliest).float().mean())
    assert abs(found - share) <= 4 * (share * (1 - share) / many) ** 0.5


def test_all_tokens_come_as_often_as_they_are_likely() -> None:
    row, many = scores(v=24, spread=1.0), 100_000
    expected = (row[0] / 0.7).softmax(0) * many
    counts = torch.bincount(
        draw(row.expand(many, 24), [DrawOptions(0.7, 0, 1.0, 1, i) for i in range(many)]), minlength=24
    )
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 53  # 23 degrees of freedom: one in 3,000 is above; the seeds are fixed


def test_a_draw_is_the_same_alone_and_in_company(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = scores(12)
    wishes = [DrawOptions(0.5 + i / 5, (0, 7, 0, 2000)[i % 4], (1.0, 1.0, 0.9, 0.99)[i % 4], i, 3) for i in range(12)]
    together = draw(rows, wishes).tolist()
    assert [int(draw(rows[i : i + 1], [w])) for i, w in enumerate(wishes)] == together
    assert draw(rows.flip(0), wishes[::-1]).tolist() == together[::-1]
    monkeypatch.setattr(sampling, "MAX_ELEMENTS", V)  # a row at a time
    assert draw(rows, wishes).tolist() == together


def test_what_is_forbidden_never_comes() -> None:
    rows = scores(1, 50).masked_fill(torch.arange(50) % 5 != 0, -math.inf)
    for top_k, top_p in ((0, 1.0), (20, 1.0), (0, 0.99), (30, 0.5)):
        drawn = draw(rows.expand(500, 50), [DrawOptions(5.0, top_k, top_p, i, 0) for i in range(500)])
        assert {t % 5 for t in drawn.tolist()} == {0}
    one = scores(1, 50).masked_fill(torch.arange(50) != 7, -math.inf)
    assert [int(draw(one, [DrawOptions(1.0, k, p, 0, 0)])) for k, p in ((0, 1.0), (9, 1.0), (0, 0.5))] == [7, 7, 7]


def test_noise_is_gumbel_s_and_each_token_s_own() -> None:
    keys = torch.tensor([DrawOptions(1.0, 0, 1.0, seed, place).key for seed in range(8) for place in range(8)])
    keys, ids = keys.int(), torch.arange(10_000, dtype=torch.int32)[None]
    all_of_it = noise(keys, ids)
    assert torch.equal(noise(keys[3:5], ids[:, 77:99]), all_of_it[3:5, 77:99])
    n = all_of_it.numel()
    assert abs(float(all_of_it.mean()) - 0.577216) < 4 * (math.pi**2 / 6 / n) ** 0.5
    assert float(all_of_it.var()) == pytest.approx(math.pi**2 / 6, rel=0.02)
    assert bool(torch.isfinite(all_of_it).all())
    between = torch.corrcoef(all_of_it) - torch.eye(len(keys))
    assert float(between.abs().max()) < 0.055  # five and a half standard deviations, of 2,016 pairs
