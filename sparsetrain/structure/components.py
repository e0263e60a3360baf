"""From who reaches whom to coupled groups: features are nodes of a graph, and what is connected lives and dies together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array  # type: ignore[import-untyped]
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]
from torch import Tensor

from sparsetrain.structure.groups import CoupledGroup, Kind, Slot, Structure
from sparsetrain.structure.layers import Cut, Layer, Loose
from sparsetrain.structure.tracing import OUTPUT, Reach, Tracer

#: Cut -> the slices of one unit.
_Parts = dict[Cut, list[int]]


class Components:
    """The components of a model's features, and what is cut with each.

    Args:
        tracer: of the model.
        loose: its loose parameters.

    Example: ``Components(tracer, loose).structure().groups``.
    """

    def __init__(self, tracer: Tracer, loose: Sequence[Loose]) -> None:
        self.tracer = tracer
        self.loose = loose
        self.names = {id(p): name for name, p in tracer.model.named_parameters()}
        self.parameters = dict(tracer.model.named_parameters(remove_duplicate=False))
        self.layers = {layer.name: self._canonical(layer) for layer in tracer.layers}
        self.first: dict[tuple[str, str], int] = {}
        self.total = 0
        for layer in self.layers.values():
            if layer.role == "multiply":
                self._add(layer.name, "in", layer.inputs)
            if layer.role in ("multiply", "embed"):
                self._add(layer.name, "out", layer.outputs)
        self.fixed: dict[int, str] = {}
        self.shared: dict[str, str] = {}
        #: Component -> cuts with their slices, of what its features go through.
        self.along: dict[int, list[tuple[Cut, int]]] = {}

    def _canonical(self, layer: Layer) -> Layer:
        """The layer with one name for each tied tensor."""

        def named(cuts: Iterable[Cut]) -> tuple[Cut, ...]:
            return tuple(cut if cut.buffer else replace(cut, name=self.names[id(self.parameters[cut.name])]) for cut in cuts)

        return replace(layer, reads=named(layer.reads), writes=named(layer.writes))

    def _add(self, name: str, side: str, count: int) -> None:
        self.first[name, side] = self.total
        self.total += count

    def structure(self) -> Structure:
        """Trace everything, then sort components into groups."""
        edges: list[Tensor] = list(self._ties())
        touched: list[tuple[Tensor, str]] = []
        passed: dict[str, list[Tensor]] = {}
        for layer in self.layers.values():
            if layer.role in ("multiply", "embed"):
                self._sort(layer, self.tracer.reach(layer), edges, touched, passed)
            elif layer.role == "opaque":
                touched += self._spread(layer)
        self.label = self._labelled(edges)
        for nodes, why in touched:
            self._fix(self.label[nodes], why)
        self._let_through(passed)
        for one in self.loose:
            self._attach_loose(one)
        return Structure(tuple(self._groups()), self.shared, tuple(self.tracer.recorded.unused))

    def _ties(self) -> Iterator[Tensor]:
        """Features of which tied layers have the same slices."""
        known: dict[tuple[str, int], tuple[str, str]] = {}
        for layer in self.layers.values():
            for side, cuts, count in (("in", layer.reads, layer.inputs), ("out", layer.writes, layer.outputs)):
                for cut in cuts if (layer.name, side) in self.first else ():
                    other = known.setdefault((cut.name, cut.dim), (layer.name, side))
                    if other != (layer.name, side):
                        each = torch.arange(count)
                        yield torch.stack([each + self.first[other], each + self.first[layer.name, side]])

    def _sort(
        self,
        layer: Layer,
        reach: Reach,
        edges: list[Tensor],
        touched: list[tuple[Tensor, str]],
        passed: dict[str, list[Tensor]],
    ) -> None:
        """Who reads features of a layer: another that multiplies, a norm they go through, or somebody nobody knows."""
        start = self.first[layer.name, "out"]
        for reader, pairs in reach.pairs.items():
            found = pairs + torch.tensor([[start], [0]])
            if (reader, "in") in self.first:
                edges.append(found + torch.tensor([[0], [self.first[reader, "in"]]]))
            elif reader in self.layers and self.layers[reader].writes:
                passed.setdefault(reader, []).append(found)
            else:
                end = reader.startswith(OUTPUT)
                touched.append((found[0], f"it is {OUTPUT}" if end else f"{reader} reads it, which nobody knows how to cut"))

    def _spread(self, layer: Layer) -> Iterator[tuple[Tensor, str]]:
        """Everything in front of layers that one reaches which nobody knows how to cut."""
        for reader in self.tracer.spread(layer):
            if (reader, "in") in self.first:
                nodes = torch.arange(self.layers[reader].inputs) + self.first[reader, "in"]
                yield nodes, f"{layer.name} makes it, which nobody knows how to cut"

    def _labelled(self, edges: Sequence[Tensor]) -> Tensor:
        if not edges:
            return torch.arange(self.total)
        a, b = torch.cat(list(edges), 1).numpy()
        graph = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(self.total, self.total))
        return torch.from_numpy(connected_components(graph, directed=False)[1].astype(np.int64))

    def _fix(self, components: Tensor, why: str) -> None:
        for component in torch.unique(components).tolist():
            self.fixed.setdefault(component, why)

    # -- what goes along --------------------------------------------------------------------------------------------------

    def _let_through(self, passed: dict[str, list[Tensor]]) -> None:
        """Norms and grouped convolutions lose entries with the features that go through them."""
        tied: dict[str, str] = {}
        together: dict[str, list[Tensor]] = {}
        for name, found in passed.items():
            first = tied.setdefault(self.layers[name].writes[0].name, name)
            together.setdefault(first, []).extend(found)
            if self.layers[name].role == "scale" and self.tracer.mixes(self.layers[name]):
                self._fix(
                    self._partial(name, torch.cat(found, 1)),
                    f"{name} normalizes over all of it, and would compute something else",
                )
        for name, found in together.items():
            pairs = torch.cat(found, 1)
            self._attach(name, self.layers[name].writes, pairs[1], self.label[pairs[0]])

    def _partial(self, name: str, pairs: Tensor) -> Tensor:
        """Components that own some entries of a layer; those that own all (the norm of one head) leave none behind."""
        owned = torch.unique(torch.stack([self.label[pairs[0]], pairs[1]]), dim=1)[0]
        components, entries = torch.unique(owned, return_counts=True)
        some: Tensor = components[entries < self.layers[name].outputs]
        return some

    def _attach(self, name: str, cuts: Sequence[Cut], features: Tensor, owners: Tensor) -> bool:
        """Let slices of a tensor go with the components that own them; False if several components own one."""
        pairs = torch.unique(torch.stack([features, owners]), dim=1)
        if len(torch.unique(pairs[0])) < pairs.shape[1]:
            self.shared[name] = "several groups go through the same entries of it"
            return False
        for feature, component in pairs.T.tolist():
            self.along.setdefault(component, []).extend((cut, feature) for cut in cuts)
        return True

    def _attach_loose(self, one: Loose) -> None:
        cut, name = False, self.names[id(one.parameter)]
        for dim in range(one.parameter.ndim):
            reach = self.tracer.reach_of_parameter(one, dim) if one.parameter.shape[dim] > 1 else None
            read = (
                [] if reach is None else [(p, self.first[n, "in"]) for n, p in reach.pairs.items() if (n, "in") in self.first]
            )
            if read:
                features = torch.cat([pairs[0] for pairs, _ in read])
                owners = self.label[torch.cat([pairs[1] + start for pairs, start in read])]
                cut |= self._attach(name, [Cut(name, dim)], features, owners)
        if cut:
            self.shared.pop(name, None)
            return
        for reader, features in self.tracer.touched_by(one).items():
            self.shared.setdefault(name, "nobody knows along which dimension it would be cut")
            if (reader, "in") in self.first:
                owners = self.label[features + self.first[reader, "in"]]
                self._fix(owners, f"{name} goes into it, which nobody knows how to cut")

    # -- groups -----------------------------------------------------------------------------------------------------------

    def _groups(self) -> Iterator[CoupledGroup]:
        """Components whose members are the same cuts, as often, are units of one group."""
        slices, writers, readers = self._members()
        families: dict[Any, list[int]] = {}
        for component, parts in slices.items():
            if component in writers and component not in readers:
                self.fixed.setdefault(component, "nothing that the model returns depends on it")
            key = (tuple((cut, len(index)) for cut, index in parts.items()), self.fixed.get(component, ""))
            families.setdefault(key, []).append(component)
        taken: dict[str, int] = {}
        for (shape, fixed), components in families.items():
            made, read = writers.get(components[0], {}), readers.get(components[0], {})
            base = next(iter(made)) if made else f"{min(read, key=lambda n: self.tracer.order[n])}.inputs"
            taken[base] = taken.get(base, 0) + 1
            name = base if taken[base] == 1 else f"{base}#{taken[base]}"
            slots = [
                Slot(cut.name, cut.dim, torch.tensor([slices[c][cut] for c in components]), cut.buffer) for cut, _ in shape
            ]
            yield CoupledGroup(name, self._kind(components, made, read), len(components), tuple(slots), fixed)

    def _members(self) -> tuple[dict[int, _Parts], dict[int, dict[str, int]], dict[int, dict[str, int]]]:
        """Component -> its slices; and the layers that make it and that read it, with how many features of each."""
        slices: dict[int, dict[Cut, dict[int, None]]] = {}
        sides: dict[str, dict[int, dict[str, int]]] = {"in": {}, "out": {}}
        for layer in self.layers.values():
            for side, cuts, count in (("in", layer.reads, layer.inputs), ("out", layer.writes, layer.outputs)):
                start = self.first.get((layer.name, side))
                if start is None:
                    continue
                for feature, component in enumerate(self.label[start : start + count].tolist()):
                    for cut in cuts:
                        slices.setdefault(component, {}).setdefault(cut, {})[feature] = None
                    features = sides[side].setdefault(component, {})
                    features[layer.name] = features.get(layer.name, 0) + 1
        for component, found in self.along.items():
            for cut, feature in found:
                slices[component].setdefault(cut, {})[feature] = None
        lists = {component: {cut: list(index) for cut, index in parts.items()} for component, parts in slices.items()}
        return lists, sides["out"], sides["in"]

    def _kind(self, components: Sequence[int], made: dict[str, int], read: dict[str, int]) -> Kind:
        if not made:
            return "input"
        convolution = self.layers[next(iter(made))].axis == 1
        several = max(read.values(), default=1) > 1
        if (convolution or not several) and self._is_added_to(components, made, read):
            return "residual"
        return "filter" if convolution else "head" if several else "neuron"

    def _is_added_to(self, components: Sequence[int], made: dict[str, int], read: dict[str, int]) -> bool:
        """Whether a layer adds to the features after another has read them; a gate (squeeze and excitation) scales them."""
        order, mine, calls = self.tracer.order, torch.tensor(components), self.tracer.recorded.calls
        first = min((order[name] for name in read), default=len(order))
        for later in made:
            if order[later] < first or (order[later] == first and len(calls[later]) > 1):  # it reads what it made itself
                continue
            earlier = [name for name in made if order[name] < order[later]]
            silent = {n: torch.isin(self._labels(n, "out"), mine) for n in earlier}
            if self.tracer.adds(later, silent):
                return True
        return False

    def _labels(self, name: str, side: str) -> Tensor:
        """The component of each feature that a layer reads or makes."""
        start, layer = self.first[name, side], self.layers[name]
        return self.label[start : start + (layer.inputs if side == "in" else layer.outputs)]
