import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from diffalign import cli, commands
from diffalign.errors import DiffalignError


@pytest.fixture
def recipe(tmp_path: Path, tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe on the random tiny SDXL with five pairs of plain pictures; the working folder is the test's."""
    monkeypatch.chdir(tmp_path)
    lines = []
    for i in range(5):
        for kind, shade in (("good", 200), ("bad", 40)):
            Image.new("RGB", (64, 64), (shade, 20 * i, 90)).save(tmp_path / f"{kind}{i}.png")
        lines.append({"prompt": f"picture {i}", "chosen": f"good{i}.png", "rejected": f"bad{i}.png"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""\
name: small
model: {{path: {tiny_sdxl}, precision: fp32, lora: {{rank: 2, dropout: 0.1}}}}
data: {{source: pairs.jsonl, held_out: pairs.jsonl, resolution: 64}}
trainer: {{method: dpo, beta: 500}}
optim: {{lr: 1e-3, steps: 4, batch_size: 2}}
checkpoint: {{every: 2}}
evaluation: {{prompts: prompts.txt, num_prompts: 2, steps: 2, guidance: 2.0, batch_size: 2}}
"""
    )
    return path


def trained(name="small"):
    return load_file(Path("runs") / name / "final" / "trainable.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def metrics(name="small"):
    return [json.loads(line) for line in (Path("runs") / name / "metrics.jsonl").read_text().splitlines()]


def test_train_writes_a_lora_that_diffusers_loads(recipe, tiny_sdxl):
    assert cli.run(["train", str(recipe)]) == 0
    folder = Path("runs/small")
    first = metrics()[0]
    assert first["loss"] == pytest.approx(0.6931, abs=0.01)
    assert any("held_out/implicit_accuracy" in line for line in metrics())
    assert sorted(p.name for p in (folder / "samples").iterdir()) == ["step-000000.png", "step-000004.png"]
    assert (folder / "final" / "README.md").is_file()
    assert "Implicit accuracy" in (folder / "report.html").read_text()
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    pipeline.load_lora_weights(folder / "final" / "pytorch_lora_weights.safetensors")
    assert "default_0" in pipeline.get_list_adapters()["unet"]


def test_resumed_training_of_the_real_parts_is_equal_to_the_bit(recipe):
    assert cli.run(["train", str(recipe), "--name", "whole"]) == 0
    assert cli.run(["train", str(recipe), "optim.steps=2"]) == 0
    assert cli.run(["train", str(recipe)]) == 2
    assert cli.run(["train", str(recipe), "--resume"]) == 0
    assert same(trained("whole"), trained())


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.tune=full", "optim.ema=0.9", "model.gradient_checkpointing=true"],
        [
            "trainer.reference=cached",
            "trainer.reference_draws=2",
            "optim.accumulation=2",
            "model.precision=bf16",
        ],
        ["optim.optimizer=adafactor", "data.labels=swapped", "data.flip=true", "trainer.caption_dropout=0.5"],
    ],
    ids=["full", "cached", "adafactor"],
)
def test_options_train_two_steps(recipe, overrides):
    assert cli.run(["train", str(recipe), "optim.steps=2", *overrides]) == 0
    assert all(torch.isfinite(value).all() for value in trained().values())
    if "model.tune=full" in overrides:
        assert (Path("runs/small/final/pipeline") / "model_index.json").is_file()


def test_generate_from_run_and_from_model(recipe, tiny_sdxl):
    assert cli.run(["train", str(recipe), "optim.steps=1"]) == 0
    assert cli.run(["generate", "runs/small", "--prompts", "prompts.txt", "--out", "a", "--steps", "2"]) == 0
    assert sorted(p.name for p in Path("a").iterdir()) == ["0000.png", "0001.png", "pictures.jsonl"]
    line = json.loads(Path("a/pictures.jsonl").read_text().splitlines()[1])
    assert line["prompt"] == "a blue square"
    options = ["--prompt", "x", "--out", "b", "--steps", "2", "--resolution", "64"]
    assert cli.run(["generate", str(tiny_sdxl), *options]) == 0
    assert Image.open("b/0000.png").size == (64, 64)


def test_export_kohya(recipe):
    assert cli.run(["train", str(recipe), "optim.steps=1"]) == 0
    assert cli.run(["export", "runs/small", "--format", "kohya", "--out", "kohya"]) == 0
    assert any(p.suffix == ".safetensors" for p in Path("kohya").iterdir())


def test_cache_then_train_without_encoders(recipe, monkeypatch, capsys):
    assert cli.run(["cache", str(recipe)]) == 0
    assert "training: 5 pairs" in capsys.readouterr().out
    from diffalign.backbones.base import Backbone

    monkeypatch.setattr(Backbone, "pipeline", lambda self: pytest.fail("encoders were loaded"))
    assert cli.run(["train", str(recipe), "evaluation.prompts=null"]) == 0


def test_dry_run_trains_nothing(recipe, capsys):
    assert cli.run(["train", str(recipe), "trainer.beta=77", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "beta: 77" in out
    assert "label_smoothing: 0.0" in out
    assert "1.60 of 5 pairs" in out
    assert not Path("runs").exists()


def test_dry_run_of_a_model_that_is_not_here(recipe, capsys):
    assert cli.run(["train", str(recipe), "model.path=someone/absent-model", "--dry-run"]) == 0
    assert "unknown until downloaded" in capsys.readouterr().out


def test_doctor_answers_for_a_recipe(recipe, capsys, monkeypatch):
    assert cli.run(["doctor", str(recipe)]) == 0
    assert "small fits" in capsys.readouterr().out
    monkeypatch.setattr("diffalign.doctor.available_memory", lambda: 1.0)
    assert cli.run(["doctor", str(recipe)]) == 2
    assert "does not fit" in capsys.readouterr().out


def test_plan_follows_the_options(recipe):
    from diffalign.plan import plan_run

    def plan(*overrides):
        return plan_run(commands.recipe_with_overrides(str(recipe), list(overrides), None))

    base, large, full = plan(), plan("optim.batch_size=4"), plan("model.tune=full")
    assert large.memory()["activations"] == 2 * base.memory()["activations"]
    assert large.epochs == 2 * base.epochs
    assert full.network.trained == full.network.total
    assert base.network.total == full.network.total + base.network.trained
    assert full.frozen_copy
    assert not base.frozen_copy
    recomputed = plan("model.gradient_checkpointing=true")
    assert recomputed.memory()["activations"] < 0.7 * base.memory()["activations"]
    assert recomputed.flops() == pytest.approx(base.flops() * 4 / 3)
    assert plan("trainer.reference=cached").flops() == pytest.approx(base.flops() * 2 / 3)


@pytest.mark.parametrize(("name", "passes"), [("scenes/rlcm", 4), ("scenes/ddpo", 32)])
def test_plan_of_an_online_run_counts_one_pass_where_the_network_is_told_its_scale(name, passes):
    """Both are guided; only the consistency model needs no second branch."""
    from diffalign.config import load_recipe
    from diffalign.plan import plan_run

    shortened = ["trainer.sampling.steps=16"] if name == "scenes/ddpo" else []
    drawing = plan_run(load_recipe(name, [*shortened, "trainer.sampling.guidance=4"])).drawing
    assert drawing.passes == passes


def test_plan_counts_what_autograd_keeps(recipe):
    """The traced bytes are those a real forward of the same network saves, but for the attention kernel's own."""
    from diffalign.plan_network import Kept, meta_network, network_size

    config = commands.recipe_with_overrides(str(recipe), ["model.tune=full"], None)
    traced = network_size(config, torch.float32).activations
    network = meta_network(config).to_empty(device="cpu")
    kept = Kept({p.untyped_storage()._cdata for p in network.parameters()})
    cond = {"text_embeds": torch.zeros(2, 12), "time_ids": torch.zeros(2, 6)}
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x):
        network(torch.zeros(2, 4, 16, 16), torch.zeros(2), torch.zeros(2, 77, 40), added_cond_kwargs=cond)
    assert traced == pytest.approx(kept.total(), rel=0.1)


ERRORS = [
    (["train", "scenes/dpoo"], "did you mean scenes/dpo?"),
    (["train", "recipe.yaml", "optim.lrr=1"], "did you mean optim.lr?"),
    (["train", "recipe.yaml", "trainer.bta=1"], "did you mean trainer.beta?"),
    (["train", "recipe.yaml", "model.path=nowhere"], "no model at 'nowhere'"),
    (["train", "recipe.yaml", "model.path=empty"], "model_index.json"),
    (["train", "recipe.yaml", "data.source=absent.jsonl"], "no preference data at 'absent.jsonl'"),
    (["train", "recipe.yaml", "evaluation.prompts=absent.txt"], "absent.txt"),
    (["generate", "empty", "--prompt", "x"], "model_index.json"),
    (["generate", "runs/none", "--prompts", "prompts.txt"], "runs/none"),
    (["generate", "recipe.yaml"], "--prompts"),
    (["evaluate", "empty"], "not a run folder"),
    (["export", "empty"], "not a run folder"),
    (["data", "validate", "absent.parquet"], "no preference data"),
    (["recipes", "show", "sdxl/dpo"], "did you mean sdxl/dpo_"),
]


@pytest.mark.parametrize(
    ("line", "expected"), ERRORS, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_bad_input_gives_one_message_and_code_2(recipe, capsys, line, expected):
    Path("empty").mkdir()
    assert cli.run(line) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "Traceback" not in captured.err


def test_debug_shows_the_traceback(recipe):
    with pytest.raises(DiffalignError):
        cli.run(["train", "nothing", "--debug"])


def test_usage_errors_give_code_2(capsys):
    assert cli.run(["train"]) == 2
    assert cli.run(["trian"]) == 2
    assert cli.run(["export", "x", "--format", "zip"]) == 2


def test_full_disk_anywhere_gives_one_message(monkeypatch, capsys):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(commands, "list_recipes", full)
    assert cli.run(["recipes", "list"]) == 2
    assert "disk is full" in capsys.readouterr().err


def test_demo_does_not_replace_a_folder_that_is_no_demo(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("x")
    assert cli.run(["demo", "--output", str(tmp_path)]) == 2
    assert (tmp_path / "thesis.txt").is_file()


def test_interrupt_gives_130(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "list_recipes", interrupted)
    assert cli.run(["recipes", "list"]) == 130


def test_data_validate_prints_counts(recipe, capsys):
    assert cli.run(["data", "validate", "pairs.jsonl", "--held-out", "pairs.jsonl", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["records"] == 5
    assert report["overlap"] == 5


def test_score_prints_a_table_and_writes_scores(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def level(images, prompts):\n    return images.mean((1, 2, 3))\n")
    for i, shade in enumerate((0, 255)):
        Image.new("RGB", (8, 8), (shade,) * 3).save(f"{i}.png")
    line = ["score", ".", "--rewards", "mine:level,saturation", "--prompt", "a", "--out", "out/s.csv"]
    assert cli.run(line) == 0
    out = capsys.readouterr().out
    assert "level" in out
    assert "saturation" in out
    assert "0.5" in out
    assert len(Path("out/s.csv").read_text().splitlines()) == 3
    assert cli.run(["score", ".", "--rewards", "saturation,", "--prompt", "a"]) == 2
    assert "empty name" in capsys.readouterr().err
    assert cli.run(["score", ".", "--rewards", "saturation"]) == 2
    assert "has no prompt" in capsys.readouterr().err
    assert cli.run([*line[:-1], "s.txt"]) == 2
    assert ".csv or .jsonl" in capsys.readouterr().err
    Path("broken.png").write_bytes(b"x")
    assert cli.run([*line[:-2], "--on-error", "skip"]) == 0
    assert "left out: broken.png cannot be decoded" in capsys.readouterr().out


def test_rewards_lists_the_catalogue(capsys):
    assert cli.run(["rewards", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert listed["pickscore"]["backbone"].startswith("CLIP ViT-H/14")
    assert cli.run(["rewards"]) == 0
    assert "scenes-judge" in capsys.readouterr().out


def test_evaluate_prints_warnings_table_and_verdict(recipe, capsys):
    Path("mine.py").write_text("def level(images, prompts):\n    return images.mean((1, 2, 3))\n")
    assert cli.run(["train", str(recipe), "optim.steps=1", "optim.lr=1e-12"]) == 0
    capsys.readouterr()
    options = ["--rewards", "mine:level,saturation", "--seeds-per-prompt", "2"]
    assert cli.run(["evaluate", "runs/small", "--against", "runs/small", *options]) == 0
    out = capsys.readouterr().out
    assert "No difference: level is" in out
    assert "side effects: no difference in sharpness, saturation, diversity over seeds" in out
    assert "drift from the base: 0 nats" in out
    rows = [line for line in out.splitlines() if line.startswith(("level ", "saturation "))]
    assert [row.split()[-2:] for row in rows] == [["50.0", "4"], ["50.0", "4"]]


SURFACE = {
    "demo": "--output --seed --steps",
    "recipes list": "",
    "recipes show": "name",
    "recipes copy": "name target",
    "train": "--dry-run --name --resume overrides recipe",
    "cache": "overrides recipe",
    "data validate": "--format --held-out --held-out-split --json --limit --pairs --split source",
    "data relabel": (
        "--batch-size --decide-ties --dry-run --format --hard --label-noise --limit --max-uncertainty --mode "
        "--on-error --out --pairs --probability --rewards --split --temperature --threshold --trust --weights source"
    ),
    "data from-samples": (
        "--batch-size --chosen-ranks --format --guidance --min-margin --num --on-error --out --per-prompt --prompts "
        "--rejected-ranks --resolution --rewards --rule --seed --steps --temperature model"
    ),
    "data caption": "--captioner --format --limit --out --pairs --perturb --split source",
    "generate": ("--batch-size --guidance --num --out --prompt --prompts --resolution --seed --steps model"),
    "optimize": (
        "--batch-size --budget --guidance --held-out --iterations --labels --method --num-prompts --out --prompt "
        "--prompts --replay --resolution --resume --reward --seed --steps overrides target"
    ),
    "evaluate": (
        "--against --batch-size --checkpoint --drift-pictures --encoder --guidance --istd-paths --num --prompts "
        "--rewards --seed --seeds-per-prompt --steps run"
    ),
    "score": "--batch-size --on-error --out --prompt --prompts --rewards files",
    "rewards": "--json",
    "export": "--format --out run",
    "doctor": "overrides recipe",
}


def test_the_command_surface_is_frozen():
    """A new command or option is a decision, and a word here; renaming one breaks people's scripts."""
    import typer

    def walk(command, prefix=""):
        for name, sub in getattr(command, "commands", {}).items():
            if getattr(sub, "commands", None):
                yield from walk(sub, f"{name} ")
            else:
                words = [p.opts[0] if p.opts[0].startswith("-") else p.name for p in sub.params]
                yield f"{prefix}{name}", " ".join(sorted(w for w in words if w != "--help"))

    assert dict(walk(typer.main.get_command(cli.app))) == SURFACE


def test_every_command_has_help(capsys):
    for command in SURFACE:
        assert cli.run([*command.split(), "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


def test_help_loads_neither_torch_nor_pydantic():
    """What makes the answer fast; the clock itself is not tested."""
    code = (
        "import sys; from diffalign import cli; cli.run(['--help']); "
        "print([m for m in ('torch', 'diffusers', 'pydantic', 'numpy', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_version_and_module(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip().count(".") == 2
    done = subprocess.run(
        [sys.executable, "-m", "diffalign", "recipes", "list"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "scenes/dpo" in done.stdout
