"""Sampling from the policy: engines behind one protocol, and what they return."""

from lightning_align.rollout.engine import Engine, build_engine
from lightning_align.rollout.hf import GenerateEngine
from lightning_align.rollout.static import StaticCacheEngine
from lightning_align.rollout.types import Experience, Rollout, SamplingParams

__all__ = [
    "Engine",
    "Experience",
    "GenerateEngine",
    "Rollout",
    "SamplingParams",
    "StaticCacheEngine",
    "build_engine",
]
