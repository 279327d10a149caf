"""What `mkdocs build` adds to the pages of docs/.

- `changelog.md` and `contributing.md`: the files of those names at the root of the repository.
- Links that leave docs/ (to a config, a folder of the source) are right where the repository is
  browsed; the site does not hold those files, so that only the link's text is left there.
- `<!-- keys: KIND -->` in a page becomes the names of that kind with their keys, and
  `<!-- commands -->` the commands of the command line, both made from the code.
"""

from __future__ import annotations

import pathlib
import posixpath
import re
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parent.parent
AT_THE_ROOT = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages whose files lie at the root of the repository."""
    for name, page in AT_THE_ROOT.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=with_site_links(text, source="")))
    return files


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

    >>> with_site_links("[runs](docs/runs.md), [a config](experiments/configs/maml_digits.py)", source="")
    '[runs](runs.md), a config'
    >>> with_site_links("[the changes](../CHANGELOG.md)", source="docs")
    '[the changes](changelog.md)'
    """

    def mended(link: re.Match[str]) -> str:
        text, target = link.groups()
        path, hash_sign, anchor = target.partition("#")
        if not path or "://" in path:
            return link[0]
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
    if "<!-- keys: " in markdown:
        from metalearn.experiments.build import reference

        markdown = re.sub(
            r"<!-- keys: ([\w ]+) -->",
            lambda comment: reference.markdown(
                entry
                for name in reference.KINDS[comment[1]].names()
                for entry in reference.described(name)
                if entry.kind == comment[1]
            ),
            markdown,
        )
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", commands())
    return markdown


def commands() -> str:
    """Return every command of the command line: what it does, and its options."""
    from metalearn.experiments import main

    parts = []
    for name, command in main.COMMANDS.items():
        parts += [f"### metalearn {name}", (command.__doc__ or "").strip()]
        parts += ["```text\n" + main.options_of(name) + "\n```"]
    return "\n\n".join(parts)
