"""The embedded model, `builtin:storyteller`: a small Llama that tells short English stories.

`PATH` is an ordinary Hugging Face checkpoint folder, `CALIBRATION` a JSONL of stories to calibrate it on.
Importing this package imports neither torch nor transformers; the modules beside it (`train`, `evaluate`,
...) made the checkpoint.
"""

from pathlib import Path

__all__ = ["CALIBRATION", "PATH"]

PATH = Path(__file__).parent / "checkpoint"
CALIBRATION = Path(__file__).parent / "calibration.jsonl"
