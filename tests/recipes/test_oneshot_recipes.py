"""One-shot pruning as a recipe: without training, from a pretrained model, over calibration seeds; its experiments in small."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from sparsetrain.callbacks.exact_resume import ExactResume
from sparsetrain.data import TextData
from sparsetrain.errors import DataError, RecipeError
from sparsetrain.recipe import jobs as module
from sparsetrain.recipe.experiment import experiment_jobs, load_experiment
from sparsetrain.recipe.record import _goal, record
from sparsetrain.recipe.train import PruneAlone
from sparsetrain.report.results import check_result, load_result
from sparsetrain.tasks import CausalLM, save_pretrained
from tests.recipes.conftest import Cli
from tests.recipes.llama import LLAMA
from tests.recipes.test_run import metrics, weights

pytestmark = pytest.mark.usefixtures("no_report")
ROOT = Path(__file__).parents[2] / "recipes"
DATA = "{source: [law, math], tokenizer: bytes, window: 32, batch_size: 4, limit: 24}"
# Prunes a Llama of 2 layers and trains nothing; an epoch would be 6 batches.
TINY = f"""\
seed: 3
model:
  class_path: CausalLM
  init_args:
    config: {json.dumps(LLAMA)}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.01}}}}
data:
  class_path: TextData
  init_args: {DATA}
method:
  class_path: OneShotPruning
  init_args: {{pattern: "2:4", criterion: {{class_path: Wanda, init_args: {{batches: 2}}}}}}
trainer: {{max_epochs: 0}}
"""


def measured(model: CausalLM) -> dict[str, float]:
    """What stock Lightning says of a model on the recipe's test text."""
    data = TextData(["law", "math"], tokenizer="bytes", window=32, batch_size=4, limit=24)
    silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    return {k: float(v) for k, v in Trainer(accelerator="cpu", **silent).test(model, data, verbose=False)[0].items()}


def as_built() -> CausalLM:
    seed_everything(3, verbose=False)
    return CausalLM(config=LLAMA)


# ---------------------------------------------------------------- without training


@pytest.mark.parametrize("length", [(), ("--trainer.max_epochs", "null", "--trainer.max_steps", "0")])
def test_a_run_may_prune_and_train_nothing(length: tuple[str, ...], tiny: Path, cli: Cli) -> None:
    ended = cli("run", tiny, *length, "--out", "out")
    assert (ended.code, ended.err) == (0, ""), ended.err
    found, start, final = metrics("out"), as_built(), weights("out")
    assert (found["verified"], found["sparsity"]["actual"], found["method"]["one_shot"]["samples"]) == (True, 0.5, 8)
    assert found["dense"] == pytest.approx(measured(start), rel=1e-6)
    assert found["dense"] != found["final"]
    assert found["dense_from"] == "the model as it came, before pruning"
    # Wanda moves nothing: what is left is what was there.
    for name, value in start.state_dict().items():
        kept = final[name] != 0
        assert torch.equal(final[name][kept], value[kept])
        assert float(kept.float().mean()) == (0.5 if name.endswith("proj.weight") else 1)
    assert {path.name for path in Path("out/checkpoints").iterdir()} == {"final.ckpt"}
    assert Path("out/config.yaml").is_file()
    assert cli("verify", "out").code == 0
    assert cli("plan", tiny, *length).code == 0


def test_without_training_the_model_as_it_came_is_the_dense_twin(tiny: Path, cli: Cli) -> None:
    ended = cli("run", tiny, "--dense_twin", "true", "--out", "out")
    assert (ended.code, ended.err) == (0, ""), ended.err
    assert metrics("out")["dense"] == pytest.approx(measured(as_built()), rel=1e-6)
    assert not Path("out/dense").exists()


def test_a_run_that_is_not_ended_at_once_trains(tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PruneAlone, "on_train_start", lambda *_: None)
    assert cli("run", tiny, "--out", "out").code == 0
    start, final = as_built().state_dict(), weights("out")
    name = "network.model.layers.0.mlp.up_proj.weight"
    kept = final[name] != 0
    assert not torch.equal(final[name][kept], start[name][kept])


def test_what_needs_training_is_refused_without(tiny: Path, cli: Cli) -> None:
    for options, told in (
        (["--method.start", "1st"], "method.start is 1st, and no step is trained; write 0st"),
        (["--method", "null"], "only OneShotPruning and ContinualPruning can do without training"),
        (["--method", "PruneFinetune", "--method.pattern", "2:4"], "nothing would be trained"),
        (["--trainer.limit_train_batches", "0"], "limit_train_batches=0"),
    ):
        ended = cli("run", tiny, *options, "--out", "out")
        assert (ended.code, told in ended.err) == (2, True), ended.err
        assert not Path("out").exists()


# ---------------------------------------------------------------- what is not claimed

LAYER = "network.model.layers.1.mlp.up_proj.weight"


@pytest.mark.filterwarnings("ignore:10% of .*zeros that no mask keeps")
def test_what_nobody_claims_is_in_the_metrics_also_of_a_resumed_run(tiny: Path, cli: Cli) -> None:
    assert cli("run", tiny, "--out", "pruned").code == 0
    weights_now, embedding = weights("pruned"), "network.model.embed_tokens.weight"
    weights_now[LAYER] = as_built().state_dict()[LAYER]  # one is dense, and of another a tenth is zero
    weights_now[embedding].view(-1)[::10] = 0
    torch.save({"state_dict": weights_now}, "start.ckpt")
    both = ("--init_from", "start.ckpt", "--method", "KeepMasks", "--method.pattern", "2:4", "--data.batch_size", "8")
    ended = cli("run", tiny, *both, "--trainer.max_epochs", "2", "--out", "whole")
    assert ended.code == 0, ended.err
    assert cli("run", tiny, *both, "--trainer.max_epochs", "1", "--out", "cut").code == 0
    assert cli("run", tiny, *both, "--trainer.max_epochs", "2", "--out", "cut", "--ckpt_path", "last").code == 0
    told = metrics("whole")["unclaimed"]
    assert told[LAYER] == "has no zeros, stays dense"
    assert told[embedding].startswith("is 10% zero but no target: the output head")
    assert metrics("cut")["unclaimed"] == told


class Scaled(CausalLM):
    """Has a matrix that no supported layer holds."""

    def __init__(self) -> None:
        super().__init__(config=LLAMA)
        self.bare = torch.nn.Parameter(torch.ones(2, 2))


def test_what_one_shot_pruning_leaves_dense_is_in_the_metrics(tiny: Path, cli: Cli) -> None:
    assert cli("run", tiny, "--out", "out").code == 0
    assert metrics("out")["unclaimed"] == {}
    ended = cli("run", tiny, "--model", f"{__name__}.Scaled", "--out", "other")
    assert ended.code == 0, ended.err
    assert metrics("other")["unclaimed"] == {"bare": "no supported layer"}


# ---------------------------------------------------------------- what is dense


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``$SPARSETRAIN_DATA`` with a pretrained model in it, and its tokenizer."""
    data = TextData(["law", "math"], tokenizer="bytes", window=32)
    data.setup()
    seed_everything(11, verbose=False)
    save_pretrained(CausalLM(config=LLAMA), tmp_path / "shared/models/reader", tokenizer=data.tokenizer)
    monkeypatch.setenv("SPARSETRAIN_DATA", str(tmp_path / "shared"))
    return tmp_path / "shared/models"


PRETRAINED = ("--model.config", "null", "--model.model", "reader", "--trainer.max_epochs", "1")


def test_a_pretrained_model_is_compared_with_itself(tiny: Path, models: Path, cli: Cli) -> None:
    assert cli("run", tiny, *PRETRAINED, "--data.tokenizer", "reader", "--out", "out").code == 0
    found = metrics("out")
    assert found["dense"] == pytest.approx(measured(CausalLM(model=str(models / "reader"))), rel=1e-6)
    assert not Path("out/checkpoints/dense.ckpt").exists()
    # Nothing in what is written down is of this machine.
    assert str(models) not in Path("out/config.yaml").read_text(encoding="utf-8")
    assert cli("plan", tiny, *PRETRAINED).code == 0


def test_a_model_that_nobody_trained_or_that_is_sparse_is_no_reference(tiny: Path, models: Path, cli: Cli) -> None:
    assert cli("run", tiny, "--trainer.max_epochs", "1", "--out", "random").code == 0
    assert metrics("random")["dense"] is None
    assert cli("run", tiny, "--out", "pruned").code == 0
    keep = ["--method", "KeepMasks", "--method.pattern", "2:4", "--trainer.max_epochs", "1"]
    assert cli("run", tiny, *keep, "--init_from", "pruned", "--out", "kept").code == 0
    assert metrics("kept")["dense"] is None
    # Zeros without masks, in somebody's folder.
    model = CausalLM(model=str(models / "reader"))
    state = weights("pruned")
    model.load_state_dict(state)
    save_pretrained(model, models / "halved")
    assert cli("run", tiny, *PRETRAINED, "--model.model", "halved", *keep, "--out", "folder").code == 0
    assert metrics("folder")["dense"] is None
    # And with a dense start there is one.
    assert cli("run", tiny, "--method", "null", "--trainer.max_epochs", "1", "--out", "dense").code == 0
    assert cli("run", tiny, "--trainer.max_epochs", "1", "--init_from", "dense", "--out", "again").code == 0
    assert metrics("again")["dense"] == pytest.approx(metrics("dense")["final"], rel=1e-6)


# ---------------------------------------------------------------- calibration seeds


def zeros(out: str) -> torch.Tensor:
    return torch.cat([(value == 0).flatten() for value in weights(out).values()])


def test_another_seed_looks_at_other_windows(tiny: Path, models: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    same = [*PRETRAINED, "--trainer.max_epochs", "0"]
    for out, seed in (("a", 0), ("c", 1)):
        assert cli("run", tiny, *same, "--seed", seed, "--out", out).code == 0
    assert not torch.equal(zeros("a"), zeros("c"))
    # The step alone, as it would be without the seed.
    monkeypatch.setattr(ExactResume, "seed_at", lambda self, step: step)
    for out, seed in (("d", 0), ("e", 1)):
        assert cli("run", tiny, *same, "--seed", seed, "--out", out).code == 0
    assert torch.equal(zeros("d"), zeros("e"))


def test_seeds_of_steps_do_not_run_into_each_other() -> None:
    def seeds(seed: int) -> list[int]:
        resume = ExactResume()
        resume.seed = seed
        return [resume.seed_at(step) for step in range(50)]

    assert len({*seeds(0), *seeds(1), *seeds(2)}) == 150
    assert seeds(1) == seeds(1)


# ---------------------------------------------------------------- limits


def test_a_limit_takes_windows_from_all_over_the_text() -> None:
    def test_set(limit: Any) -> Any:
        data = TextData(["law", "math"], tokenizer="bytes", window=32, limit=limit)
        data.setup()
        assert data.train_set is not None
        return data.test_set, len(data.train_set)

    whole, many = test_set(None)
    some, few = test_set({"test": 4})
    assert (len(some), few) == (4, many)
    assert 8 <= test_set({"train": 10})[1] <= 10  # shares of two sources, rounded down
    assert len(test_set({"train": 10})[0]) == len(whole)
    every = len(whole) // 4
    for index in range(4):
        at = index * len(whole) // 4
        assert every * index <= at <= every * index + 3
        assert torch.equal(some[index][0], whole[at][0])
    for bad in (0, {"test": 0}, {"tset": 3}, {"test": True}):
        with pytest.raises(DataError, match="limit="):
            TextData("law", limit=bad)


# ---------------------------------------------------------------- experiments


def test_goals_that_follow_from_other_rows() -> None:
    before = {"dense": {"mean": 4.0}, "pruned": {"mean": 24.0}}
    assert _goal({"row": "dense", "times": 1.25}, before) == 5.0
    assert _goal({"row": "pruned", "share": 0.75, "towards": "dense"}, before) == 9.0
    assert _goal({"row": "dense", "plus": -1}, before) == 3.0
    assert (_goal(7, before), _goal(None, before)) == (7, None)


MINIATURE = """\
question: {question}
recipe: ../tiny.yaml
seeds: [0, 1]
model: tiny
data: law
stages:
  - {{name: dense, seed: {seed}, overrides: {{method: null, trainer.max_epochs: 1}}}}
rows:
  - name: start
    method: dense
    overrides: {{init_from: "@dense"}}
    value: dense.test/perplexity
    metric: test perplexity
    sparsity: 0
    published: null
    source: null
    goal: null
  - {{method: next, overrides: {{init_from: "@dense"}}, value: final.test/loss, published: null, source: null, goal: {goal}}}
"""


@pytest.mark.parametrize(
    ("seed", "goal", "told"),
    [
        ("a", "null", "stages[0].seed is 'a'; give a whole number"),
        ("0", "{row: stat, times: 2}", "rows[1].goal names row 'stat'; rows before it are start"),
        ("0", "{row: start, share: 0.5, towards: dense}", "rows[1].goal names row 'dense'"),
        ("0", "{row: start, share: 0.5}", "rows[1].goal is {'row': 'start', 'share': 0.5}; give a number"),
        ("0", "{row: start, times: 2, plus: 1}", "give a number"),
    ],
)
def test_goals_and_seeds_that_are_none(seed: str, goal: str, told: str, tiny: Path) -> None:
    path = tiny.parent / "experiment.yaml"
    path.write_text(MINIATURE.format(question="why", seed=seed, goal=goal), encoding="utf-8")
    with pytest.raises(RecipeError, match=re.escape(told)):
        load_experiment(path)


EXPERIMENTS = {"stories_oneshot": (25, 0), "stories_finetune": (4, 0), "reference_lm": (29, 1)}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_experiments_compare_perplexities_over_calibration_seeds(name: str) -> None:
    path = ROOT / "experiments" / f"{name}.yaml"
    experiment = load_experiment(path)
    jobs, _ = experiment_jobs(experiment, path, Path("work"))
    each, once = EXPERIMENTS[name]
    assert len(jobs) == 3 * each + once
    assert experiment["seeds"] == [0, 1, 2]
    assert {row["higher_is_better"] for row in experiment["rows"] if "higher_is_better" in row} == set()
    assert {row["metric"] for row in experiment["rows"]} == {"test perplexity"}
    assert {row["value"] for row in experiment["rows"]} == {"dense.test/perplexity", "final.test/perplexity"}


def test_the_reference_experiment_in_small(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own rows on a tiny recipe: trained once, pruned from there, fine-tuned, merged, judged by goals between rows."""
    from sparsetrain.cli import main

    started: list[list[str]] = []

    def call(command: list[str], **options: Any) -> Any:
        started.append(command)
        with pytest.raises(SystemExit) as ended:
            main(command[3:])
        return type("Done", (), {"returncode": int(ended.value.code or 0), "stderr": ""})

    monkeypatch.setattr(module.subprocess, "run", call)
    text = (ROOT / "experiments/reference_lm.yaml").read_text(encoding="utf-8")
    for old, new in (
        ("seeds: [0, 1, 2]", "seeds: [1]"),
        ("batches: 8", "batches: 2"),
        ("max_steps: 400", "max_steps: 3"),
        ("rank: 16", "rank: 2"),
        ("train: 6400, valid: 256, test: 256", "train: 12, valid: 2, test: 6"),
    ):
        assert old in text
        text = text.replace(old, new)
    head, *rows = re.split(r"(?m)^(?=  - name: )", text)
    path = tiny.parent / "experiments/small.yaml"
    path.parent.mkdir()
    path.write_text(head + "".join(r for r in rows if re.match(r'  - name: (reference|".* 2:4")$', r, re.M)), encoding="utf-8")
    (tiny.parent / "reference_lm.yaml").write_text(
        TINY.partition("method:")[0].replace("bytes", "bpe:258") + "trainer: {max_steps: 4}\n", encoding="utf-8"
    )
    result = load_result(record(path, work=Path("work"), results=Path("results")))
    assert check_result(result) == []
    # The dense model, from its own seed; five criteria, of which magnitude is the reference row too; full and adapters, twice.
    assert [c[c.index("--seed") + 1] for c in started] == ["0", *"111111111"]
    assert "--init_from" not in started[0]
    reference, *criteria, full, lora, full_wanda, lora_wanda = result["rows"]
    tuned = (full, lora, full_wanda, lora_wanda)
    assert (reference["sparsity"], reference["pattern"], reference["compression"]) == (0, "dense", 1)
    dense = metrics("work/small/dense-seed0")["final"]["test/perplexity"]
    assert reference["values"][0] != pytest.approx(dense)  # measured on 6 windows, not on all
    assert [row["sparsity"] for row in (*criteria, *tuned)] == [0.5] * 9
    assert len({row["mean"] for row in criteria}) == 5
    goals = [row["goal"] for row in criteria]
    assert goals == [None, criteria[0]["mean"], criteria[0]["mean"], criteria[1]["mean"], criteria[3]["mean"]]
    between = sorted([reference["mean"], criteria[-1]["mean"]])
    assert between[0] <= full["goal"] <= between[1]
    for row in tuned:
        assert row["met"] is (row["mean"] <= row["goal"])
    merged = weights("work/small/row7-seed1")
    assert not any("lora" in name for name in merged)
    before = weights("work/small/row5-seed1")
    for name, value in before.items():
        assert not bool((merged[name] != 0)[value == 0].any())
