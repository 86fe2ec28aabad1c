"""draftkit: train, measure and serve drafters for speculative decoding.

`from draftkit import LLM, SamplingParams` gives the engine for Python programs. Both are loaded when they are
asked for: `import draftkit` alone imports no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftkit.engine.sampling_params import SamplingParams
    from draftkit.engine.settings import EngineSettings
    from draftkit.serve.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "EngineSettings", "SamplingParams", "__version__"]

_PLACES = {
    "LLM": "draftkit.serve.llm",
    "SamplingParams": "draftkit.engine.sampling_params",
    "EngineSettings": "draftkit.engine.settings",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'draftkit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)
