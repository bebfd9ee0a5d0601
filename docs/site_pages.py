"""Documents at the top of the repository → pages of the site; links to files that are no pages → their paths."""

import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
TABLE = re.compile(r"\| variable \| effect \|\n\|---\|---\|\n(?:\|.*\n)+")


def on_files(files, config):
    for name in TOP:
        text = re.sub(r"\]\((?:docs/)", "](", (ROOT / name).read_text())
        files.append(File.generated(config, name, content=text))
    table = TABLE.search((ROOT / "CONTRIBUTING.md").read_text())[0]
    files.append(File.generated(config, "environment.md", content=f"# Environment variables\n\n{table}"))
    return files


def on_page_markdown(markdown, page, config, files):
    known = {file.src_uri for file in files}

    def link(found):
        text, target = found.groups()
        path, _, anchor = target.partition("#")
        if not path or "://" in target:
            return found[0]
        if path.startswith("../") and path[3:] in TOP:
            path = path[3:]
        if str(PurePosixPath(path)) in known:
            return f"[{text}]({path}{'#' * bool(anchor)}{anchor})"
        return f"{text} (`{path.removeprefix('../')}`)"

    return re.sub(r"(?<!!)\[([^\]]*)\]\(\s*([^)\s]+)\s*\)", link, markdown)
