"""Running the model's own code up to a block, the blocks before it replaced by what they gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsetrain.calibration.layers import Reached

Run = Callable[[Any], Any]


@dataclass(frozen=True)
class Block:
    """One block: its name in the model, and the name of the stack it is part of."""

    name: str
    stack: str


class Driver:
    """Runs the model's own code up to a block.

    Args:
        model: in eval mode.
        run: gives a batch to the model.
        blocks: in the order they are called.
    """

    def __init__(self, model: nn.Module, run: Run, blocks: Sequence[Block]) -> None:
        self.run = run
        self.blocks = list(blocks)
        self.modules = [model.get_submodule(block.name) for block in blocks]

    def reach(self, batch: Any, index: int, carried: Callable[[str], Any], meet: Callable[..., Any] | None) -> Any:
        """Run a batch up to the block at ``index``; blocks before it return ``carried(stack)``, and so does the block itself
        ``meet(forward, args, kwargs)``, which is returned.

        Beyond the last block the model runs to its end. ``meet`` None: stop where the block would be called.
        """
        outputs = {block.stack: carried(block.stack) for block in self.blocks[:index]}
        with ExitStack() as patched:
            for block, module in zip(self.blocks[:index], self.modules[:index], strict=True):
                patched.enter_context(with_forward(module, lambda *args, _stack=block.stack, **kwargs: outputs[_stack]))
            if index < len(self.blocks):
                module, original, met = self.modules[index], self.modules[index].forward, list[Any]()

                def here(*args: Any, **kwargs: Any) -> Any:
                    if meet is None:
                        raise Reached
                    met.append(meet(original, args, kwargs))
                    return met[-1]

                def stop(*_: Any) -> None:  # whoever listens to what the block gives (it may be a target itself) came first
                    raise Reached(met[-1])

                patched.enter_context(with_forward(module, here))
                patched.callback(module.register_forward_hook(stop).remove)
            try:
                self.run(batch)
            except Reached as reached:
                return reached.result
        return None


@contextmanager
def with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module do something else; one whose ``forward`` was replaced before gets that back."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
