"""transformers' continuous batching, with our sampler, our clock and our thread; no other file touches its manager.

What differs between the releases it is tested with is in `compat.py`.
"""

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig

from agentmesh.inference.compat import LOOP_ARGUMENTS, ContinuousBatchingConfig, continuous_api
from agentmesh.inference.device import lock_of
from agentmesh.inference.kernels import choose
from agentmesh.inference.request import Gauge, Room
from agentmesh.inference.sampling import Sampler

logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # the engine logs the same errors

_Manager: Any = continuous_api.ContinuousBatchingManager
GIB = 2**30
CPU_CACHE_BYTES = GIB
CPU_CONTEXTS = 4  # prompts of the model's whole context that a CPU's cache holds, where CPU_CACHE_BYTES suffice
STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class Shape:
    """How large an engine is. A 0 is replaced: by the device's memory, or on a CPU by the model's context.

    Args:
        memory: the part of the device's free memory that the cache may take, in (0, 1].
        batch_tokens: new tokens of one step, prompts' and answers' together.
        batch_requests: requests of one step.
        attention: transformers' name of one, for comparisons; "" is the best one that passes its check.
    """

    pages: int = 0
    page_tokens: int = 0
    batch_tokens: int = 0
    batch_requests: int = 0
    memory: float = 0.85
    attention: str = ""


class Batching(_Manager):  # type: ignore[misc]  # our sampler is not of the type that it declares
    """A loop over one model: requests in, outputs on `outputs`. Any exception ends it, and the engine makes another."""

    def __init__(self, model: Any, shape: Shape, sampler: Sampler) -> None:
        self._sampler = sampler
        self.shape = _fill_in(model, shape)
        self.stepped_s = time.monotonic()
        self.idle = True
        self._device_lock, self._step_stack = lock_of(str(model.device)), contextlib.ExitStack()
        on_cpu = model.device.type == "cpu"
        self.attention, pages = choose(model, self.shape.page_tokens, shape.attention)
        config = ContinuousBatchingConfig(
            page_size=self.shape.page_tokens,
            num_blocks=self.shape.pages or None,
            max_batch_tokens=self.shape.batch_tokens,
            max_requests_per_batch=self.shape.batch_requests,
            max_memory_percent=0.9 if on_cpu else _share(model.device, shape.memory, self._device_lock.reserved_bytes),
            use_async_batching=False,  # the sampler needs the last token before it allows the next
            use_cuda_graph=False,
            auto_switch_to_flash=False,  # it would look for kernels on a hub
            max_blocks_per_request=None if pages else 0,
        )
        # -1: the end tokens are each request's own
        plain = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)  # type: ignore[no-untyped-call]
        super().__init__(model, plain, config)
        self.logit_processor = sampler

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Nothing: `choose` has set the attention."""

    def start(self) -> None:
        """Start the loop in a daemon thread, so that a forgotten engine does not keep its process alive."""
        self.background_thread_status.clear()
        self._device_lock.engines.add(self)
        self._generation_thread = threading.Thread(target=self._run, daemon=True, name="agentmesh-engine")
        self._generation_thread.start()

    def _run(self) -> None:
        with torch.inference_mode():  # it is a thread's own
            self._run_generation_loop(**LOOP_ARGUMENTS)

    def room(self) -> Room:
        """What the cache holds; waits until the loop has made it.

        Raises:
            Exception: what ended the loop before that.
        """
        while self.batch_processor is None:
            self._generation_thread.join(0.005)
            if not self._generation_thread.is_alive() and self.batch_processor is None:
                raise self.error
        config, cache = self.model.config.get_text_config(), self.batch_processor.cache
        pages = cache.num_blocks
        return Room(
            pages * self.shape.page_tokens, self.shape.page_tokens, int(config.max_position_embeddings),
            int(self.model.get_input_embeddings().num_embeddings),
        )  # fmt: skip

    @property
    def error(self) -> Exception:
        """What ended the loop."""
        return self.background_thread_status.fatal_error or RuntimeError("the loop ended")

    @property
    def held_s(self) -> float:
        """Seconds for which the device's lock has been held; 0 where it is free."""
        return self._device_lock.held_s

    def outputs(self, timeout_s: float) -> list[Any]:
        """The library's outputs since the last call; waits for the first of them."""
        arrived: list[Any] = []
        with contextlib.suppress(queue.Empty):
            arrived.append(self.output_router.output_queue.get(timeout=timeout_s))
            while True:
                arrived.append(self.output_router.output_queue.get_nowait())
        return arrived

    def begin(self, name: str, tokens: Sequence[int], most_tokens: int, ends: Sequence[int], *, tell: bool) -> bool:
        """Add a request; False where the loop accepts none any more.

        Args:
            tell: an output after each step, not only at the end.
        """
        ends = list(ends) or [-1]
        state = self.add_request(
            list(tokens), request_id=name, max_new_tokens=most_tokens, streaming=tell, eos_token_id=ends
        )
        return state is not None

    def gauge(self, deaths: int) -> Gauge:
        """Its state and counts; read from another thread than the loop's, so that they may be a step old."""
        processor, waiting, pages, free = self.batch_processor, self.input_queue.qsize(), 0, 0
        if processor is not None:
            waiting += len(processor.scheduler.waiting_requests)
            pages, free = processor.cache.num_blocks, _free_pages(processor.cache)
        return self._sampler.gauge(
            pages=pages, free_pages=free, waiting=waiting, idle=self.idle, stepped_s=self.stepped_s, deaths=deaths
        )

    def end(self) -> None:
        """Stop now; what is in flight fails. The library's `stop` collects garbage twice, a second in a large process."""
        self.background_thread_status.request_stop(continuous_api.BackgroundThreadStatus.HARD_STOP, 0)
        self._wake_up_loop.set()
        self._generation_thread.join(STOP_S)
        self._device_lock.engines.discard(self)
        self.batch_processor = None
        error: BaseException | None = self.background_thread_status.fatal_error
        while error is not None:  # its frames hold the old cache, and a GPU has no memory for two
            error.__traceback__, error = None, error.__context__

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:
        with contextlib.ExitStack() as self._step_stack:
            continues = bool(super()._generation_loop_body(batch_processor, bootstrapping))
        # a request that was cancelled at once: the loop may read its cancellation before the request itself
        for name in self._sampler.cancelled:
            self.cancel_request(name)
        self._sampler.cancelled.clear()
        self.stepped_s = time.monotonic()
        self.idle = not batch_processor.has_pending_requests() and self.input_queue.empty()
        return continues

    def _generation_step(self) -> None:
        # held until the tokens are on the host; the preparation before runs beside an encoder's batch
        self._step_stack.enter_context(self._device_lock.step())
        processor: Any = self.batch_processor
        if (stream := processor.inputs_and_outputs.compute_stream) is not None:
            # the library writes the inputs on another stream, and does not wait for the last of them
            stream.wait_stream(torch.cuda.current_stream(self.model.device))
        super()._generation_step()


def _free_pages(cache: Any) -> int:
    """Pages that no request holds, among them those that are cached for prompts with the same beginning."""
    free = 0
    for allocator in cache.cache_allocators.values():
        free += cache.pool.count_free_blocks(allocator.index) + len(allocator.ledger.cached_blocks)
    per_sector = min(allocator.blocks_per_sector for allocator in cache.cache_allocators.values())
    return int(free + cache.pool.num_free_sectors * per_sector)


def _share(device: Any, memory: float, reserved_bytes: int) -> float:
    """The part of a GPU's free memory that the cache may take beside an encoder's largest batch.

    Raises:
        MemoryError: nothing would be left.
    """
    if not reserved_bytes:
        return memory
    torch.cuda.empty_cache()  # as the library does before it counts
    free_bytes, _ = torch.cuda.mem_get_info(device)
    if free_bytes <= reserved_bytes:
        raise MemoryError(
            f"{free_bytes / GIB:.1f} GiB of the GPU are free, and the encoder needs {reserved_bytes / GIB:.1f} GiB of them"
        )
    return memory * (1 - reserved_bytes / free_bytes)


def _fill_in(model: Any, shape: Shape) -> Shape:
    """The shape with numbers in place of its zeros, but for a GPU's pages."""
    if model.device.type != "cpu":
        return replace(
            shape, page_tokens=shape.page_tokens or 256, batch_tokens=shape.batch_tokens or 2048,
            batch_requests=shape.batch_requests or 256,
        )  # fmt: skip
    config, page = model.config.get_text_config(), shape.page_tokens or 32
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads
    token_bytes = (
        2 * config.num_hidden_layers * heads * (getattr(config, "head_dim", None) or width) * model.dtype.itemsize
    )
    tokens = min(CPU_CONTEXTS * config.max_position_embeddings, CPU_CACHE_BYTES // token_bytes)
    return replace(
        shape, page_tokens=page, pages=shape.pages or math.ceil(tokens / page) + 1, batch_tokens=shape.batch_tokens or 256,
        batch_requests=shape.batch_requests or 64,
    )  # fmt: skip
