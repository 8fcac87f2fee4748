"""Several recipes against a reference on one text: quality, size, load and speed side by side.

Composes loading, quality and bench; each model is loaded in a process of its own, so that peaks are true and nothing
of one recipe touches the next. Nothing here loads torch into the process that asks.
"""

from serve.evaluation.evaluation import Evaluation
from serve.evaluation.pareto import front
from serve.evaluation.result import Quality, Reference, Row
from serve.evaluation.setup import STORIES, Setup

__all__ = ["STORIES", "Evaluation", "Quality", "Reference", "Row", "Setup", "front"]
