"""The promises for what a model may be: tied, copied, pickled, averaged, with sparse gradients, attached twice."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from sparsetrain.errors import TargetError
from sparsetrain.masks import MaskManager
from sparsetrain.pruning import prune
from sparsetrain.targets import Targets

from .promises import Watched, assert_promises, assert_zeros, zeros_of
from .test_training_loops import adam, backward, sparse_net, watch
from .toys import TARGETS, Net


class LanguageModel(nn.Module):
    """An embedding tied to the output head, as in GPT-2."""

    def __init__(self, sparse: bool = False, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8, sparse=sparse)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.mix(self.embed(tokens))))
        return logits

    def loss(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(12, (3, 5), generator=generator)
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_tied_weights_have_one_mask_and_stay_tied(name: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel()
    keys = list(model.state_dict())
    opt = adam(model.parameters())
    manager = MaskManager(model, Targets(include=(name,))).attach(opt)
    assert len(list(manager)) == 1
    assert manager["embed.weight"] is manager["head.weight"]
    prune(manager, 0.5)
    for index in range(10):
        opt.zero_grad()
        model.loss(index).backward()
        opt.step()
        assert model.head.weight is model.embed.weight
        for alias in (model.head.weight, model.embed.weight):
            assert int((alias == 0).sum()) == 48
    assert list(model.state_dict()) == keys
    fresh = LanguageModel()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert int((fresh.head.weight == 0).sum()) == int((fresh.embed.weight == 0).sum()) == 48


def test_a_tied_head_is_no_target_unless_asked_for() -> None:
    assert [t.name for t in MaskManager(LanguageModel())] == ["mix.weight"]


def test_sparse_gradients() -> None:
    torch.manual_seed(0)
    model = LanguageModel(sparse=True, tied=False)
    sparse = torch.optim.SparseAdam(model.embed.parameters(), lr=0.05)
    dense = adam([*model.mix.parameters(), *model.head.parameters()])
    manager = MaskManager(model, Targets(include=("embed",))).attach(sparse, dense)
    touched = torch.zeros(12, dtype=torch.bool)
    for index in range(40):
        if index in (10, 25):
            prune(manager, 0.5 if index == 10 else 0.75)
        model.zero_grad()
        model.loss(index).backward()
        assert model.embed.weight.grad is not None
        assert model.embed.weight.grad.is_sparse
        touched[model.embed.weight.grad.coalesce().indices()[0]] = True
        sparse.step()
        dense.step()
        if index >= 10:
            watched = watch_embedding(model, manager, sparse, 0.5 if index < 25 else 0.75)
            assert_promises(watched)
    assert bool(touched.all())


def watch_embedding(model: nn.Module, manager: MaskManager, opt: torch.optim.Optimizer, sparsity: float) -> Watched:
    ghost = nn.Parameter(torch.zeros(12, 8))
    opt.state[ghost] = {"exp_avg": torch.zeros(12, 8), "exp_avg_sq": torch.zeros(12, 8)}
    asked = {"embed.weight": ("unstructured", sparsity)}
    return Watched(model, asked, manager.masks, [opt], {"embed.weight": ghost})


def test_copies_and_pickles_are_ordinary_models() -> None:
    net, _, manager, watched = sparse_net()
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(buffer, weights_only=False)):
        assert list(twin.state_dict()) == list(net.state_dict())
        for name, parameter in net.named_parameters():
            assert torch.equal(parameter, twin.get_parameter(name))
        # The copy trains dense: the masks belong to the original, which does not notice.
        opt = adam(twin.parameters())
        backward(twin)
        opt.step()
        assert int((twin.fc1.weight == 0).sum()) == 0
    assert_promises(watched)
    own = MaskManager.adopt(copy.deepcopy(net))
    for name in TARGETS:
        assert torch.equal(own.masks[name], manager.masks[name])


def test_the_state_dict_is_that_of_the_plain_model() -> None:
    net, _, _, _ = sparse_net()
    assert list(net.state_dict()) == list(Net().state_dict())
    Net().load_state_dict(net.state_dict(), strict=True)


def test_attaching_twice_is_attaching_once() -> None:
    net, opt, manager, watched = sparse_net()
    manager.attach(opt).attach(opt, opt)
    assert len(manager.optimizers) == 1
    backward(net)
    opt.step()
    assert_promises(watched)
    manager.detach()
    backward(net)
    opt.step()
    with pytest.raises(AssertionError, match="not zero"):
        assert_promises(watched)


def test_attaching_again_after_detaching_starts_clean() -> None:
    net, opt, manager, _ = sparse_net()
    manager.detach()
    for index in range(3):
        opt.zero_grad()
        backward(net, index)
        opt.step()
    manager.attach(opt)
    manager.enforce()
    opt.zero_grad()
    backward(net)
    opt.step()
    assert_zeros(net.fc1.weight, (~manager.masks["fc1.weight"]).flatten().nonzero().flatten(), "fc1")


def test_two_models_in_one_process_do_not_meet() -> None:
    runs = [sparse_net() for _ in range(2)]
    prune(runs[1][2], 0.75)
    runs[1][3].asked = dict.fromkeys(TARGETS, ("unstructured", 0.75))
    for index in range(6):
        for net, opt, _, _ in runs:
            opt.zero_grad()
            backward(net, index)
            opt.step()
        for _, _, manager, watched in runs:
            watched.masks = manager.masks
            assert_promises(watched)


@pytest.mark.parametrize("regrow", [False, True])
def test_an_averaged_copy_is_as_sparse_as_the_model(regrow: bool) -> None:
    net, opt, manager, watched = sparse_net()
    average = AveragedModel(net, avg_fn=get_ema_avg_fn(0.9))
    manager.follow(average)
    watched.copies = [average]
    for index in range(12):
        if index == 4:
            sparsity = 0.25 if regrow else 0.8
            prune(manager, sparsity)
            watched.asked = dict.fromkeys(TARGETS, ("unstructured", sparsity))
            watched.masks = manager.masks
        opt.zero_grad()
        backward(net, index)
        opt.step()
        average.update_parameters(net)
        assert_promises(watched)
    assert zeros_of([average.module.get_parameter("fc1.weight")]) == [32 if regrow else 102]


def test_a_copy_of_another_model_is_refused() -> None:
    _, _, manager, _ = sparse_net()
    with pytest.raises(TargetError, match="another model"):
        manager.follow(AveragedModel(nn.Linear(3, 3)))


def test_moving_the_model_keeps_the_masks() -> None:
    net, opt, manager, _ = sparse_net()
    net.double()
    for index in range(4):
        opt.zero_grad()
        generator = torch.Generator().manual_seed(index)
        F.cross_entropy(net(torch.randn(8, 8, generator=generator).double()), torch.zeros(8, dtype=torch.long)).backward()
        for state in opt.state.values():
            state.update({k: v.double() for k, v in state.items() if isinstance(v, Tensor) and v.ndim})
        opt.step()
        assert_promises(watch(net, manager, opt))
