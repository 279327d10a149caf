"""What `mkdocs build` adds to the pages of docs/.

- `changelog.md` and `contributing.md`: the files of those names at the root of the repository.
- A page for each notebook, with its text, code and outputs.
- Links that leave docs/ (to a config, a folder of the source) are right where the repository is
  browsed; the site does not hold those files, so that only the link's text is left there.
- `<!-- keys: KIND -->` in a page becomes the names of that kind with their keys, and
  `<!-- commands -->` the commands of the command line, both made from the code.
"""

from __future__ import annotations

import html
import json
import pathlib
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mkdocs.structure.files import File, Files

DOCS = pathlib.Path(__file__).resolve().parent
ROOT = DOCS.parent
AT_THE_ROOT = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages whose files lie at the root of the repository."""
    for name, page in AT_THE_ROOT.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=with_site_links(text, source="")))
    for path in sorted((DOCS / "notebooks").glob("*.ipynb")):
        page = path.relative_to(DOCS).with_suffix(".md").as_posix()
        files.append(File.generated(config, page, content=notebook(path)))
    return files


def notebook(path: pathlib.Path) -> str:
    """Return a notebook as a page."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] != "code":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        parts += [part for output in cell["outputs"] for part in shown(output)]
    return "\n\n".join(parts) + "\n"


def shown(output: Mapping[str, Any]) -> Iterator[str]:
    """Yield the picture of an output of a cell, or else its text."""
    data = output.get("data", {})
    text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
    if "image/png" in data:
        png = "".join(data["image/png"]).replace("\n", "")
        yield f'<img alt="{html.escape(text)}" src="data:image/png;base64,{png}">'
    elif text:
        yield f"```text\n{text}\n```"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put in what is made from the code, and mend the links that leave docs/."""
    if page.file.src_uri in AT_THE_ROOT.values():
        return markdown
    source = posixpath.join("docs", page.file.src_uri)
    return with_site_links(filled_in(markdown), posixpath.dirname(source))


def with_site_links(markdown: str, source: str) -> str:
    """Return a page with the links of the repository as links of the site.

    Args:
      markdown: of a file.
      source: the folder of the file, from the root of the repository; "": the root.

    >>> with_site_links("[runs](docs/runs.md), [a config](experiments/main.py)", source="")
    '[runs](runs.md), a config'
    >>> with_site_links("[the changes](../CHANGELOG.md)", source="docs")
    '[the changes](changelog.md)'
    """

    def mended(link: re.Match[str]) -> str:
        text, target = link.groups()
        path, hash_sign, anchor = target.partition("#")
        if not path or "://" in path:
            return link[0]
        path = re.sub(r"\.ipynb$", ".md", path)
        whole = posixpath.normpath(posixpath.join(source, path))
        if whole in AT_THE_ROOT:
            whole = posixpath.join("docs", AT_THE_ROOT[whole])
        if not whole.startswith("docs/"):
            return text
        folder = source if source.startswith("docs") else "docs"
        return f"[{text}]({posixpath.relpath(whole, folder)}{hash_sign}{anchor})"

    return LINK.sub(mended, markdown)


def filled_in(markdown: str) -> str:
    """Return a page with its comments replaced by what is made from the code."""
    if "<!-- " not in markdown:
        return markdown
    markdown = re.sub(r"<!-- keys: ([\w ]+) -->", lambda comment: keys(comment[1]), markdown)
    return re.sub(r"<!-- commands -->", lambda comment: commands(), markdown)


def keys(kind: str) -> str:
    """Return every name of a kind of things that a config may name, with its keys."""
    from metalearn.experiments.build import reference

    names = reference.KINDS[kind].names()
    named = [entry for name in names for entry in reference.described(name)]
    return reference.markdown(entry for entry in named if entry.kind == kind)


def commands() -> str:
    """Return every command of the command line: what it does, and its options."""
    from metalearn.experiments import main

    helps = {name: main.help_of(name).partition("\n\n") for name in main.COMMANDS}
    return "\n\n".join(
        f"### {first.partition(':')[0]}\n\n{first.partition(': ')[2]}\n\n```text\n{options}\n```"
        for first, _, options in helps.values()
    )
