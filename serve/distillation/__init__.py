"""How a small model learns from a large one: a student cut out of its teacher, or pruned step by step, then distilled.

What comes out is an ordinary checkpoint. Knows torch, compression and quality; knows no server. Importing this package
loads no torch: `distill` and `gradual` are imported by whoever runs them.
"""

from serve.distillation.settings import Settings

__all__ = ["Settings"]
