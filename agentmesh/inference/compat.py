"""The versions of transformers that the engine is tested with, and what differs between them; no other file asks for a version.

transformers changes its continuous batching with every minor release. `make transformers` runs the engine's tests with the
oldest and the newest release of the range.
"""

import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from packaging.specifiers import SpecifierSet

from agentmesh.errors import ConfigError

TESTED_RANGE = ">=5.22,<5.25"  # as in the extra `local` of pyproject.toml


def require_tested_version(installed: str) -> None:
    """Go on if the engine is tested with this release of transformers.

    Raises:
        ConfigError: it is not; the hint installs one that is.
    """
    if not SpecifierSet(TESTED_RANGE).contains(installed, prereleases=True):
        raise ConfigError(
            f"transformers {installed} is installed, and the local engine is tested with {TESTED_RANGE}",
            hint=f"pip install 'transformers{TESTED_RANGE}'",
        )


require_tested_version(
    version("transformers")
)  # before the imports below fail on names that another release does not have

from transformers import AttentionInterface  # noqa: E402
from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402
from transformers.generation.continuous_batching import continuous_api  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

__all__ = (
    "ATTENTION_WRITES_CACHE",
    "LOOP_ARGUMENTS",
    "TESTED_RANGE",
    "ContinuousBatchingConfig",
    "continuous_api",
    "register_attention",
    "require_tested_version",
)

Attention = Callable[..., tuple[Any, Any]]

# Since 5.24 the loop sets torch's inference mode in its own thread, and takes whether to do so as an argument.
_LOOP_PARAMETERS = inspect.signature(continuous_api.ContinuousBatchingManager._run_generation_loop).parameters
LOOP_ARGUMENTS = {"use_inference_mode": True} if "use_inference_mode" in _LOOP_PARAMETERS else {}
# Before 5.24 a model hands its cache to the attention function, which writes the new keys and values into it.
ATTENTION_WRITES_CACHE = "cache" in inspect.signature(sdpa_attention_forward).parameters


def register_attention(name: str, attend: Attention) -> None:
    """Make an attention function known to transformers under a name.

    Args:
        attend: takes the keys and values that the cache answers, never the cache.
    """
    AttentionInterface.register(name, _with_cache(attend) if ATTENTION_WRITES_CACHE else attend)


def _with_cache(attend: Attention) -> Attention:
    def attend_through_cache(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *, cache: Any = None, **rest: Any
    ) -> tuple[Any, Any]:
        if cache is not None:  # `update` also writes into `rest`: the layer's own lengths
            key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=rest)
        return attend(module, query, key, value, attention_mask, **rest)

    return attend_through_cache
