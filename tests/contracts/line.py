"""A world small enough for the head: a walk on a line, one step left or right, until 2 is reached."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete


class Line(gymnasium.Env[Any, Any]):
    """From ``start``; action 1 goes ``stride`` to the right, 0 to the left; the reward is ``gain`` times where it leads."""

    def __init__(self) -> None:
        self.observation_space = Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = Discrete(2, start=5)  # actions are called 5 and 6
        self.start, self.stride, self.gain, self.spread = 0.0, 1.0, 1.0, 0.0
        self.flat = False

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.at = self.start + self.spread * float(self.np_random.uniform())
        return np.array([self.at]), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        self.at += self.stride if action == 6 else -self.stride
        return np.array([self.at]), self.gain * self.at, self.at >= 2, False, {}


LINE, ENDLESS = "sparsetrain-tests/Line-v0", "sparsetrain-tests/Endless-v0"
if LINE not in gymnasium.registry:
    gymnasium.register(LINE, entry_point=Line, max_episode_steps=4)
    gymnasium.register(ENDLESS, entry_point=Line)
