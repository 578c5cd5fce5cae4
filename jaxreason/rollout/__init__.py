"""Generation with a key-value cache: `generate(model, prompts, Sampling(...))`."""

from jaxreason.rollout.engine import generate, prepare, run
from jaxreason.rollout.layer_stats import LayerStats
from jaxreason.rollout.requests import Completion, Delta, Request
from jaxreason.rollout.sampling import GREEDY, Sampling
from jaxreason.rollout.self_speculation import DraftStats, SelfSpeculation
from jaxreason.rollout.stats import Stats

__all__ = [
    "GREEDY",
    "Completion",
    "Delta",
    "DraftStats",
    "LayerStats",
    "Request",
    "Sampling",
    "SelfSpeculation",
    "Stats",
    "generate",
    "prepare",
    "run",
]
