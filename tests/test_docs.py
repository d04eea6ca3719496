"""The documentation names commands, options, keys and files that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from diffalign.cli import app
from diffalign.config import RunConfig, load_recipe, trainer_config
from diffalign.recipes import recipe_names, shipped_text
from diffalign.trainers import TRAINERS, trainer_class
from diffalign.validation import dotted_fields

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
OPTIONS = {key for method in TRAINERS for key in dotted_fields(trainer_class(method).Config, "trainer")}
KEYS = {*dotted_fields(RunConfig), *OPTIONS}
TRAINED = ("train", "cache", "doctor")


def command_lines() -> list[str]:
    """Every line of a code block, or code in the text, that calls diffalign."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = "\n".join(re.findall(r"```\n(.*?)```", text, re.DOTALL))
        lines = blocks.splitlines() + re.findall(r"`(diffalign [^`]+)`", text)
        found += [line.split("#")[0].strip() for line in lines if re.match(r"(diffalign|accelerate) ", line)]
    return sorted({re.sub(r"^accelerate .* -m ", "", line) for line in found})


def parsed(arguments: list[str]) -> tuple[list[str], dict]:
    """Names of the commands on the way, and the values of the last one's parameters; nothing is run."""
    command, names = typer.main.get_command(app), []
    while hasattr(command, "commands") and arguments:
        names.append(arguments[0])
        command, arguments = command.commands[arguments[0]], arguments[1:]
    # A bare name is a mention, not a line to type.
    return names, command.make_context(names[-1], list(arguments)).params if arguments else {}


def test_pages_are_there_and_hold_commands():
    assert {page.name for page in PAGES} >= {"user_guide.md", "architecture.md", "diffusion_dpo.md"}
    assert len(command_lines()) > 25


@pytest.mark.parametrize("line", command_lines())
def test_commands_can_be_typed(line):
    placeholders = {"RECIPE": "scenes/dpo", "RUN": "runs/demo", "optim.steps=N": "optim.steps=9"}
    words = [placeholders.get(word, word) for word in shlex.split(line)[1:]]
    if words == ["--help"]:
        return
    names, values = parsed(words)
    if names[0] in TRAINED and values.get("recipe") in recipe_names():
        trainer_config(load_recipe(values["recipe"], values["overrides"] or []))
    elif names[0] == "recipes" and values:
        assert shipped_text(values["name"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_files_and_links_exist(page):
    text = page.read_text(encoding="utf-8")
    sections = r"`((?:model|data|trainer|optim|checkpoint|evaluation)\.[a-z_.]+)"
    keys = {key.rstrip(".") for key in re.findall(sections, text)} - {"evaluation.json"}
    assert keys <= KEYS, sorted(keys - KEYS)
    files = set(re.findall(r"`((?:diffalign|trainers|rewards|samples|tests|configs)/[\w/.-]+\.\w+)`", text))
    assert [name for name in files if "NNN" not in name and not (ROOT / name).is_file()] == []
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).is_file()] == []
