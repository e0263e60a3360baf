"""Structure: which slices of which tensors live and die together, and models that really shrink."""

from sparsetrain.structure.compaction import Compacted, compact, compact_again, remaining
from sparsetrain.structure.finding import find_structure
from sparsetrain.structure.groups import CoupledGroup, Slot, Structure
from sparsetrain.structure.masks import Coupled, CoupledManager, coupled_manager, dead_units, prune_units

__all__ = [
    "Compacted",
    "Coupled",
    "CoupledGroup",
    "CoupledManager",
    "Slot",
    "Structure",
    "compact",
    "compact_again",
    "coupled_manager",
    "dead_units",
    "find_structure",
    "prune_units",
    "remaining",
]
