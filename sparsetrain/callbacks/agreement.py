"""What a method asks for against what the ready manager has that it is given: said twice, it must be the same."""

from __future__ import annotations

from sparsetrain.errors import PatternError
from sparsetrain.masks import MaskManager
from sparsetrain.patterns import Unstructured
from sparsetrain.targets import Targets


def require_agreement(method: object, manager: MaskManager) -> None:
    """Raise where this method's own pattern, targets or overrides say something else than the manager it is given."""
    me, options = type(method).__name__, vars(method)
    pattern, targets = options.get("pattern"), options.get("targets")
    patterns = sorted({str(tensor.pattern) for tensor in manager})
    if pattern is not None and pattern != Unstructured() and str(pattern) not in patterns:
        problem = f"is asked for pattern {pattern}, and its manager has {', '.join(patterns)}"
    elif targets and targets != Targets() and {t.name for t in targets.match(manager.model).targets} != set(manager.tensors):
        problem = f"is asked for {targets}, which are not the targets of its manager"
    elif options.get("overrides"):
        problem = f"has overrides ({', '.join(options['overrides'])}), which its manager knows nothing of"
    else:
        return
    raise PatternError(f"{me} {problem}; say it once: MaskManager(model, targets, pattern, overrides)")
