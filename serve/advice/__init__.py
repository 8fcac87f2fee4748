"""Which recipe suits a memory, a device and a floor for quality: measured on the model at hand, with the evidence.

Composes evaluation and bench; decides by plain rules that it can state. Nothing here loads torch into the process that
asks.
"""

from serve.advice.advise import Advice, advise
from serve.advice.judge import Candidate, Verdict, judge
from serve.advice.target import DEVICES, Target

__all__ = ["DEVICES", "Advice", "Candidate", "Target", "Verdict", "advise", "judge"]
