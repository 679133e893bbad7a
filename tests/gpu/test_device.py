"""What only a GPU can show; the rest of `pytest -m gpu` are the CPU's own tests, with the model on the device."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentmesh.inference import attention, kernels
from agentmesh.inference.batching import Shape
from agentmesh.inference.device import lock_of
from agentmesh.inference.engine import InferenceEngine
from agentmesh.inference.kernels import Heads, difference, page_difference
from agentmesh.inference.request import InferenceRequest
from agentmesh.rag.embedders.encoder import Encoder
from agentmesh.testing.tiny_models import make_model, save_encoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device is here, for these and all others of -m gpu"
    ),
]
WAIT_S = 60
CUDA = torch.device("cuda")
SHAPES = [
    Heads(32, 8, 64), Heads(32, 8, 128), Heads(32, 32, 80), Heads(16, 8, 256), Heads(9, 3, 64, window=4096),
    Heads(8, 4, 256, window=4096, softcap=50.0), Heads(64, 8, 64, window=128, sinks=True),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_our_attention_is_right_here_and_torch_s_where_it_says_it_is(heads: Heads, dtype: torch.dtype) -> None:
    told = {k.name: difference(k, heads, CUDA, dtype) or "right" for k in kernels.kernels(CUDA)}
    pages = {k.name: page_difference(k, heads, 256, CUDA, dtype) or "right" for k in kernels.kernels(CUDA) if k.pages}
    print(f"{heads} {dtype}: {told}, pages: {pages}")
    assert told[attention.PAGED_NAME] == "right"
    if dtype is not torch.float32 and torch.cuda.get_device_capability() >= (8, 0) and kernels.varlen_attn is not None:
        assert told[kernels.VARLEN_NAME] == "right"


def test_sixteen_bit_models_get_a_flash_kernel() -> None:
    engine = InferenceEngine(make_model(dtype=torch.bfloat16).to(CUDA), Shape(pages=80, page_tokens=256))
    try:
        chosen = engine._batching.attention
        assert (chosen == attention.PAGED_NAME) == (torch.cuda.get_device_capability() < (8, 0))
        asked = [InferenceRequest(tuple(range(5, 9 + 3 * i)), 24) for i in range(24)]
        together = [f.result(WAIT_S).tokens for f in [engine.submit(r) for r in asked]]
        assert [len(t) for t in together] == [24] * 24
    finally:
        engine.close()


def test_memory_that_really_runs_out_halves_the_batch() -> None:
    model: Any = make_model().to("cuda")
    forward, free = model.forward, torch.cuda.mem_get_info()[0]

    def hungry(*args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].shape[1] > 16:
            torch.empty(2 * free, dtype=torch.uint8, device="cuda")
        return forward(*args, **kwargs)

    model.forward = hungry
    engine = InferenceEngine(model, Shape(pages=64, page_tokens=16, batch_tokens=64))
    try:
        assert len(engine.submit(InferenceRequest((5,) * 60, 4)).result(WAIT_S).tokens) == 4
        assert (engine._batching.shape.batch_tokens, engine.gauge.deaths) == (16, 2)
    finally:
        engine.close()


def test_an_encoder_says_what_it_needs_and_embeds_as_on_a_cpu(tmp_path: Path) -> None:
    here, there = (Encoder(str(save_encoder(tmp_path / d)), device=d) for d in ("cuda", "cpu"))
    here.prepare()
    assert lock_of("cuda:0").reserved_bytes > 0
    engine = InferenceEngine(make_model().to(CUDA), Shape(page_tokens=16))
    try:
        said = engine.submit(InferenceRequest((5,) * 9, 200))
        texts = ["word " * (1 + i % 9) for i in range(400)]
        assert (np.einsum("nd,nd->n", here.documents(texts), there.documents(texts)) > 0.999).all()
        assert len(said.result(WAIT_S).tokens) == 200
    finally:
        engine.close()
        lock_of("cuda:0").reserved_bytes = 0
