"""Stage one: run a teacher once and cache its features in a Zarr store.

What users import is here: ``from pipeline import FeatureStore, load_spec``.
A name is imported when it is first used, so that ``import pipeline`` stays fast.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.build.build import build_store
    from pipeline.build.convert import Conversion, convert_store, make_conversion
    from pipeline.errors import PipelineError
    from pipeline.spec.cache_spec import CacheSpec, load_spec
    from pipeline.store.describe import describe_store
    from pipeline.store.reader import FeatureStore
    from pipeline.store.verify import verify_store
    from pipeline.structure import Sample, Structure

__all__ = [
    "CacheSpec",
    "Conversion",
    "FeatureStore",
    "PipelineError",
    "Sample",
    "Structure",
    "build_store",
    "convert_store",
    "describe_store",
    "load_spec",
    "make_conversion",
    "verify_store",
]

_MODULES = {
    "CacheSpec": "pipeline.spec.cache_spec",
    "Conversion": "pipeline.build.convert",
    "FeatureStore": "pipeline.store.reader",
    "PipelineError": "pipeline.errors",
    "Sample": "pipeline.structure",
    "Structure": "pipeline.structure",
    "build_store": "pipeline.build.build",
    "convert_store": "pipeline.build.convert",
    "describe_store": "pipeline.store.describe",
    "load_spec": "pipeline.spec.cache_spec",
    "make_conversion": "pipeline.build.convert",
    "verify_store": "pipeline.store.verify",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "__version__":
        return version("kd-train")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*__all__, "__version__"])
