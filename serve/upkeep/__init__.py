"""What a replica takes of its machine while it serves: energy, and memory by component. Knows no server, no model."""

from serve.upkeep.energy import Energy
from serve.upkeep.upkeep import Upkeep

__all__ = ["Energy", "Upkeep"]
