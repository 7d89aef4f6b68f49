"""What is installed: every package and data file, one version everywhere, a light import, a wheel that works by itself."""

import ast
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from fnmatch import fnmatch
from importlib.metadata import entry_points, requires, version
from pathlib import Path

import pytest

import hf_longctx

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
SOURCES = {"hf_longctx": "hf_longctx", "hf_longctx.cli": "cli", "hf_longctx.recipes": "recipes"}  # package -> where it lies


def in_git() -> list[str]:
    """The files of this checkout: those that git knows or would add."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def installed_name(path: str) -> str:
    """Where a file of the checkout lies in the wheel."""
    top, _, rest = path.partition("/")
    home = next(package for package, folder in SOURCES.items() if folder == top)
    return f"{home.replace('.', '/')}/{rest}"


@pytest.fixture(scope="module")
def shipped() -> list[str]:
    """The files of the checkout that belong in the wheel, as they are named there."""
    return sorted(installed_name(name) for name in in_git() if name.partition("/")[0] in SOURCES.values())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of a clean copy, so that nothing left over from an earlier build gets into it; setuptools comes with the test extra."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in in_git():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The Python of an environment that holds the wheel, and everything else from the one that runs the tests."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as file:
        file.extractall(packages)
    rest = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    # After our own folder; plain paths, so that the .pth file of an editable install there is not read.
    (packages / "rest.pth").write_text("\n".join(rest), encoding="utf-8")
    return folder / "bin" / "python"


def run(python: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([str(python), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_list_of_packages_is_that_of_the_tree():
    found = {installed_name(name).rpartition("/")[0].replace("/", ".") for name in in_git() if re.match(r"(hf_longctx|cli|recipes)/.*\.py$", name)}
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)
    assert SETUPTOOLS["package-dir"] == {package: folder for package, folder in SOURCES.items() if package != folder}


def test_package_data_covers_every_file_that_is_not_python(shipped):
    data = SETUPTOOLS["package-data"]
    others = [name for name in shipped if not name.endswith(".py")]
    assert any(name.endswith(".yaml") for name in others)
    assert "hf_longctx/py.typed" in others
    assert "hf_longctx/demo_model/config.json" in others
    for name in others:
        package = max((p for p in data if name.startswith(p.replace(".", "/") + "/")), key=len)
        inside = name.removeprefix(package.replace(".", "/") + "/")
        assert any(fnmatch(inside, pattern) for pattern in data[package]), f"{name} would be left out of the wheel"


def test_there_is_one_version():
    entries = re.findall(r"^## \[(\d[^\]]*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert entries[0][0] == PROJECT["project"]["version"] == hf_longctx.__version__ == version("hf-longctx")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", entries[0][1])
    assert [number for number, _ in entries] == sorted((n for n, _ in entries), key=lambda n: [*map(int, n.split("."))], reverse=True)


def test_the_entry_point_is_the_command_line():
    (found,) = entry_points(group="console_scripts", name="longctx")
    assert found.value == "hf_longctx.cli.main:main"
    assert callable(found.load())


@pytest.mark.parametrize("module", ["hf_longctx", "hf_longctx.cli.main", "hf_longctx.method", "hf_longctx.schema"])
def test_importing_costs_no_torch(module, tmp_path):
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'peft', 'datasets', 'matplotlib') if m in sys.modules])"
    assert run(Path(sys.executable), "-c", code, cwd=tmp_path).stdout.strip() == "[]"


def test_every_import_is_a_declared_dependency():
    """Or one of Transformers itself, such as tokenizers."""
    imported = set()
    for name in in_git():
        if re.match(r"(hf_longctx|cli)/.*\.py$", name):
            for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
                imported |= {module.partition(".")[0] for module in names if module}
    extras = PROJECT["project"]["optional-dependencies"]
    through = [each for each in requires("transformers") if "extra ==" not in each]
    declared = [*PROJECT["project"]["dependencies"], *extras["gguf"], *extras["kernels"], *extras["lm-eval"], *through]
    modules = {re.match(r"[\w-]+", each)[0].replace("-", "_").lower() for each in declared} | {"ruamel"}
    assert imported - set(sys.stdlib_module_names) - {"hf_longctx"} <= modules


def test_the_wheel_holds_every_file_and_nothing_else(wheel, shipped):
    with zipfile.ZipFile(wheel) as file:
        names = sorted(name for name in file.namelist() if ".dist-info/" not in name and not name.endswith("/"))
        licences = [name for name in file.namelist() if name.endswith("licenses/LICENSE")]
    assert names == shipped
    assert {name.partition("/")[0] for name in names} == {"hf_longctx"}
    assert licences


def test_the_wheel_works_outside_of_the_checkout(installed, tmp_path):
    where = run(installed, "-c", "import hf_longctx, hf_longctx.cli.main as m; print(hf_longctx.__file__); print(m.__file__)", cwd=tmp_path)
    for line in where.stdout.splitlines():
        assert line.startswith(str(installed.parents[1])), where.stderr
    assert where.returncode == 0
    done = run(installed, "-m", "hf_longctx.cli", "--version", cwd=tmp_path)
    assert (done.stdout.strip(), done.returncode) == (hf_longctx.__version__, 0)
    done = run(installed, "-m", "hf_longctx.cli", "methods", "yarn", "--json", cwd=tmp_path)
    assert '"yarn"' in done.stdout


def test_recipes_and_the_demo_model_are_found_in_the_wheel(installed, tmp_path):
    names = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    code = (
        "import hf_longctx.recipe as r, hf_longctx.demo as d, sys\n"
        "for name in r.recipe_names(): r.read_recipe(name); print(name)\n"
        "assert r.SHIPPED.is_relative_to(sys.prefix), r.SHIPPED\n"
        "assert (d.MODEL / 'model.safetensors').is_file() and d.MODEL.is_relative_to(sys.prefix)\n"
    )
    done = run(installed, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == names


@pytest.mark.parametrize("name", ["cli", "recipes", "tests"])
def test_no_folder_of_ours_becomes_a_package_of_its_own(installed, tmp_path, name):
    code = f"import importlib.util as u, sys; s = u.find_spec({name!r}); sys.exit(s is not None and str(s.origin).startswith(sys.prefix))"
    assert run(installed, "-c", code, cwd=tmp_path).returncode == 0
