"""The documentation site: every public name is in the reference, and no link is dead."""

import dataclasses
import importlib
import importlib.util
import inspect
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from metalearn.experiments.build.reference import KINDS, arguments_of

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PUBLIC = (
    *("metalearn", "metalearn.algorithms", "metalearn.models", "metalearn.datasets"),
    *("metalearn.engines", "metalearn.optimizers", "metalearn.loggers", "metalearn.checkpoints"),
    *(f"metalearn.models.{library}_networks" for library in ("linen", "nnx", "haiku")),
)
WITHOUT_PAGE = {"__version__"}
OF_FLAX = {"name", "parent"}  # fields that linen adds to its modules


def public_names():
    """Return {what a name stands for: how it is imported}, of all public names."""
    return {
        f"{module}.{name}": getattr(importlib.import_module(module), name)
        for module in PUBLIC
        for name in importlib.import_module(module).__all__
        if name not in WITHOUT_PAGE
    }


def reference():
    """Return what the directives of the reference name: {import path: object}."""
    pages = [page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md")]
    paths = [path for page in pages for path in re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)]
    assert len(paths) == len(set(paths)), "a name is twice in the reference"
    return {path: located(path) for path in paths}


def located(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_every_public_name_is_in_the_reference_once():
    there = [id(value) for value in reference().values()]
    missing = [name for name, value in public_names().items() if id(value) not in there]
    assert not missing, "add `::: NAME` to a page in docs/reference/"
    assert len(public_names()) > 130


def test_every_field_of_a_public_dataclass_is_explained():
    unexplained = []
    for path, value in {**public_names(), **reference()}.items():
        if not (isinstance(value, type) and dataclasses.is_dataclass(value)):
            continue
        explained = {
            name
            for base in value.__mro__[:-1]
            for name in (*arguments_of(base), *commented_fields(base))
        }
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        unexplained += [f"{path}.{name}" for name in fields if name not in {*explained, *OF_FLAX}]
    assert not unexplained


def commented_fields(cls):
    """Return the fields of a class with a comment beside them, `count: jax.Array  # (): steps`."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return []
    return re.findall(r"^    (\w+): [^\n#]+  # ", source, re.MULTILINE)


def test_the_config_reference_holds_every_kind_of_name():
    page = (DOCS / "reference" / "configs.md").read_text(encoding="utf-8")
    assert re.findall(r"<!-- keys: ([\w ]+) -->", page) == [
        *("algorithms", "datasets", "models", "engines", "optimizers"),
        *("outer optimizers", "objectives", "configs"),
    ]
    assert len(KINDS) == 8


LINK = re.compile(r"(?<!`)\[[^\]]+\]\(([^)\s]+)\)")
FENCED = re.compile(r"```.*?```", re.DOTALL)
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])


def headings(text):
    """Return the anchors of a page, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def dead_links(page):
    """Return the links of a page that lead nowhere in the repository."""
    dead = []
    for link in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = link.partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        file = (page.parent / path) if path else page
        if not file.exists() or not file.resolve().is_relative_to(ROOT):
            dead.append(link)
        elif anchor and anchor not in headings(file.read_text(encoding="utf-8")):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_of_a_page_is_dead(page):
    assert dead_links(page) == []


def test_a_dead_link_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# A title: two\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](gone.md) [c](other.md#a-title-two) [d](other.md#gone) [e](#gone)\n"
        "```python\nx = table[0](nothing.md)\n```\n[f](https://example.org/gone)\n"
    )
    assert dead_links(page) == ["gone.md", "other.md#gone", "#gone"]


class IgnoreTags(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags name Python objects."""


IgnoreTags.add_multi_constructor("", lambda loader, tag, node: tag)


def site_config():
    return yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), IgnoreTags)  # noqa: S506


def in_navigation(entries):
    for entry in entries:
        if isinstance(entry, str):
            yield entry
            continue
        for value in entry.values():
            yield from [value] if isinstance(value, str) else in_navigation(value)


def test_every_page_is_in_the_navigation_once():
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    pages += [str(page.relative_to(DOCS).with_suffix(".md")) for page in DOCS.rglob("*.ipynb")]
    assert sorted(in_navigation(site_config()["nav"])) == sorted(
        [*pages, "changelog.md", "contributing.md"]
    )


def test_the_site_requests_no_fonts_and_no_analytics():
    config = site_config()
    assert config["theme"]["font"] is False and config["strict"] is True
    assert "analytics" not in config["extra"] and "extra_javascript" not in config


def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_that_leave_the_documentation_become_text_on_the_site():
    pytest.importorskip("mkdocs")
    mended = hooks().with_site_links
    page = "[data](data.md#text), [a config](../experiments/configs/maml_digits.py), [c](#x)"
    assert mended(page, "docs") == "[data](data.md#text), a config, [c](#x)"
    changes = "[runs](docs/runs.md), [how](CONTRIBUTING.md), [web](https://example.org/docs/a.md)"
    assert mended(changes, "") == (
        "[runs](runs.md), [how](contributing.md), [web](https://example.org/docs/a.md)"
    )
    assert mended("[c](../../CHANGELOG.md)", "docs/reference") == "[c](../changelog.md)"


def test_keys_and_commands_are_put_into_a_page():
    pytest.importorskip("mkdocs")
    filled_in = hooks().filled_in
    engines = filled_in("before\n\n<!-- keys: engines -->\n\nafter")
    assert engines.startswith("before\n\n### ") and engines.endswith("\n\nafter")
    assert "| `micro_batches` | integer |" in engines
    commands = filled_in("<!-- commands -->")
    assert "### metalearn train\n\nTrain the config in the workdir" in commands
    assert "--workdir" in commands


def test_a_notebook_becomes_a_page_with_its_outputs(tmp_path):
    pytest.importorskip("mkdocs")
    code = {"cell_type": "code", "source": ["1 +\n", "1"]}
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["hello\n"]},
        {"output_type": "execute_result", "data": {"text/plain": ["2"]}},
        {"output_type": "display_data", "data": {"image/png": "aGk=\n", "text/plain": "<Figure>"}},
    ]
    cells = [{"cell_type": "markdown", "source": ["# A title"]}, {**code, "outputs": outputs}]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    assert hooks().notebook(tmp_path / "a.ipynb") == (
        "# A title\n\n```python\n1 +\n1\n```\n\n```text\nhello\n```\n\n```text\n2\n```\n\n"
        '<img alt="&lt;Figure&gt;" src="data:image/png;base64,aGk=">\n'
    )


def external(html):
    """Return what a page of HTML loads from another host."""
    loading = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", html)
    urls = [re.search(r"\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)", tag) for tag in loading]
    return [url[1] for url in urls if url]


def test_what_loads_from_another_host_is_seen():
    assert external('<script src="https://cdn.example.org/a.js"></script><img src=//b.org/c>') == [
        "https://cdn.example.org/a.js",
        "//b.org/c",
    ]
    assert external('<a href="https://example.org">a link</a><img src="pictures/a.png">') == []


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_another_host(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 30
    assert [url for page in pages for url in external(page.read_text(encoding="utf-8"))] == []
    trainer = (tmp_path / "site" / "reference" / "trainer.html").read_text(encoding="utf-8")
    assert "tasks whose meta-gradients an outer step averages" in trainer
    shutil.rmtree(tmp_path / "site")
