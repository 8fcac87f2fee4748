"""Several variants side by side on live traffic, and a report of what each of them gave. Pure: no clock, no network,
no Ray, no torch. What decides and moves traffic is `serve.rollout`, whose split, outcomes and statistics are used here.
"""

from serve.experiment.experiment import Experiment, State
from serve.experiment.intervals import Interval
from serve.experiment.laboratory import Laboratory, Shelf
from serve.experiment.plan import Plan, plan_for
from serve.experiment.report import Facts, report
from serve.experiment.tally import Tally

__all__ = ["Experiment", "Facts", "Interval", "Laboratory", "Plan", "Shelf", "State", "Tally", "plan_for", "report"]
