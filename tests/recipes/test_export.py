"""Runs shipped: an ordinary transformers folder, a compact network, plain weights, the fastest formats; nothing by halves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sparsetrain.export import InferenceModel, load_compact
from sparsetrain.recipe import export
from sparsetrain.tasks import MLP
from tests.recipes.conftest import TINY as MASKED
from tests.recipes.conftest import Cli, contents
from tests.recipes.test_compact_runs import TINY as COMPACT
from tests.recipes.test_domain_runs import TINY as DOMAINS
from tests.recipes.test_run import weights

WORDS = """\
question: Does a language model ship?
seed: 1
model:
  class_path: CausalLM
  init_args:
    config: {model_type: llama, vocab_size: 258, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2,
             num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 32}
data:
  class_path: TextData
  init_args: {source: shakespeare, window: 16, batch_size: 8, limit: {train: 160, valid: 8, test: 8}}
method:
  class_path: GroupLasso
  init_args:
    sparsity: 0.4
    groups: {class_path: Groups, init_args: {kinds: [head, neuron], alike: true}}
    compact: 5st
trainer: {max_epochs: 1}
"""

pytestmark = pytest.mark.usefixtures("no_report")


def digits(recipe: Path, text: str, cli: Cli) -> nn.Module:
    """The recipe run into ``out``; a network of its kind, built anew."""
    recipe.write_text(text, encoding="utf-8")
    assert cli("run", recipe, "--out", "out").code == 0
    torch.manual_seed(99)
    return MLP(64, [16, 16], 10).eval()


def answers(network: nn.Module, out: str = "out") -> None:
    """The network answers as the weights of the run's checkpoint do, multiplied by hand."""
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    w = {name.removeprefix("network."): value for name, value in weights(out).items()}
    hidden = x.flatten(1)
    for layer in ("fc1", "fc2"):
        hidden = torch.relu(hidden @ w[f"{layer}.weight"].T + w[f"{layer}.bias"])
    with torch.no_grad():
        torch.testing.assert_close(network(x), hidden @ w["fc3.weight"].T + w["fc3.bias"], rtol=0, atol=1e-5)


def test_a_masked_network_ships_as_plain_weights(tiny: Path, cli: Cli) -> None:
    network = digits(tiny, MASKED, cli)
    ended = cli("export", "out", "--out", "shipped")
    assert (ended.code, ended.err) == (0, "")
    assert "1,482 parameters, " in ended.out
    assert f'load it: sparsetrain.export.load_compact("{Path("shipped").resolve()}", MLP(...))' in ended.out
    network.load_state_dict(load_file("shipped/model.safetensors"), strict=True)
    answers(network)
    assert int((network.fc1.weight == 0).sum()) > 512  # type: ignore[union-attr,operator,arg-type]


def test_a_compact_network_ships_and_comes_back(tiny: Path, cli: Cli) -> None:
    network = digits(tiny, COMPACT, cli)
    assert cli("export", "out", "--out", "shipped").code == 0
    load_compact("shipped", network)
    answers(network)
    assert network.fc1.weight.shape[0] < 16  # type: ignore[union-attr,operator,index]


@pytest.mark.parametrize("text", [MASKED, COMPACT])
def test_the_fastest_formats_ship(text: str, tiny: Path, cli: Cli) -> None:
    network = digits(tiny, text, cli)
    ended = cli("export", "out", "--fast", "--out", "shipped")
    assert (ended.code, ended.err) == (0, "")
    if text == COMPACT:
        load_compact("shipped", network)
    answers(InferenceModel.load("shipped", network))


def test_a_language_model_ships_for_stock_transformers(tiny: Path, cli: Cli) -> None:
    import transformers

    tiny.write_text(WORDS, encoding="utf-8")
    assert cli("run", tiny, "--out", "out").code == 0
    ended = cli("export", "out", "--out", "shipped")
    assert (ended.code, ended.err) == (0, "")
    assert 'load it: transformers.LlamaForCausalLM.from_pretrained("' in ended.out
    back = transformers.AutoModelForCausalLM.from_pretrained("shipped")
    own = {name.removeprefix("network."): value for name, value in weights("out").items()}
    assert all(torch.equal(value, own[name]) for name, value in back.state_dict().items())
    assert back.config.intermediate_size < 24
    # Blocks that lost differently have no configuration; they ship with their record.
    assert cli("run", tiny, "--method.groups.alike", "false", "--out", "uneven").code == 0
    ended = cli("export", "uneven", "--out", "apart")
    assert (ended.code, ended.err) == (0, "")
    assert "no configuration of LlamaForCausalLM has these sizes" in ended.out
    fresh = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained("apart"))
    load_compact("apart", fresh)


def test_a_language_model_over_domains_ships_with_its_tokenizer(tiny: Path, cli: Cli) -> None:
    tiny.write_text(DOMAINS, encoding="utf-8")
    assert cli("run", tiny, "--out", "out").code == 0
    ended = cli("export", "out", "--out", "shipped")
    assert (ended.code, ended.err) == (0, "")
    transformers = pytest.importorskip("transformers")
    stock = transformers.AutoTokenizer.from_pretrained("shipped")
    assert stock("to bé")["input_ids"] == list("to bé".encode())
    assert transformers.AutoModelForCausalLM.from_pretrained("shipped").config.vocab_size == len(stock)


def test_only_an_export_is_replaced(tiny: Path, cli: Cli) -> None:
    digits(tiny, MASKED, cli)
    assert cli("export", "out", "--out", "shipped").code == 0
    ended = cli("export", "out", "--out", "shipped")
    assert ended.code == 2
    assert "is in use" in ended.err
    assert "--overwrite" in ended.err
    assert cli("export", "out", "--out", "shipped", "--overwrite").code == 0
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep me")
    assert cli("export", "out", "--out", "mine", "--overwrite").code == 2
    assert Path("mine/notes.txt").read_text() == "keep me"


def test_what_cannot_ship_is_refused_and_leaves_nothing(tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = cli("export", "nowhere", "--out", "shipped")
    assert (ended.code, "no run directory" in ended.err) == (2, True)
    digits(tiny, COMPACT, cli)
    before = contents(Path("out"))
    monkeypatch.setattr(export, "load_compact", lambda folder, model: [])
    ended = cli("export", "out", "--out", "shipped")
    assert ended.code == 2
    assert "does not answer as the network does" in ended.err
    assert not Path("shipped").exists()
    assert contents(Path("out")) == before


def test_the_run_itself_is_never_replaced(tiny: Path, cli: Cli) -> None:
    digits(tiny, MASKED, cli)
    Path("out/config.json").write_text("{}")
    ended = cli("export", "out", "--out", "out", "--overwrite")
    assert (ended.code, "holds the run that is exported" in ended.err) == (2, True)
    assert Path("out/checkpoints/final.ckpt").is_file()


def test_a_network_that_is_another_for_every_task_is_refused(tiny: Path, cli: Cli) -> None:
    digits(tiny, MASKED, cli)
    config = Path("out/config.yaml").read_text(encoding="utf-8")
    packed = config.partition("\nmethod:")[0] + "\nmethod:\n  class_path: PackNet\ntrainer: {max_epochs: 2}\n"
    Path("out/config.yaml").write_text(packed, encoding="utf-8")
    ended = cli("export", "out", "--out", "shipped")
    assert ended.code == 2
    assert "a mask of its own" in ended.err
    assert not Path("shipped").exists()


def test_a_run_that_does_not_verify_is_refused(tiny: Path, cli: Cli) -> None:
    digits(tiny, MASKED, cli)
    path = Path("out/checkpoints/final.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    weight = checkpoint["state_dict"]["network.fc1.weight"]
    weight[weight == 0] = 1.0
    torch.save(checkpoint, path)
    ended = cli("export", "out", "--out", "shipped")
    assert ended.code == 2
    assert "does not verify" in ended.err
    assert not Path("shipped").exists()
    assert json.loads(Path("out/metrics.json").read_text())["verified"]
