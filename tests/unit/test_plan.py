"""A plan says what a run will do, fast, and every contradiction at once."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch

from sparsetrain.cli import main
from sparsetrain.errors import SparsetrainError
from sparsetrain.recipe import plan, run

VISION = """\
model:
  class_path: Classification
  init_args:
    network: {class_path: MLP, init_args: {in_features: 64, hidden: [24, 16], num_classes: 10}}
data: {class_path: VisionData, init_args: {name: digits, batch_size: 100}}
method:
  class_path: PruneFinetune
  init_args: {sparsity: 0.8, schedule: {class_path: Rounds, init_args: {rounds: 2, start: 3st, every: 20%}}}
trainer: {max_epochs: 2}
"""
LLAMA = """\
model: {class_path: tests.recipes.llama.Llama}
method: {class_path: PruneFinetune, init_args: {pattern: "2:4", schedule: {class_path: OneShot, init_args: {at: 10%}}}}
trainer: {max_steps: 1000}
"""
SMALL = ["--model.layers", "2", "--model.hidden", "256", "--model.intermediate", "300", "--model.vocab", "100"]


@pytest.fixture
def vision(tmp_path: Path) -> Path:
    path = tmp_path / "vision.yaml"
    path.write_text(VISION, encoding="utf-8")
    return path


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    path = tmp_path / "llama.yaml"
    path.write_text(LLAMA, encoding="utf-8")
    return path


def test_flops_of_lenet300_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "lenet.yaml"
    path.write_text(
        "model: {class_path: Classification, init_args: {network: LeNet300}}\n"
        "method: {class_path: PruneFinetune, init_args: {sparsity: 0.5, targets: {head: true}, "
        "schedule: {class_path: OneShot, init_args: {at: 5st}}}}\n"
        "trainer: {max_steps: 10}\n",
        encoding="utf-8",
    )
    data = "{class_path: tests.recipes.extension.BlankImages}"
    found = plan(path, ["--data", data])
    # 784*300 + 300*100 + 100*10 weights, each a multiply and an add; half of each tensor's weights go.
    assert found.flops == {"dense": 2 * 266_200, "sparse": 266_200}
    assert (found.parameters, found.prunable, found.pruned) == (266_610, 266_200, 133_100)
    assert (found.mask_bytes, found.checkpoint_bytes) == (266_200, 266_200 // 8)
    assert found.curve == [(5, 0.5)]


PLANS: dict[str, list[str]] = {
    "uniform": ["--method.sparsity", "0.83"],
    "global": ["--method.allocation", "global"],
    "2:4": ["--method.pattern", "2:4", "--method.sparsity", "null", "--method.schedule", "null"],
    "rows": ["--method.pattern", "unstructured:row"],
    "blocks": ["--method.pattern", "block:8x8", "--method.sparsity", "0.5"],
    "neurons": ["--method.pattern", "neurons", "--method.sparsity", "0.5"],
    "overrides": [
        "--method.overrides",
        '{"fc1": {"sparsity": 0.5}, "fc2": {"pattern": "2:4", "sparsity": 0.5}}',
        "--method.targets.head",
        "true",
    ],
    "cubic": ["--method.schedule", "{class_path: Cubic, init_args: {end: 50%, every: 3st}}"],
    "half batches": [
        "--trainer.limit_train_batches",
        "0.5",
        "--trainer.accumulate_grad_batches",
        "2",
        "--trainer.max_epochs",
        "4",
    ],
    "few batches": ["--trainer.limit_train_batches", "7", "--trainer.max_epochs", "9"],
}


@pytest.mark.parametrize("name", PLANS)
def test_what_is_planned_is_what_happens(name: str, vision: Path, tmp_path: Path) -> None:
    found = plan(vision, PLANS[name])
    assert found.problems == []
    metrics = run(vision, PLANS[name], tmp_path / "out")
    assert found.prunable - found.pruned == metrics["sparsity"]["kept"]
    assert found.prunable == metrics["sparsity"]["prunable"]
    planned = {row.name: row.prune for row in found.tensors}
    for layer in metrics["layers"]:
        size = torch.Size(layer["shape"]).numel()
        assert planned[layer["name"]] in (None, size - layer["kept"])
        assert (planned[layer["name"]] is None) == (name == "global")
    assert {step for step, _ in found.curve} == {change["step"] for change in metrics["changes"]}
    assert found.flops is not None
    assert found.flops["dense"] == metrics["flops"]["dense"]
    assert {row.follows for row in found.tensors} == {"global" if name == "global" else None}
    assert found.notes == [] or name == "global"
    if name != "global":
        assert found.flops == pytest.approx(metrics["flops"])


def test_tied_and_skipped_tensors(llama: Path) -> None:
    options = [*SMALL, "--model.tied", "true", "--method.targets", "{head: true, embeddings: true}"]
    found = plan(llama, options)
    tied = [row for row in found.tensors if row.tied]
    assert [{row.name, *row.tied} for row in tied] == [{"model.model.embed_tokens.weight", "model.lm_head.weight"}]
    # 2 blocks of 4 attention and 3 feed-forward matrices, and the tied one, once.
    assert len(found.tensors) == 2 * 7 + 1
    assert len(found.skipped) == 2 * 2 + 1
    assert set(found.skipped.values()) == {"a bias, norm or scale"}
    default = plan(llama, SMALL)
    assert {"an embedding", "the output head"} == {why.split(" (")[0] for why in default.skipped.values()} - {
        "a bias, norm or scale"
    }


def test_every_divisibility_problem_at_once(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(llama, [*SMALL, "--method.pattern", "3:8"])
    # 300 inputs of the two down projections do not divide by 8; all other inputs are 256.
    names = [f"model.model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    assert [problem.split(":")[0] for problem in found.problems] == names
    assert [row.name for row in found.tensors if row.problem] == names
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(llama), *SMALL, "--method.pattern", "3:8"])
    assert ended.value.code == 2
    out = " ".join(capsys.readouterr().out.split())
    assert all(f"problem: {name}" in out for name in names)


def test_problems_of_data_and_schedule_are_told_too(vision: Path, tmp_path: Path) -> None:
    start = "--method.schedule={class_path: OneShot, init_args: {at: 9ep}}"
    found = plan(vision, [start, "--method.pattern", "3:7", "--method.sparsity", "null"])
    assert len(found.problems) == 3
    assert "ends at 26" in found.problems[-1]
    missing = plan(vision, ["--data.name", "mnist", "--data.root", str(tmp_path / "nowhere")])
    assert any("nowhere" in problem for problem in missing.problems)


def test_seven_billion_weights_without_their_memory(llama: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = plan(llama)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert more < 1 << 20  # KiB: less than a gibibyte, where the weights alone would be 26
    assert found.problems == []
    # 32 blocks of 4 * 4096^2 + 3 * 4096 * 11008; embedding and head 32000 * 4096 each; 65 norms of 4096.
    prunable = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert (found.prunable, found.pruned) == (prunable, prunable // 2)
    assert found.parameters == prunable + 2 * 32000 * 4096 + 65 * 4096
    assert found.mask_bytes == prunable
    assert found.checkpoint_bytes == prunable // 8
    assert found.curve == [(100, 0.5)]
    head = 32000 * 4096
    assert found.flops is not None
    assert found.flops["sparse"] / found.flops["dense"] == pytest.approx((prunable / 2 + head) / (prunable + head))


def test_the_printed_plan_and_its_picture(vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(vision), "--out", str(tmp_path / "pictures")])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for text in ("network.fc1.weight", "24 × 64", "left dense", "the output head", "80.00 %", "FLOPs", "mask memory"):
        assert text in out, text
    assert (tmp_path / "pictures/plan.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "vision.yaml"]


def test_a_model_that_needs_real_memory_is_planned_too(vision: Path) -> None:
    network = "{class_path: tests.recipes.extension.Orthogonal}"
    found = plan(vision, ["--model.network", network])
    assert [row.name for row in found.tensors] == ["network.fc1.weight"]
    assert any("built in memory" in note for note in found.notes)


def test_a_dense_recipe_has_no_plan(vision: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(vision), "--method", "null"])
    assert ended.value.code == 2
    assert "no method" in capsys.readouterr().err


def other(path: Path, method: str) -> Path:
    """The recipe with another method."""
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: text.index("method:")] + f"method: {method}\n" + text[text.index("trainer:") :], encoding="utf-8")
    return path


@pytest.mark.parametrize("settings", ["", "decrease_until: 50%, ", "start: 3st, "])
def test_learned_masks_are_planned_as_they_end(settings: str, vision: Path, tmp_path: Path) -> None:
    recipe = other(vision, f"{{class_path: NMTraining, init_args: {{{settings}pattern: 1:4, freeze: 60%}}}}")
    found, metrics = plan(recipe), run(recipe, [], tmp_path / "out")
    # three of every four of 64 * 24 + 24 * 16 weights
    assert (found.problems, found.pruned, found.prunable) == ([], 1440, 1920)
    assert metrics["sparsity"]["kept"] == 480
    assert found.flops == metrics["flops"]
    assert found.flops["sparse"] < found.flops["dense"]  # type: ignore[index]


TASKS = """\
model:
  class_path: IncrementalClassification
  init_args: {network: {class_path: MLP, init_args: {in_features: 64, hidden: [24, 16], num_classes: 10}}, scenario: class}
data:
  class_path: DomainSequence
  init_args:
    domains:
      few: {class_path: VisionData, init_args: {name: digits, batch_size: 100, validation: 0, classes: [0, 1]}}
      more: {class_path: VisionData, init_args: {name: digits, batch_size: 100, validation: 0, classes: [2, 3, 4, 5, 6, 7]}}
method: {class_path: PackNet, init_args: {prune_at: 50%}}
trainer: {max_epochs: 4}
"""


@pytest.mark.parametrize("method", ["PackNet", "SpaceNet", "Supermask"])
def test_what_tasks_take_is_not_said_before_they_come(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "tasks.yaml"
    recipe.write_text(TASKS, encoding="utf-8")
    options = [] if method == "PackNet" else ["--method", method]
    # A task of Supermask has its own sparsity, as any method: the twin.
    options += ["--method.sparsity", "0.75"] if method == "Supermask" else []
    module = sys.modules["sparsetrain.recipe.plan"]  # its package has a function of that name
    monkeypatch.setattr(module, "example_input", lambda model, data: torch.zeros(1, 64, device="meta"))
    found = plan(recipe, options)
    known = method == "Supermask"
    assert {row.follows for row in found.tensors} == {None if known else "by task"}
    # 280 digits of two classes and 859 of six are trained on: 3 and 9 steps an epoch.
    assert (found.problems, found.domains, found.clock.total_steps, found.clock.steps_per_epoch) == ([], 2, 4 * 3, 3)
    assert found.flops is not None
    assert ("sparse" in found.flops) is known
    with pytest.raises(SystemExit):
        main(["plan", str(recipe), *options])
    out = " ".join(capsys.readouterr().out.split())
    assert "global" not in out
    assert ("by task" in out, "fewer)" in out, "without pruned weights" in out) == (not known, known, known)
    assert "optimizer steps 12 a domain, in the first of 2 (3 an epoch)" in out


def test_masks_that_are_kept_are_as_they_are(vision: Path, tmp_path: Path) -> None:
    run(vision, [], tmp_path / "out")
    found = plan(other(vision, "{class_path: KeepMasks}"), ["--init_from", str(tmp_path / "out")])
    assert (found.problems, {row.follows for row in found.tensors}) == ([], {"as it is"})
    assert found.flops is not None
    assert found.flops.keys() == {"dense"}


@pytest.mark.parametrize(("settings", "follows"), [("", "by noise"), (", init_args: {sparsity: 0.9}", "global")])
def test_noise_decides_unless_a_sparsity_is_asked_for(settings: str, follows: str, vision: Path) -> None:
    found = plan(other(vision, f"{{class_path: VariationalDropout{settings}}}"))
    assert (found.problems, {row.follows for row in found.tensors}) == ([], {follows})
    assert found.pruned == (0 if follows == "by noise" else int(0.9 * found.prunable))


ALONE = "{class_path: OneShotPruning, init_args: {sparsity: 0.6, criterion: magnitude}}"


def test_pruning_random_weights_is_told(vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = tmp_path / "trained"
    run(vision, [], trained)
    recipe = other(vision, ALONE)
    told = "pruned are the random weights the model starts with"
    for options, expected in (
        (["--trainer.max_epochs", "0"], True),
        (["--trainer.max_epochs", "1"], False),
        (["--trainer.max_epochs", "0", "--init_from", str(trained)], False),
    ):
        capsys.readouterr()
        assert any(note.startswith(told) for note in plan(recipe, options).notes) is expected
        run(recipe, options, tmp_path / f"out{len(options)}{expected}")
        assert (told in capsys.readouterr().out) is expected


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("{class_path: KeepMasks}", "nothing says how sparse"),
        ("{class_path: DynamicSparse, init_args: {update: {every: 2st}}}", "nothing says how sparse"),
        (
            "{class_path: PruneFinetune, init_args: {sparsity: 0.5, criterion: movement, schedule: {class_path: OneShot}}}",
            "watches training and has seen none at step 0",
        ),
    ],
)
def test_what_a_run_would_refuse_is_a_problem_of_its_plan(method: str, says: str, vision: Path, tmp_path: Path) -> None:
    recipe = other(vision, method)
    (problem,) = plan(recipe).problems
    assert says in problem
    with pytest.raises(SparsetrainError):
        run(recipe, [], tmp_path / "out")
