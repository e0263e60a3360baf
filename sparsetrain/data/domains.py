"""Domains that come one after the other: a data module of data modules, one of which is the trainer's at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningDataModule

from sparsetrain.data.tokenized import TokenizedData
from sparsetrain.errors import DataError, nearest


class DomainSequence(LightningDataModule):
    """Data modules by name, in an order; `enter` says whose loaders a trainer is given from now on.

    Args:
        domains: name -> data module, of one kind (text or images) and one vocabulary; each with its own train, validation and
            test data. Calibration looks at its training batches.
        order: the names that are there now, in the order they come; by default all as written. Others may arrive later:
            `append`, or the same recipe with a longer order.
        weights: name -> weight of a domain's statistics where they are added up (`ContinualPruning`), above 0; 1 if not named.

    Raises:
        DataError: from the constructor for no domains, an unknown or repeated name, another kind, or tokenizers that do not
            agree; from ``setup`` what a domain raises, naming it, and for images of another shape.

    Example::

        sequence = DomainSequence({"news": TextData("news.txt"), "law": TextData("law")})
        for name in sequence:
            sequence.enter(name)
            Trainer(callbacks=[method]).fit(model, sequence)
    """

    def __init__(
        self,
        domains: dict[str, LightningDataModule],
        order: list[str] | None = None,
        weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        if not domains:
            raise DataError("domains is empty; name at least one: {news: {class_path: TextData, ...}}")
        self.domains = dict(domains)
        self.names = list(domains) if order is None else list(order)
        for name in self.names:
            if name not in self.domains:
                raise DataError(f"order names {name!r}, which is no domain.{nearest(name, self.domains)}")
            if self.names.count(name) > 1:
                raise DataError(f"order names {name!r} twice; a domain comes once")
        if not self.names:
            raise DataError("order is empty; name the domains in the order they come, or leave it out")
        self.weights = dict.fromkeys(self.domains, 1.0) | (weights or {})
        for name, weight in self.weights.items():
            if name not in self.domains or not 0 < weight < float("inf"):
                raise DataError(
                    f"weights has {name!r}: {weight}; positive numbers by name of a domain ({', '.join(self.domains)})"
                )
        for name in self.names[1:]:
            _require_kin(self.names[0], self.domains[self.names[0]], name, self.domains[name])
        for name in self.names:
            _require_shared(name, self.domains[name])
        self.current = 0

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, domain: str | int) -> LightningDataModule:
        """A domain's data module by name or place; raises `DataError` for one that is not in the sequence."""
        return self.domains[self.names[self._place(domain)]]

    @property
    def domain(self) -> str:
        """The name of the domain at hand."""
        return self.names[self.current]

    @property
    def weight(self) -> float:
        """The weight of the domain at hand."""
        return self.weights[self.domain]

    def enter(self, domain: str | int) -> None:
        """Its loaders are the trainer's from now on. Raises `DataError` for one that is not in the sequence."""
        self.current = self._place(domain)

    def append(self, name: str, data: LightningDataModule, weight: float = 1.0) -> None:
        """One more domain has arrived. Raises `DataError` for a name that is taken, and as the constructor does.

        Example: ``sequence.append("code", TextData("python"))``.
        """
        if name in self.names:
            raise DataError(f"domain {name!r} is in the sequence already ({', '.join(self.names)}); give another name")
        _require_kin(self.names[0], self.domains[self.names[0]], name, data)
        _require_shared(name, data)
        self.domains[name] = data
        self.weights[name] = weight
        self.names.append(name)

    def _place(self, domain: str | int) -> int:
        if isinstance(domain, str) and domain in self.names:
            return self.names.index(domain)
        if isinstance(domain, int) and 0 <= domain < len(self.names):
            return domain
        raise DataError(f"{domain!r} is no domain of this sequence: {', '.join(self.names)}.{nearest(str(domain), self.names)}")

    # -- what a trainer asks for, of the domain at hand -------------------------------------------------------------------

    @property
    def _here(self) -> LightningDataModule:
        data = self.domains[self.domain]
        data.trainer = self.trainer
        return data

    def prepare_data(self) -> None:
        """Of the domain at hand."""
        self._here.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Of the domain at hand; what it raises names it."""
        try:
            self._here.setup(stage)  # type: ignore[arg-type]
        except DataError as error:
            raise DataError(f"domain {self.domain!r}: {error}") from error
        self._require_shape()

    def _require_shape(self) -> None:
        """Raise unless images are of the shape the other domains have."""
        shapes = {name: getattr(self.domains[name], "image_shape", None) for name in self.names}
        known = {name: tuple(shape) for name, shape in shapes.items() if shape is not None and any(shape)}
        other = next((name for name in known if known[name] != known.get(self.domain, known[name])), None)
        if other is not None:
            raise DataError(
                f"domain {self.domain!r} has images of shape {known[self.domain]}, {other!r} of {known[other]}: one model "
                "takes one shape; resize them (VisionData: image_size)"
            )

    def teardown(self, stage: str) -> None:
        """Of the domain at hand."""
        self._here.teardown(stage)

    def train_dataloader(self) -> Any:
        """Training batches of the domain at hand."""
        return self._here.train_dataloader()

    def val_dataloader(self) -> Any:
        """Validation batches of the domain at hand."""
        return self._here.val_dataloader()

    def test_dataloader(self) -> Any:
        """Test batches of the domain at hand."""
        return self._here.test_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """As the domain at hand does it."""
        return self._here.transfer_batch_to_device(batch, device, dataloader_idx)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """As the domain at hand does it."""
        return self._here.on_before_batch_transfer(batch, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """As the domain at hand does it."""
        return self._here.on_after_batch_transfer(batch, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        """Which domain is at hand, and where in its data training is."""
        return {"domain": self.domain, "state": self._here.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on there; the domain has been entered. Raises `DataError` for the checkpoint of another domain."""
        if state_dict.get("domain") != self.domain:
            raise DataError(
                f"the checkpoint was written in domain {state_dict.get('domain')!r}, and {self.domain!r} is at hand; enter the "
                "domain first"
            )
        self._here.load_state_dict(state_dict["state"])


def _require_kin(first: str, one: LightningDataModule, second: str, other: LightningDataModule) -> None:
    """Raise `DataError` unless two domains can be fed to one model."""
    if type(one) is not type(other):
        raise DataError(
            f"domain {first!r} is {type(one).__name__} and {second!r} {type(other).__name__}: one model reads one kind of "
            "data; give domains of one class"
        )
    if isinstance(one, TokenizedData) and isinstance(other, TokenizedData) and one.tokenizer_name != other.tokenizer_name:
        raise DataError(
            f"domain {first!r} is read by tokenizer {one.tokenizer_name!r} and {second!r} by {other.tokenizer_name!r}: the "
            "same number would be another word; name the model's own tokenizer in both"
        )


def _require_shared(name: str, data: LightningDataModule) -> None:
    """Raise `DataError` for a domain that would train a tokenizer of its own, even if no other has come yet."""
    if isinstance(data, TokenizedData) and data.tokenizer_name.startswith("bpe:"):
        raise DataError(
            f"domain {name!r} would train a tokenizer {data.tokenizer_name!r} of its own, and in that of another domain the "
            "same number is another word. Name the folder of one that is trained (a run's tokenizer/), or 'bytes'"
        )
