"""Domains in a sequence: whose loaders a trainer gets, what cannot stand beside each other; and the matrix of a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule

from sparsetrain.continual.matrix import ContinualMatrix, continual_metrics, reference_metrics
from sparsetrain.data import DomainSequence, TextData, VisionData
from sparsetrain.errors import DataError
from sparsetrain.report.domains import domain_facts, domains_plot


def text(source: str = "shakespeare", **options: Any) -> TextData:
    return TextData(source, **{"tokenizer": "bytes", "window": 32, "batch_size": 4, "limit": 8} | options)


def sequence(**options: Any) -> DomainSequence:
    return DomainSequence({"drama": text(), "law": text("law"), "code": text("python")}, **options)


def test_the_domain_that_was_entered_is_the_trainers() -> None:
    found = sequence(order=["law", "drama"])
    assert (list(found), len(found), found.domain, found.weight) == (["law", "drama"], 2, "law", 1.0)
    first = {}
    for name in found:
        found.enter(name)
        found.setup("fit")
        first[name] = next(iter(found.train_dataloader()))[0]
        assert torch.equal(first[name], next(iter(found[name].train_dataloader()))[0])
        assert len(found.val_dataloader())
        assert len(found.test_dataloader())
    assert not torch.equal(first["law"], first["drama"])
    found.enter(0)
    assert found.domain == "law"


def test_domains_may_arrive_later() -> None:
    found = sequence(order=["law"])
    found.append("more law", text("law"), weight=2.0)
    found.enter("more law")
    assert (found.names, found.current, found.weight) == (["law", "more law"], 1, 2.0)
    with pytest.raises(DataError, match=r"domain 'law' is in the sequence already"):
        found.append("law", text("law"))
    with pytest.raises(DataError, match=r"domain 'law' is TextData and 'digits' VisionData"):
        found.append("digits", VisionData("digits"))


@pytest.mark.parametrize(
    ("domains", "options", "message"),
    [
        ({}, {}, "domains is empty"),
        ({"a": text()}, {"order": ["b"]}, "order names 'b', which is no domain"),
        ({"a": text()}, {"order": ["a", "a"]}, "order names 'a' twice"),
        ({"a": text()}, {"order": []}, "order is empty"),
        ({"a": text()}, {"weights": {"b": 1.0}}, r"weights has 'b': 1\.0"),
        ({"a": text()}, {"weights": {"a": -1.0}}, r"weights has 'a': -1\.0; positive numbers"),
        ({"a": text(), "b": VisionData("digits")}, {}, "one model reads one kind of data"),
        ({"a": text(), "b": text(tokenizer="bpe:300")}, {}, "is read by tokenizer 'bytes' and 'b' by 'bpe:300'"),
        ({"a": text(tokenizer="bpe:300"), "b": text("law", tokenizer="bpe:300")}, {}, "'a' would train a tokenizer 'bpe:300'"),
        ({"a": text(tokenizer="bpe:300")}, {}, r"'a' would train a tokenizer 'bpe:300' of its own.* the folder of one"),
    ],
)
def test_what_cannot_be_a_sequence(domains: dict[str, LightningDataModule], options: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        DomainSequence(domains, **options)


def test_unknown_domains_and_domains_without_data() -> None:
    found = sequence()
    for wrong in ("lwa", 3, -1):
        with pytest.raises(DataError, match=r"is no domain of this sequence: drama, law, code"):
            found.enter(wrong)
    found = DomainSequence({"drama": text(), "nothing": text("no/such/file.txt")})
    found.enter("nothing")
    with pytest.raises(DataError, match=r"^domain 'nothing': "):
        found.setup("fit")
    with pytest.raises(DataError, match=r"written in domain 'drama', and 'nothing' is at hand"):
        found.load_state_dict({"domain": "drama", "state": {}})


def test_images_of_another_shape() -> None:
    found = DomainSequence({"small": VisionData("digits"), "large": VisionData("digits", image_size=12)})
    found.setup("fit")
    found.enter("large")
    with pytest.raises(DataError, match=r"'large' has images of shape \(1, 12, 12\), 'small' of \(1, 8, 8\)"):
        found.setup("fit")


def test_a_domain_goes_on_where_it_was() -> None:
    found = sequence()
    found.setup("fit")
    loader = iter(found.train_dataloader())
    next(loader)
    state, wanted = found.state_dict(), next(loader)[0]
    other = sequence()
    other.setup("fit")
    other.load_state_dict(state)
    assert torch.equal(next(iter(other.train_dataloader()))[0], wanted)


# -- the matrix --------------------------------------------------------------------------------------------------------------

ROWS = [[10.0, 50.0, 60.0], [12.0, 20.0, 40.0], [11.0, 22.0, 30.0]]


def test_backward_transfer_of_perplexity_is_forgetting() -> None:
    found = continual_metrics(ROWS, higher_is_better=False, before=[1.0, 45.0, 44.0])
    assert found == {
        "average": 21.0,  # (11 + 22 + 30) / 3
        "learned": 20.0,
        "backward_transfer": 1.5,  # ((11 - 10) + (22 - 20)) / 2
        "forgetting": 1.5,
        "forward_transfer": 0.5,  # ((50 - 45) + (40 - 44)) / 2
    }


def test_of_accuracy_the_sign_is_the_other() -> None:
    found = continual_metrics([[0.9, 0.1], [0.7, 0.8]], higher_is_better=True)
    assert found["backward_transfer"] == pytest.approx(-0.2)
    assert found["forgetting"] == pytest.approx(0.2)
    assert "forward_transfer" not in found
    assert continual_metrics([[0.9]], higher_is_better=True) == {"average": 0.9, "learned": 0.9}


def test_references() -> None:
    fresh, joint = [[9.0, 0, 0], [0, 19, 0], [0, 0, 31]], [[0.0] * 3, [0] * 3, [10, 20, 30]]
    assert reference_metrics(ROWS, False, fresh, joint) == {"intransigence": pytest.approx(1 / 3), "joint_gap": 1.0}
    assert reference_metrics(ROWS, True, fresh, joint) == {"intransigence": pytest.approx(-1 / 3), "joint_gap": -1.0}


def test_a_matrix_with_gaps() -> None:
    matrix = ContinualMatrix(2, higher_is_better=True)
    for stage, domain, value in ((0, 0, 0.5), (1, 1, 0.25), (1, 0, 0.75)):
        matrix.update(stage, domain, value)
    assert matrix.compute()["backward_transfer"] == 0.25  # what a domain could do before its turn is not needed for that
    matrix.reset()
    matrix.update(1, 0, 0.5)
    with pytest.raises(DataError, match="the matrix lacks evaluations"):
        matrix.compute()
    with pytest.raises(DataError, match="stage 2, domain 0: there are 2 of them"):
        matrix.update(2, 0, 1.0)
    assert matrix.higher_is_better is True


def test_a_domain_whose_data_is_gone_counts_in_no_average() -> None:
    rows = [ROWS[0], ROWS[1], [None, *ROWS[2][1:]]]
    assert continual_metrics(rows, False, [1.0, 45.0, 44.0]) == {
        "average": 26.0,  # (22 + 30) / 2
        "learned": 20.0,
        "backward_transfer": 2.0,  # 22 - 20
        "forgetting": 2.0,
        "forward_transfer": 0.5,
    }
    assert continual_metrics([[3.0], [None, 4.0]], False) == {"average": 4.0, "learned": 3.5}
    joint = [[0.0] * 3, [0] * 3, [10, None, 31]]
    assert reference_metrics(rows, False, ROWS, joint) == {"intransigence": 0.0, "joint_gap": -1.0}  # 30 - 31
    # What is no number is no gap, and a domain is measured after its own stage.
    for wrong in ([[3.0, 1.0], [math.nan, 4.0]], [[None, 1.0], [3.0, 4.0]], [[3.0, 1.0], [3.0, None]]):
        with pytest.raises(DataError, match="some that are no number"):
            continual_metrics(wrong, higher_is_better=True)


def test_the_page_tells_what_follows_from_the_matrix() -> None:
    metrics = {
        "metric": "test/perplexity",
        "higher_is_better": False,
        "continual": {"domains": ["a", "b", "c"], "matrix": ROWS} | continual_metrics(ROWS, False) | {"joint_gap": -0.5},
        "method": {"domains": [{"churn": None}, {"churn": 0.25}]},
    }
    facts = dict(domain_facts(metrics))
    assert facts["average over the domains, at the end"] == "21"
    assert facts["forgetting: how much worse than when it was learned, in the mean"] == "+1.5"
    assert facts["worse than all domains pruned for at once"] == "−0.5"
    assert facts["churn: share of the pruned weights that came back, by domain"] == "25.00%"
    drawn = domains_plot(metrics)
    assert drawn is not None
    assert all(word in drawn for word in (b"after a", b"on c", b"not learned yet"))
    assert domains_plot(metrics) == drawn
    metrics["continual"]["matrix"] = [[math.nan]]  # type: ignore[index]
    assert domains_plot(metrics) is None
    assert domains_plot({}) is None
    assert domain_facts({}) == []
