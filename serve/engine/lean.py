"""Import it before transformers' models: it leaves out what they would load and nothing here calls.

Their losses for object detection load SciPy wherever that is installed (test tools bring it): 35 MB of every replica.
"""

import transformers.utils

__all__: list[str] = []

transformers.utils.is_scipy_available = lambda: False  # type: ignore[attr-defined]
