"""`diffalign optimize` from a person's side: recipes, options, files, messages."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from few_steps import PROMPTS, folder
from PIL import Image
from safetensors.torch import load_file

from diffalign import cli
from diffalign.evaluation.pictures import read_picture
from diffalign.inference.config import load_optimize_recipe, optimize_config
from diffalign.inference.methods import METHODS, method_config
from diffalign.recipes import optimize_names, shipped_text, summary

ASKED = [word for prompt in PROMPTS for word in ("--prompt", prompt)]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A random SDXL-Turbo; the working folder is the test's."""
    monkeypatch.chdir(tmp_path)
    return str(folder("sdxl-turbo"))


def pixels(path):
    return (read_picture(Path(path)) * 255).round()


def test_from_prompt_to_pictures_that_generate_and_diffusers_make_too(model, capsys):
    line = ["optimize", model, *ASKED, "--reward", "brightness", "--held-out", "saturation,sharpness"]
    assert cli.run([*line, "--iterations", "5", "--out", "o/mine", "method.lr=3"]) == 0
    out = capsys.readouterr().out
    assert "brightness" in out
    assert "5 network evaluations and 4 backward ones per picture" in out
    result = json.loads(Path("o/mine/result.json").read_text())
    assert result["method"]["lr"] == 3
    assert all(p["reward"]["after"] > p["reward"]["before"] for p in result["prompts"])
    assert set(result["summary"]) == {"brightness", "saturation", "sharpness"}

    assert cli.run(["generate", model, *ASKED, "--steps", "1", "--guidance", "0", "--out", "plain"]) == 0
    assert float((pixels("plain/0001.png") - pixels("o/mine/before/0001.png")).abs().max()) <= 1

    assert cli.run(["optimize", "--replay", "o/mine/noise.safetensors", "--out", "again"]) == 0
    assert float((pixels("again/0001.png") - pixels("o/mine/after/0001.png")).abs().max()) <= 1

    latents = load_file("o/mine/noise.safetensors")["latents"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    drawn = pipeline(PROMPTS, latents=latents, num_inference_steps=1, guidance_scale=0.0, output_type="pt")
    same = (drawn.images[1] * 255).round() - pixels("o/mine/after/0001.png")
    assert float(same.abs().max()) <= 1
    assert not torch.equal(pixels("o/mine/after/0001.png"), pixels("o/mine/before/0001.png"))


def test_a_search_by_any_function_within_a_budget(model):
    Path("mine.py").write_text("def level(images, prompts):\n    return images.mean((1, 2, 3))\n")
    line = ["optimize", model, *ASKED, "--reward", "mine:level", "--method", "zero_order", "--budget", "8"]
    assert cli.run([*line, "--out", "found"]) == 0
    result = json.loads(Path("found/result.json").read_text())
    assert result["cost"]["evaluations"] == 8
    assert Image.open("found/comparison.png").width > 100


def test_an_interrupt_saves_the_best_so_far(model, monkeypatch):
    from diffalign.inference.trace import Trace

    saw = Trace.saw

    def interrupted(trace, *arguments):
        if len(trace.points) == 2:
            raise KeyboardInterrupt
        saw(trace, *arguments)

    monkeypatch.setattr(Trace, "saw", interrupted)
    assert cli.run(["optimize", model, *ASKED, "--reward", "brightness", "--out", "cut"]) == 130
    result = json.loads(Path("cut/result.json").read_text())
    assert result["stopped"] == "interrupted"
    assert len(result["trajectory"]) == 2
    assert Path("cut/after/0001.png").is_file()


ERRORS = [
    (["--prompt", "x"], "no reward to optimise; give --reward"),
    (["--reward", "brightness"], "give --prompt TEXT"),
    (["--prompt", "x", "--prompts", "y.txt", "--reward", "brightness"], "not both"),
    (["--prompt", "x", "--reward", "brightnes"], "Did you mean 'brightness'?"),
    (["--prompt", "x", "--reward", "jpeg-compressibility"], "method reno needs gradients"),
    (["--prompt", "x", "--reward", "brightness", "--method", "reeno"], "Did you mean 'reno'?"),
    (["--prompt", "x", "--reward", "brightness", "--budget", "soon"], "such as 200, or seconds such as 30s"),
    (["generation.step=2"], "did you mean generation.steps?"),
    (["--prompt", "x", "--reward", "brightness", "method.lrr=2"], "method.lrr"),
]


@pytest.mark.parametrize(
    ("line", "expected"), ERRORS, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_bad_input_gives_one_message(model, capsys, line, expected):
    assert cli.run(["optimize", model, *line]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("error:") == 1


def test_nothing_to_do_and_wrong_places(tmp_path, capsys):
    assert cli.run(["optimize"]) == 2
    assert "give a recipe, a model, or --replay FILE" in capsys.readouterr().err
    assert cli.run(["optimize", "optimize/tiny_lmc"]) == 2
    assert cli.run(["train", "optimize/tiny_lcm"]) == 2
    assert "trains nothing; run it with: diffalign optimize optimize/tiny_lcm" in capsys.readouterr().err


@pytest.mark.parametrize("name", optimize_names())
def test_every_recipe_is_valid_and_says_how_to_run_it(name):
    config = load_optimize_recipe(name)
    assert method_config(config.method).method in METHODS
    assert f"diffalign optimize {name}" in shipped_text(name)
    assert len(summary(name)) > 20
    assert config.held_out


def test_recipes_are_there():
    wanted = {"sdxl_turbo", "lcm", "sd35", "flux_schnell", "tiny_lcm", "tiny_sdxl", "tiny_sd3"}
    assert {f"optimize/{name}" for name in wanted} <= set(optimize_names())


def test_another_method_drops_the_options_of_the_first():
    config = load_optimize_recipe("optimize/tiny_lcm", ["method.method=zero_order", "method.cosine=0.9"])
    assert config.method == {"method": "zero_order", "cosine": 0.9}
    kept = load_optimize_recipe("optimize/tiny_lcm", ["method.method=reno", "method.lr=2"])
    assert (kept.method["clip"], kept.method["lr"]) == (0.1, 2)


def test_a_list_of_prompts_is_taken_as_it_is():
    values = {"model": {"path": "x"}}
    config = optimize_config(values, ['prompts=["a: b", "it\'s, c"]'], "test")
    assert config.prompts == ["a: b", "it's, c"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_lcm", "tiny_sdxl", "tiny_sd3"])
def test_recipes_of_the_embedded_world_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--num-prompts", "2", "--batch-size", "2", "--budget", "64" if name != "tiny_lcm" else "3"]
    assert cli.run(["optimize", f"optimize/{name}", *short, "--out", "o"]) == 0
    assert json.loads(Path("o/result.json").read_text())["cost"]["evaluations"] > 0
