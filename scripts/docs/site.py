"""Hooks of mkdocs.yml: the pages at the top of the repository, and links that leave docs/.

README.md is the site's first page. Files of the repository that pages link to lie under source/ on
the site; a link to a folder becomes its text.
"""

import os
import pathlib
import posixpath
import re

ROOT = pathlib.Path(__file__).parents[2]

# Page at the top → its place on the site.
TOP = {
    "README.md": "index.md",
    "README.zh-CN.md": "zh/index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#:]*)(#[^)\s]*)?\)")
_CODE = re.compile(r"^( *)```.*?^\1```$|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def target_of(link, page):
    """Where a link leads, as a path in the repository; `page` is one too."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def place_of(target):
    """Where a file of the repository lies on the site; None: nowhere."""
    if target in TOP:
        return TOP[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"source/{target}" if (ROOT / target).is_file() else None


def links_of(markdown):
    """(text, path) of every link to a file; those in code are none, and neither are addresses."""
    kept = _CODE.sub(lambda m: m[0] if "](" not in m[0] else "", markdown)
    return [(m[1], m[2]) for m in _LINK.finditer(kept) if m[2]]


def rewrite(markdown, page):
    """A page with its links as the site needs them.

    Args:
      markdown: its text.
      page: its path in the repository.
    """
    here = posixpath.dirname(place_of(page))

    def replace(match):
        text, link, anchor = match[1], match[2], match[3] or ""
        if not link:
            return match[0]
        place = place_of(target_of(link, page))
        return f"[{text}]({os.path.relpath(place, here or '.')}{anchor})" if place else text

    return _LINK.sub(replace, markdown)


def on_files(files, config):
    """Adds the pages at the top and the files that pages link to."""
    from mkdocs.structure.files import File

    pages = {
        f"docs/{file.src_uri}": file.content_string
        for file in files
        if file.is_documentation_page()
    }
    for name, place in TOP.items():
        text = (ROOT / name).read_text("utf-8")
        pages[name] = text
        files.append(File.generated(config, place, content=rewrite(text, name)))
    linked = {target_of(link, page) for page, text in pages.items() for _, link in links_of(text)}
    for target in sorted(linked):
        place = place_of(target)
        if place and place.startswith("source/"):
            content = (ROOT / target).read_bytes()
            files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites the links of the pages in docs/."""
    if page.file.src_uri in TOP.values():
        return markdown
    return rewrite(markdown, f"docs/{page.file.src_uri}")
