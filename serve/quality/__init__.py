"""How far a variant is from the reference: perplexity, divergence, accuracy, each with its uncertainty.

Knows torch and models that give logits; knows no server, and nothing of how a variant came to be.
"""

from serve.quality.accuracy import Accuracy
from serve.quality.divergence import Divergence, Percentiles, TokenScores, compare, score_rows
from serve.quality.logits import LogitSource, StoredLogits, model_logits
from serve.quality.perplexity import Perplexity, perplexity
from serve.quality.text import read_texts, tokenize

__all__ = [
    "Accuracy",
    "Divergence",
    "LogitSource",
    "Percentiles",
    "Perplexity",
    "StoredLogits",
    "TokenScores",
    "compare",
    "model_logits",
    "perplexity",
    "read_texts",
    "score_rows",
    "tokenize",
]
