"""What the README and the demo tell users to type: it parses, and what it names exists."""

import ast
import importlib
import inspect
import json
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path

import pytest
import typer

import hf_longctx
from hf_longctx.cli.main import app, parse_spec
from hf_longctx.demo import NEXT
from hf_longctx.method import describe, load_methods, method_class, method_names
from hf_longctx.recipe import parse_recipe, recipe_names
from hf_longctx.task import load_tasks, task_class, task_names

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = typer.main.get_command(app)


@cache
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(language: str) -> list[str]:
    """Fenced blocks that are marked with exactly this language."""
    return [body for found, body in re.findall(r"^```(\w*)\n(.*?)^```", readme(), re.M | re.S) if found == language]


def inline_code() -> list[str]:
    text = re.sub(r"^```.*?^```", "", readme(), flags=re.M | re.S)
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", text)]


def command_lines(text: str) -> list[str]:
    """The `longctx ...` in a block of shell: comments and what stands before && left out."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    parts = [part.strip() for line in lines for part in re.split(r"&&|;|\|", re.sub(r"(^|\s)#.*", "", line))]
    return [part for part in parts if part.split()[:1] == ["longctx"]]


def parse(line: str) -> dict:
    """Read a command line as `longctx` would, and run nothing. Raises what it would refuse it with."""
    words = shlex.split(line)[1:]
    with COMMANDS.make_context("longctx", words[:1]) as context:
        if words[0].startswith("-"):
            return context.params
    assert words[0] in COMMANDS.commands, f"{line!r}: there is no such command"
    with COMMANDS.commands[words[0]].make_context(words[0], words[1:]) as context:
        return context.params


def methods_table() -> str:
    """The README's table of methods, from the registry."""
    lines = ["| method | slot | what it does | source |", "| --- | --- | --- | --- |"]
    for found in (describe(method_class(name)) for name in method_names()):
        lines.append(f"| `{found['name']}` | {', '.join(found['slots'])} | {first_sentence(found['formula'])} | {source_link(found['paper'])} |")
    return "\n".join(lines)


def first_sentence(text: str, limit: int = 140) -> str:
    """Up to the first full stop; a longer one up to its last comma or semicolon before `limit`."""
    sentence = re.split(r"\.(?:\s|$)", text)[0]
    if len(sentence) > limit:
        cuts = [m.start() for m in re.finditer(r"[,;] ", sentence) if m.start() <= limit]
        sentence = sentence[: cuts[-1]] if cuts else sentence[:limit]
    return sentence.replace("|", "\\|")


def source_link(paper: str) -> str:
    if paper.startswith("arXiv:"):
        return f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"
    return f"[{paper.split('/')[2].removeprefix('www.')}]({paper})" if paper else ""


def test_the_table_of_methods_is_that_of_the_registry():
    between = re.search(r"<!-- methods -->\n(.*?)<!-- /methods -->", readme(), re.S)
    assert between, "README.md has no <!-- methods --> and <!-- /methods -->"
    table = methods_table()
    assert between[1].strip() == table, f"paste this between the markers:\n\n{table}\n"


def test_the_table_of_tasks_names_every_task():
    table = readme().partition("| task |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.M)) == task_names()


def all_command_lines() -> list[str]:
    return [line for block in [*code_blocks(""), *code_blocks("sh"), *code_blocks("bash"), NEXT] for line in command_lines(block)]


def test_every_command_line_parses_and_names_what_exists():
    lines = all_command_lines()
    assert len(lines) >= 8
    for line in lines:
        found = parse(line)
        load_methods([parse_spec(text) for text in found.get("method") or []])
        for text in found.get("task") or []:
            load_tasks([parse_spec(text)])
        recipe = found.get("recipe")
        assert recipe is None or recipe in recipe_names() or recipe.endswith(".yaml"), line


def test_every_command_in_running_text_parses():
    for line in inline_code():
        words = line.split()
        if words[0] != "longctx":
            continue
        if len(words) == 2:  # a verb by itself
            assert words[1] in COMMANDS.commands or words[1].startswith("--"), line
        elif words[1:] and "..." not in line:
            parse(line)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("longctx pach x", "pach"),
        ("longctx patch x --outt y", "outt"),
        ("longctx eval x --out y", "lengths"),
        ("longctx merge a --out b --base", "base"),
    ],
)
def test_the_dry_parse_finds_mistakes(line, wrong):
    with pytest.raises(Exception, match=wrong):
        parse(line)


def test_command_lines_are_found_in_shell():
    assert command_lines("pip install . && longctx demo  # minutes\n# longctx no\nlongctx patch a \\\n  --out b\nlongctxx\n") == ["longctx demo", "longctx patch a    --out b"]


def test_every_relative_link_and_path_exists():
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", readme()) if "://" not in link]
    top = {path.name for path in ROOT.iterdir()}
    paths = [code for code in inline_code() if re.fullmatch(r"[\w./-]+", code) and code.split("/")[0] in top]
    assert len(paths) >= 3
    for path in [*links, *paths]:
        assert (ROOT / path).exists(), f"README.md names {path}, which does not exist"


def test_recipes_are_all_named_and_all_exist():
    text = readme()
    for name in recipe_names():
        assert f"`{name}`" in text, f"README.md does not mention the recipe {name}"
    shipped = re.search(r"^Shipped:(.*?)\n\n", text, re.M | re.S)
    assert set(re.findall(r"`([\w.-]+)`", shipped[1])) == set(recipe_names())


def test_yaml_blocks_are_recipes():
    from ruamel.yaml import YAML

    blocks = code_blocks("yaml")
    assert blocks
    for block in blocks:
        parse_recipe(YAML(typ="safe", pure=True).load(block), "README.md").load_methods()


def test_python_blocks_call_what_exists_with_arguments_that_fit():
    calls = 0
    for block in code_blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hf_longctx":
                assert node.attr in hf_longctx.__all__, f"hf_longctx.{node.attr} is not public"
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("hf_longctx."):
                function = getattr(hf_longctx, node.func.attr)
                inspect.signature(function).bind(*node.args, **{k.arg: k.value for k in node.keywords})
                calls += 1
    assert calls >= 4


def test_extras_that_are_named_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for name in re.findall(r"(?:hf-longctx|\.)\[(\w+)\]", readme()):
        assert name in extras


def lab_sections() -> list[str]:
    """Sections of recipes/lab/README.md whose tables come from a file of runs beside it."""
    return [part for part in re.split(r"^## ", (ROOT / "recipes/lab/README.md").read_text(encoding="utf-8"), flags=re.M) if "--runs" in part]


@pytest.mark.parametrize("section", lab_sections(), ids=lambda text: text.splitlines()[0][:30])
def test_tables_of_the_lab_are_what_its_runs_say(section, capsys, monkeypatch):
    """Each command with --runs prints, with --table, the rows of the tables that follow it, and leaves out none of the runs that are kept."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "tests/benchmarks")
    parts = re.split(r"^```\n(python tests/benchmarks/\w+\.py .*?)^```$", section, flags=re.M | re.S)
    for command, text in zip(parts[1::2], parts[2::2], strict=True):
        if "--runs" not in command:
            continue
        script, *arguments = shlex.split(command.replace("\\\n", " "))[1:]
        importlib.import_module(Path(script).stem).main([*arguments, "--table"])
        printed = capsys.readouterr().out.splitlines()
        rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
        assert rows
        for row in rows:
            assert row in printed
        shown = set(arguments[arguments.index("--rows") + 1].split(","))
        kept = json.loads((ROOT / arguments[arguments.index("--runs") + 1]).read_text())["runs"]
        assert {re.split("[ @]", name)[0] for name in kept} == shown


def test_nothing_was_left_to_fill_in():
    assert not re.findall(r"^[A-Z_]{4,}$|TODO|FIXME|XXX", readme(), re.M)


@pytest.mark.parametrize("name", sorted(hf_longctx.__all__))
def test_public_names_resolve_and_are_documented(name):
    value = getattr(hf_longctx, name)
    assert name in dir(hf_longctx)
    if name != "__version__":
        assert value.__doc__, f"{name} has no docstring"
        assert not value.__doc__.startswith(f"{name}("), f"{name} has the docstring that dataclass made up"


@pytest.mark.parametrize("name", method_names())
def test_every_method_says_what_it_is(name):
    found = describe(method_class(name))
    assert found["formula"]
    assert found["paper"] or name == "plain"


@pytest.mark.parametrize("name", task_names())
def test_every_task_says_what_it_is(name):
    cls = task_class(name)
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}(")
    assert cls.source
