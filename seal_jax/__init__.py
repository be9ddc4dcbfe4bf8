"""SEAL, Self-Adapting Language Models (arXiv 2506.10943), as pure functions in JAX."""

__version__ = "0.1.0"
