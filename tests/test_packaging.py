"""The six folders are siblings on disk and one package once installed."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("algorithms", "models", "datasets", "experiments")
# Folders that stay in the repository: scripts that measure, and the tuners that they compare with.
# They run from a checkout, through the links; nothing that is installed imports them.
NOT_INSTALLED = ("experiments/benchmarks", "experiments/tuners")
NOT_NEEDED_TO_IMPORT = (
    "tensorflow_datasets",
    "wandb",
    "flax",
    "equinox",
    "haiku",
    "orbax",
    "sklearn",
)


def setup_options():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    options = setup["options"]
    package_dir = dict(
        re.split(r"\s*=\s*", line) for line in options["package_dir"].strip().splitlines()
    )
    return options["packages"].split(), package_dir


def packages_on_disk():
    """Map from package name to folder, for every installed folder that holds Python files."""
    found = {}
    for top in ("metalearn", *LINKS):
        for file in (ROOT / top).rglob("*.py"):
            folder = file.parent.relative_to(ROOT)
            if any((ROOT / part).is_symlink() for part in (folder, *folder.parents)):
                continue  # rglob follows links on some versions of Python
            if folder.as_posix() in NOT_INSTALLED:
                continue
            name = ".".join(folder.parts)
            found[name if top == "metalearn" else f"metalearn.{name}"] = folder.as_posix()
    return found


def run(*command, **kwargs):
    """The output of a command, which must succeed, without this process's PYTHONPATH."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | kwargs.pop("env", {})
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=env,
        **kwargs,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def test_every_folder_with_python_files_is_a_listed_package():
    packages, package_dir = setup_options()
    assert package_dir == packages_on_disk()
    assert sorted(packages) == sorted(package_dir)


def test_what_is_installed_imports_nothing_that_is_not():
    left_out = re.compile(r"metalearn\.experiments(\.| import .*\b)(benchmarks|tuners)\b")
    folders = packages_on_disk().values()
    files = [file for folder in folders for file in sorted((ROOT / folder).glob("*.py"))]
    imports = re.compile(r"^\s*(?:from|import) .*", re.MULTILINE)
    lines = [line for file in files for line in imports.findall(file.read_text(encoding="utf-8"))]
    assert len(lines) > 500 and not list(filter(left_out.search, lines))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["benchmarks.engines", "tuners.random_search"],
)
def test_what_is_not_installed_is_found_in_a_checkout(name):
    code = f"import importlib.util; print(importlib.util.find_spec({name!r}).origin)"
    code = code.replace(repr(name), repr(f"metalearn.experiments.{name}"))
    where = Path(run(sys.executable, "-c", code, cwd=ROOT).strip()).resolve()
    assert where == ROOT / "experiments" / f"{name.replace('.', '/')}.py"


def test_every_package_has_an_init_file():
    _, package_dir = setup_options()
    missing = [d for d in package_dir.values() if not (ROOT / d / "__init__.py").is_file()]
    assert missing == []


@pytest.mark.parametrize("name", LINKS)
def test_link_inside_metalearn_is_relative_and_leads_to_its_sibling(name):
    link = ROOT / "metalearn" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (link / "__init__.py").is_file()


def test_import_metalearn_pulls_in_no_data_model_or_logging_library(tmp_path):
    code = "import sys, metalearn; print(*sys.modules)"
    loaded = run(sys.executable, "-c", code, cwd=tmp_path).split()
    assert "metalearn.unroll" in loaded
    assert [name for name in NOT_NEEDED_TO_IMPORT if name in loaded] == []


def build_wheel(tmp_path):
    """Build from a copy without the links: the mapping in setup.cfg must be enough."""
    source = tmp_path / "source"

    def ignore(folder, names):
        return [n for n in names if n == "__pycache__" or (Path(folder) / n).is_symlink()]

    for top in ("metalearn", *LINKS):
        shutil.copytree(ROOT / top, source / top, ignore=ignore)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path)
    run(*build, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    return wheel


def install(wheel, folder):
    """A fresh environment with the wheel, which borrows this one's dependencies."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    # A path named in a .pth file is searched last and its own .pth files are not run, so
    # an editable install of metalearn that lives there does not leak.
    site_packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    borrowed = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (site_packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    return python


@pytest.mark.slow
def test_wheel_holds_one_package_and_trains_a_step_outside_the_checkout(tmp_path):
    wheel = build_wheel(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"metalearn"}

    tracked_data = {f"metalearn/datasets/{p.name}" for p in (ROOT / "datasets").glob("*.json")}
    configs = {
        f"metalearn/experiments/configs/{p.name}"
        for p in (ROOT / "experiments" / "configs").glob("*.py")
    }
    assert {"metalearn/py.typed"} | tracked_data | configs <= set(names)
    assert not [name for name in names for left in NOT_INSTALLED if left in name]

    python = install(wheel, tmp_path / "venv")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = run(python, "-c", "import metalearn; print(metalearn.__file__)", cwd=elsewhere)
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")

    run(
        python.parent / "metalearn",
        "train",
        "--config=maml_digits",
        "--config.steps=1",
        f"--workdir={elsewhere / 'run'}",
        cwd=elsewhere,
        env={"WANDB_MODE": "offline", "JAX_PLATFORMS": "cpu"},
    )
    assert any((elsewhere / "run").iterdir())


def test_no_tracked_file_names_a_path_of_someones_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = run("git", "ls-files", "-z", cwd=ROOT)
    machine_path = re.compile(r"(?<![\w.~])[/](?:root|home|tmp)[/]")
    found = []
    for name in filter(None, listed.split("\0")):
        file = ROOT / name
        if file.is_symlink() or not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{name}: {line}" for line in text.splitlines() if machine_path.search(line)]
    assert found == []
