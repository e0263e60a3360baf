"""Which layers a feature goes to: found by running the model, whatever its classes.

A graph read off autograd, as torch-pruning's (1.6), does not end on the rotary embeddings of Llama's attention, guesses which
dimension an unknown norm scales and has to be told of attention heads; what a run shows needs no rule for each class.

In a `World` layers that multiply make what they are told. So what changes in front of other layers, when output feature ``j``
of one layer is changed, is what only that feature reaches: through activations, sums, reshapes, pooling, and through attention,
whose every output depends on every entry of the same head's queries and keys.

The features of a layer are changed many at a time, by a code of constant weight: every feature changes in ``w`` of ``n`` copies
of the sample, each in others. A feature in front of another layer that changes in ``w`` copies depends on one output alone,
whose number is read off; two outputs would change it in more. Where several outputs reach one feature (heads) every output
is changed by itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.errors import TargetError
from sparsetrain.structure.layers import Layer, Loose
from sparsetrain.structure.recording import record
from sparsetrain.structure.replay import OUTPUT, Change, World, features_at

__all__ = ["OUTPUT", "Reach", "Tracer"]

#: At most so many copies of the sample at a time, and so many numbers in what a layer makes of them.
_COPIES, _NUMBERS = 256, 2**24
#: So many features are changed one by one, to see whether they reach what was read off.
_CONFIRM = 3


@dataclass
class Reach:
    """Where the features of one writer go: reader name -> pairs ``(writer feature, reader feature)``, int64 (2, pairs)."""

    pairs: dict[str, Tensor] = field(default_factory=dict)


class Tracer:
    """Asks a model which features reach which.

    Args:
        model: at rest (`calibration.rest.at_rest`).
        layers: as found by `find_layers`.
        run: gives a batch to the model.
        sample: a batch of one sample.

    Raises `TargetError` where the sample cannot be repeated.
    Example: ``Tracer(net, layers, net, images[:1]).reach(layers[0])``.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], run: Callable[[Any], Any], sample: Any) -> None:
        self.model = model
        self.recorded = record(model, layers, run, sample)
        #: Layers that are called, in their order.
        self.layers = self.recorded.layers
        self.order = {layer.name: number for number, layer in enumerate(self.layers)}
        try:
            self.worlds = [World(self.recorded, mirror=False), World(self.recorded, mirror=True)]
        except Exception:  # code that counts on certain numbers may fail in any way
            self.worlds = [World(self.recorded, mirror=False, real=True)]

    def reach(self, layer: Layer) -> Reach:
        """Where each output feature of a layer goes. Raises `TargetError` for samples that influence each other."""
        count = layer.outputs
        last = self._all(layer, count)
        watch = {name for places in last for name in places[1]}
        if not watch:
            return Reach()
        codes = _codes(count)
        few = torch.unique(torch.linspace(0, count - 1, min(count, _CONFIRM)).long())
        rows = torch.cat([codes, torch.nn.functional.one_hot(few, count).bool()])
        hits = self._rows(layer, rows, watch, [places[0] for places in last])
        found = _decoded({name: hit[: len(codes)] for name, hit in hits.items()}, codes)
        if found is None or not _confirmed({name: hit[len(codes) :] for name, hit in hits.items()}, few, found):
            found = self._one_by_one(layer, watch, [places[0] for places in last])
        return Reach(found)

    def spread(self, layer: Layer) -> set[str]:
        """Which layers anything that a layer makes reaches at all, whatever its features are."""
        return {name for _, names in self._all(layer, 1) for name in names}

    def reach_of_parameter(self, loose: Loose, dim: int) -> Reach | None:
        """Where each slice of a parameter goes, if every feature in front of a layer depends on one slice alone; else None."""
        codes = _codes(loose.parameter.shape[dim])
        rows = [self._parameter(loose, dim, code) for code in codes]
        widths = {name: hit.shape[1] for row in rows for name, hit in row.items()}
        hits = {
            name: torch.cat([row.get(name, torch.zeros(1, width, dtype=torch.bool)) for row in rows])
            for name, width in widths.items()
        }
        found = _decoded(hits, codes)
        return None if found is None else Reach(found)

    def touched_by(self, loose: Loose) -> dict[str, Tensor]:
        """Reader -> its features that a parameter goes into, whichever of its entries, int64."""
        everything = torch.ones(loose.parameter.shape[0], dtype=torch.bool)
        return {name: hit[0].nonzero().flatten() for name, hit in self._parameter(loose, 0, everything).items()}

    def mixes(self, layer: Layer) -> bool:
        """Whether a norm makes of one feature something that depends on the others, so that it notices when some are gone."""
        given = self.worlds[0].calls[layer.name][0].given[0]
        parameters = [layer.module.get_parameter(cut.name.rpartition(".")[2]) for cut in layer.writes if not cut.buffer]
        before = [parameter.data for parameter in parameters]
        axis = features_at(layer, given, layer.outputs)
        changed = given.clone()
        changed.select(axis, 0).add_(1 + 4 * float(given.abs().max()))
        try:
            for parameter in parameters:  # a weight of 0 would hide what comes before it
                parameter.data = torch.ones_like(parameter.data)
            then, now = layer.module.forward(given.clone()), layer.module.forward(changed)
        finally:
            for parameter, data in zip(parameters, before, strict=True):
                parameter.data = data
        least = max(1e-4, 4 * torch.finfo(then.dtype).eps) * (1 + float(then.abs().max()))
        return bool(((now - then).abs() > least).movedim(axis, 0)[1:].any())

    def adds(self, name: str, silent: Mapping[str, Tensor]) -> bool:
        """Whether what a layer makes is seen while other layers make 0 of some features, bool (features,): it is, if it is
        added to them, and is not, if they are multiplied with it."""
        layer = self.layers[self.order[name]]
        for world in self.worlds:
            try:
                quiet = World(self.recorded, world.sign < 0, world.real, silent)
                if quiet.probe(_everything(layer, self._alike(layer))).hits:
                    return True
            except Exception:  # code that counts on certain numbers may fail in any way
                return True
        return False

    # -- passes -----------------------------------------------------------------------------------------------------------

    def _alike(self, layer: Layer) -> bool:
        """Whether a layer makes one thing for all samples: then its features change one row at a time."""
        return any(None in call.made_axes for call in self.recorded.calls[layer.name])

    def _all(self, layer: Layer, count: int) -> list[tuple[int, set[str]]]:
        """In each world what is reached at all, and how far that is; a copy in which nothing changes must not notice."""
        alike, found = self._alike(layer), []
        for world in self.worlds:
            seen = world.probe(_everything(layer, alike, count))
            for reader, hit in seen.hits.items():
                if not alike and bool(hit[1].any()):
                    raise TargetError(
                        f"{reader} sees in one sample of a batch what {layer.name} makes in another: copies of the sample "
                        "cannot be told apart; give a batch whose dimension 0 counts samples, or take the module between "
                        "them as a whole (leave_out=[its name])"
                    )
            found.append((seen.latest, set(seen.hits)))
        return found

    def _rows(self, layer: Layer, rows: Tensor, watch: set[str], last: list[int]) -> dict[str, Tensor]:
        """Reader -> (rows, features): what changed, in any world, where the features of each row were changed."""
        hits: dict[str, Tensor] = {}
        for world, end in zip(self.worlds, last, strict=True):
            if self._alike(layer):
                each = [world.probe(Change(layer.name, row[None], True), watch, end).hits for row in rows]
            else:
                single = len(rows) == 1
                each = [world.probe(Change(layer.name, rows.repeat(2, 1) if single else rows), watch, end).hits]
                each = [{name: hit[:1] for name, hit in each[0].items()}] if single else each
            sizes = {name: hit.shape for part in each for name, hit in part.items()}
            for name, size in sizes.items():
                hit = torch.cat([part.get(name, torch.zeros(size, dtype=torch.bool)) for part in each])
                hits[name] = hits[name] | hit if name in hits else hit
        return hits

    def _one_by_one(self, layer: Layer, watch: set[str], last: list[int]) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {}
        eye = torch.eye(layer.outputs, dtype=torch.bool)
        largest = max(t.numel() for calls in self.recorded.calls.values() for call in calls for t in call.given) or 1
        copies = max(2, min(_COPIES, _NUMBERS // largest))
        for start in range(0, layer.outputs, copies):
            for reader, hit in self._rows(layer, eye[start : start + copies], watch, last).items():
                feature, other = hit.nonzero().unbind(1)
                parts.setdefault(reader, []).append(torch.stack([feature + start, other]))
        return {reader: torch.cat(pieces, 1) for reader, pieces in parts.items()}

    def _parameter(self, loose: Loose, dim: int, row: Tensor) -> dict[str, Tensor]:
        hits: dict[str, Tensor] = {}
        for world in self.worlds:
            for reader, hit in world.probe_parameter(loose.parameter, loose.name, dim, row).items():
                hits[reader] = hits[reader] | hit if reader in hits else hit
        return hits


def _everything(layer: Layer, alike: bool, count: int = 1) -> Change:
    """All that a layer makes changes in the first of two copies."""
    rows = torch.tensor([[True], [False]]).expand(2, count)
    return Change(layer.name, rows[:1] if alike else rows, alike)


def _codes(count: int) -> Tensor:
    """(n, count), bool: every column another choice of ``n // 2`` of ``n`` rows, with the least ``n`` that has enough."""
    rows = next(n for n in itertools.count(2) if math.comb(n, n // 2) >= count)
    chosen = torch.tensor(list(itertools.islice(itertools.combinations(range(rows), rows // 2), count)))
    return torch.zeros(rows, count, dtype=torch.bool).scatter_(0, chosen.T, True)


def _decoded(hits: dict[str, Tensor], codes: Tensor) -> dict[str, Tensor] | None:
    """The pairs that passes with `_codes` tell, or None where a feature depends on several."""
    found: dict[str, Tensor] = {}
    digits = 2 ** torch.arange(len(codes)).unsqueeze(1)
    number = {int(word): feature for feature, word in enumerate((codes * digits).sum(0))}
    for reader, hit in hits.items():
        features = hit.any(0).nonzero().flatten()
        words = (hit * digits).sum(0)[features].tolist()
        if any(word not in number for word in words):
            return None
        found[reader] = torch.stack([torch.tensor([number[word] for word in words], dtype=torch.int64), features])
    return found


def _confirmed(hits: dict[str, Tensor], few: Tensor, found: dict[str, Tensor]) -> bool:
    """A few features changed one by one must reach what was read off."""
    for reader in hits.keys() | found.keys():
        pairs = found.get(reader, torch.zeros(2, 0, dtype=torch.int64))
        for row, feature in enumerate(few):
            expected = torch.unique(pairs[1][pairs[0] == feature])
            got = hits[reader][row].nonzero().flatten() if reader in hits else expected[:0]
            if not torch.equal(expected, got):
                return False
    return True
