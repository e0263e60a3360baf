"""A recipe over domains: its matrix, going on after a kill between and within domains, domains that come later, references."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from sparsetrain.callbacks import ContinualPruning
from sparsetrain.continual import Memory
from sparsetrain.continual.matrix import continual_metrics
from sparsetrain.data import TextData
from sparsetrain.errors import RecipeError
from sparsetrain.masks import MaskManager
from sparsetrain.tasks import CausalLM
from tests.recipes.conftest import Cli
from tests.recipes.llama import LLAMA
from tests.recipes.test_run import metrics, same, weights

pytestmark = pytest.mark.usefixtures("no_report")
TEXT = "tokenizer: bytes, window: 32, batch_size: 4, limit: 16"
TINY = f"""\
seed: 3
model:
  class_path: CausalLM
  init_args:
    config: {json.dumps(LLAMA)}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.01}}}}
data:
  class_path: DomainSequence
  init_args:
    domains:
      drama: {{class_path: TextData, init_args: {{source: shakespeare, {TEXT}}}}}
      law: {{class_path: TextData, init_args: {{source: law, {TEXT}}}}}
      code: {{class_path: TextData, init_args: {{source: python, {TEXT}}}}}
method:
  class_path: ContinualPruning
  init_args: {{pattern: "2:4", criterion: {{class_path: Copal, init_args: {{batches: 2}}}}}}
trainer: {{max_epochs: 0}}
"""
TRAINS = ("--trainer.max_epochs", "2")


def lasting(out: str | Path) -> dict[str, Any]:
    found = {key: value for key, value in metrics(str(out)).items() if key not in ("command", "date", "seconds")}
    domains = [{k: v for k, v in domain.items() if k != "seconds"} for domain in found["method"]["domains"]]
    return found | {"method": found["method"] | {"domains": domains}}


def assert_equal(one: str, other: str) -> None:
    assert same(weights(one), weights(other))
    assert lasting(one) == lasting(other)


def perplexity(model: CausalLM, source: str) -> float:
    data = TextData(source, tokenizer="bytes", window=32, batch_size=4, limit=16)
    silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    return float(Trainer(accelerator="cpu", **silent).test(model, data, verbose=False)[0]["test/perplexity"])


def test_a_run_over_domains(tiny: Path, cli: Cli) -> None:
    ended = cli("run", tiny, "--out", "out")
    assert (ended.code, ended.err) == (0, ""), ended.err
    found = metrics("out")
    assert (found["verified"], found["sparsity"]["actual"], found["metric"]) == (True, 0.5, "test/perplexity")
    continual = found["continual"]
    assert continual["domains"] == ["drama", "law", "code"]
    model = CausalLM(config=LLAMA)
    for stage, name in enumerate(continual["domains"]):
        saved = torch.load(f"out/domains/{stage}-{name}/checkpoints/final.ckpt", weights_only=True)
        model.load_state_dict(saved["state_dict"])
        row = [perplexity(model, source) for source in ("shakespeare", "law", "python")]
        assert continual["matrix"][stage] == pytest.approx(row, rel=1e-6)
    assert continual | continual_metrics(continual["matrix"], False, continual["before"]) == continual
    assert found["final"]["test/perplexity"] == continual["average"]
    assert found["final"]["test/perplexity/law"] == continual["matrix"][2][1]
    assert [d["name"] for d in found["method"]["domains"]] == continual["domains"]
    assert all(d["churn"] > 0 for d in found["method"]["domains"][1:])
    assert cli("verify", "out").code == 0
    assert cli("plan", tiny).code == 0


def test_without_a_method_domains_are_trained_one_after_the_other(tiny: Path, cli: Cli) -> None:
    ended = cli("run", tiny, "--method", "null", "--trainer.max_epochs", "1", "--out", "out")
    assert (ended.code, ended.err) == (0, ""), ended.err
    found = metrics("out")
    assert found["continual"]["matrix"][2][2] < found["continual"]["before"][2]
    assert found["dense"] is None


@pytest.mark.parametrize("options", [(), TRAINS])
def test_domains_may_arrive_after_the_run_has_ended(options: tuple[str, ...], tiny: Path, cli: Cli) -> None:
    assert cli("run", tiny, *options, "--out", "whole").code == 0
    assert cli("run", tiny, *options, "--data.order", "[drama, law]", "--out", "out").code == 0
    first = metrics("out")["continual"]["matrix"]
    stages = {path: path.stat().st_mtime_ns for path in Path("out/domains").rglob("final.ckpt")}
    ended = cli("run", tiny, *options, "--data.order", "[drama, law, code]", "--out", "out", "--ckpt_path", "last")
    assert (ended.code, ended.err) == (0, ""), ended.err
    assert all(path.stat().st_mtime_ns == then for path, then in stages.items())
    assert same(weights("whole"), weights("out"))
    whole, found = metrics("whole")["continual"], metrics("out")["continual"]
    assert [row[:2] for row in found["matrix"][:2]] == first
    assert found["matrix"][0][2] is None  # nobody had the third domain then
    assert found["matrix"][1:] == whole["matrix"][1:]
    for key in ("average", "forgetting", "forward_transfer", "before"):
        assert found[key] == whole[key], key


def kill_in(domain: str, monkeypatch: pytest.MonkeyPatch, step: int | None) -> None:
    """Ctrl-C when a domain begins to be pruned, or after a step of training on it."""
    name = "on_step" if step else "_learn"
    plain = getattr(ContinualPruning, name)

    def stop(self: ContinualPruning, trainer: Trainer, *arguments: Any, **options: Any) -> None:
        plain(self, trainer, *arguments, **options)
        if trainer.datamodule.domain == domain and step in (None, arguments[0]):  # type: ignore[attr-defined]
            monkeypatch.setattr(ContinualPruning, name, plain)
            raise KeyboardInterrupt

    monkeypatch.setattr(ContinualPruning, name, stop)


@pytest.mark.parametrize(
    ("domain", "step", "options"),
    [("law", None, ()), ("code", None, TRAINS), ("law", 2, TRAINS), ("law", 6, TRAINS), ("drama", 7, TRAINS)],
)
def test_a_killed_run_ends_like_an_uninterrupted_one(
    domain: str, step: int | None, options: tuple[str, ...], tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*options, "--checkpoint_every", "2st")
    assert cli("run", tiny, *options, "--out", "whole").code == 0
    kill_in(domain, monkeypatch, step)
    assert cli("run", tiny, *options, "--out", "out").code == 130
    assert not Path("out/metrics.json").exists()
    ended = cli("run", tiny, *options, "--out", "out", "--ckpt_path", "last")
    assert (ended.code, ended.err) == (0, ""), ended.err
    assert_equal("whole", "out")


@pytest.mark.parametrize(("domain", "step"), [("law", None), ("law", 6), ("code", 1)])
def test_a_killed_run_with_its_memory_in_files_ends_like_an_uninterrupted_one(
    domain: str, step: int | None, tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the newest checkpoint is of the end of the domain before: step 1 is before the first of its own."""
    options = (*TRAINS, "--checkpoint_every", "2st")
    assert cli("run", tiny, *options, "--out", "whole").code == 0
    options = (*options, "--method.memory.folder", "kept", "--out", "out")
    kill_in(domain, monkeypatch, step)
    assert cli("run", tiny, *options).code == 130
    ended = cli("run", tiny, *options, "--ckpt_path", "last")
    assert (ended.code, ended.err) == (0, ""), ended.err
    assert_equal("whole", "out")


def test_the_checkpoint_before_the_end_of_a_fit_is_not_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A kill in the second domain, while the newest checkpoint is what Lightning wrote at the end of the first's training."""

    def fit(name: str, method: ContinualPruning, model: CausalLM, ckpt_path: str | None = None) -> None:
        method.domain = name
        data = TextData(name, tokenizer="bytes", window=32, batch_size=4, limit=16)
        saving = ModelCheckpoint(tmp_path / "saved", save_last=True, every_n_train_steps=3)
        silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        trainer = Trainer(accelerator="cpu", max_steps=3, callbacks=[method, saving], limit_val_batches=0, **silent)
        if name == "law" or ckpt_path:
            trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
            return
        monkeypatch.setattr(ContinualPruning, "log_sparsity", lambda *_: (_ for _ in ()).throw(RecipeError("killed")))
        with pytest.raises(RecipeError, match="killed"):
            trainer.fit(model, data)
        monkeypatch.undo()

    def made() -> tuple[ContinualPruning, CausalLM]:
        torch.manual_seed(3)
        model = CausalLM(config=LLAMA, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        return ContinualPruning(pattern="2:4", memory=Memory(folder=tmp_path / "kept")), model

    method, model = made()
    fit("law", method, model)
    assert method.drift
    fit("python", method, model)
    later, model = made()
    fit("law", later, model, str(tmp_path / "saved" / "last.ckpt"))
    assert later.drift == method.drift
    assert later.pruner is not None
    assert [domain.name for domain in later.pruner.domains] == ["law"]


def test_a_folder_is_of_one_run_alone(tiny: Path, cli: Cli) -> None:
    options = ("--method.memory.folder", "kept", "--data.order", "[drama, law]")
    assert cli("run", tiny, *options, "--out", "out").code == 0
    ended = cli("run", tiny, *options, "--out", "other")
    assert ended.code == 2
    assert "memory.folder: kept/base holds what another run has learned" in ended.err
    # A directory that was copied, with the folder in it, goes on.
    options = ("--method.memory.folder", "here/kept", "--out", "here/out")
    assert cli("run", tiny, *options, "--data.order", "[drama, law]").code == 0
    shutil.copytree("here", "there")
    shutil.rmtree("here")
    Path("there").rename("here")
    assert cli("run", tiny, *options, "--ckpt_path", "last").code == 0
    assert cli("run", tiny, "--out", "whole").code == 0
    assert same(weights("whole"), weights("here/out"))


def test_going_on_needs_the_memory(tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a run that forgets what it has learned ends otherwise."""
    assert cli("run", tiny, "--out", "whole").code == 0
    kill_in("code", monkeypatch, None)
    assert cli("run", tiny, "--out", "out").code == 130
    plain = ContinualPruning.load_method_state
    monkeypatch.setattr(
        ContinualPruning, "load_method_state", lambda self, state: plain(self, state) or self.pruner.kept.sums.__init__()
    )
    assert cli("run", tiny, "--out", "out", "--ckpt_path", "last").code == 0
    assert not same(weights("whole"), weights("out"))


def test_from_dense_weights_nothing_is_left_to_tell(tiny: Path, cli: Cli) -> None:
    """Targets without zeros are no news once they are pruned."""
    assert cli("run", tiny, "--method", "null", "--trainer.max_epochs", "1", "--out", "dense").code == 0
    ended = cli("run", tiny, "--init_from", "dense", "--out", "out")
    assert (ended.code, ended.err) == (0, ""), ended.err
    found = metrics("out")
    assert found["unclaimed"] == {}
    assert found["dense"]["test/perplexity"] == metrics("dense")["final"]["test/perplexity"]
    assert found["dense_from"] == "the model as it came, before the first domain"


def test_references(tiny: Path, cli: Cli) -> None:
    ended = cli("run", tiny, "--references", "true", "--out", "out")
    assert (ended.code, ended.err) == (0, ""), ended.err
    found, fresh, joint = (metrics(out)["continual"] for out in ("out", "out/fresh", "out/joint"))
    own = [found["matrix"][i][i] - fresh["matrix"][i][i] for i in range(3)]
    assert found["intransigence"] == pytest.approx(sum(own) / 3)
    assert found["joint_gap"] == pytest.approx(found["average"] - joint["average"])
    assert found["matrix"][0] == fresh["matrix"][0]
    assert metrics("out/joint")["method"]["memory"] == "joint"


def test_references_keep_their_memory_apart(tiny: Path, cli: Cli) -> None:
    options = ("--data.order", "[drama, law]", "--references", "true")
    assert cli("run", tiny, *options, "--out", "out").code == 0
    ended = cli("run", tiny, *options, "--method.memory.folder", "kept", "--out", "filed")
    assert (ended.code, ended.err) == (0, ""), ended.err
    for run in (".", "fresh", "joint"):
        assert same(weights(f"out/{run}"), weights(f"filed/{run}"))
    owners = [Path("kept", run, "base", "id").read_text() for run in (".", "fresh", "joint")]
    assert len(set(owners)) == 3


def test_memory_in_files(tiny: Path, cli: Cli) -> None:
    assert cli("run", tiny, "--out", "out").code == 0
    ended = cli("run", tiny, "--method.memory.folder", "kept", "--out", "filed")
    assert (ended.code, ended.err) == (0, ""), ended.err
    assert same(weights("out"), weights("filed"))
    sizes = [Path(out, "checkpoints/final.ckpt").stat().st_size for out in ("out", "filed")]
    assert sizes[1] < 0.75 * sizes[0]
    assert len(list(Path("kept/statistics").rglob("*.safetensors"))) == 2 * 2  # two blocks, this generation and the last


def test_what_cannot_go_on_is_told(tiny: Path, cli: Cli) -> None:
    assert cli("run", tiny, "--data.order", "[drama, law]", "--out", "out").code == 0
    for options, told in (
        (("--data.order", "[drama, law]"), "out is in use; choose another directory with --out, or go on with the run in it"),
        (("--data.order", "[law, drama]", "--ckpt_path", "last"), "out has learned drama, law, in this order, and the recipe"),
        (("--data.order", "[drama]", "--ckpt_path", "last"), "out has learned drama, law, in this order"),
        (("--seed", "4", "--data.order", "[drama, law, code]", "--ckpt_path", "last"), "seed was 3 and is 4"),
        (("--data.order", "[drama, lwa]", "--ckpt_path", "last"), "order names 'lwa', which is no domain. Did you mean 'law'"),
    ):
        ended = cli("run", tiny, *options, "--out", "out")
        assert ended.code == 2
        assert told in ended.err, ended.err
    shutil.rmtree("out/domains/1-law/checkpoints")
    ended = cli("run", tiny, "--data.order", "[drama, law, code]", "--out", "out", "--ckpt_path", "last")
    assert ended.code == 2, ended.err
    assert "final.ckpt" in ended.err


def test_in_python_one_fit_a_domain() -> None:
    torch.manual_seed(3)
    model = CausalLM(config=LLAMA)
    method = ContinualPruning(pattern="4:8", criterion="wanda")
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    for name in ("law", "python"):
        method.domain = name
        data = TextData(name, tokenizer="bytes", window=32, batch_size=4, limit=16)
        Trainer(accelerator="cpu", max_steps=3, callbacks=[method], limit_val_batches=0, **silent).fit(model, data)
        assert method.masks.verify(strict=True).ok
    assert method.pruner is not None
    assert [domain.name for domain in method.pruner.domains] == ["law", "python"]
    assert 0 < max(method.drift.values()) < 1
    assert method.facts()["drift"] == max(method.drift.values())


def test_a_manager_of_another_pattern_is_refused() -> None:
    model = CausalLM(config=LLAMA)
    with pytest.raises(RecipeError, match="allocation Global"):
        ContinualPruning(0.5, allocation="global").use(model)
    assert ContinualPruning(0.5).use(model, MaskManager(model, pattern="unstructured:row")).sparsity() == 0
