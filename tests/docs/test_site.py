"""The site of the documentation: each page is in its navigation, each link leads somewhere."""

import importlib
import importlib.util
import pathlib
import re

import pytest
import yaml

import jaxalign

ROOT = pathlib.Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))


def load_hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "scripts/docs/site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site = load_hooks()
PAGES = [*(ROOT / name for name in site.TOP), *DOCS]


def navigation():
    """Every page that mkdocs.yml lists."""

    class Loader(yaml.SafeLoader):
        """Reads mkdocs.yml without calling what its tags name."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)

    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [page for value in values for page in pages(value)]

    return pages(yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader)["nav"])


def anchors(path):
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^ *```.*?^ *```$", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_navigation():
    listed = navigation()
    assert len(set(listed)) == len(listed)
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in DOCS}
    assert set(listed) == pages | set(site.TOP.values())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    page = path.relative_to(ROOT).as_posix()
    text = path.read_text("utf-8")
    for _, link in site.links_of(text):
        target = ROOT / site.target_of(link, page)
        assert target.exists(), f"{page}: {link}"
        assert ROOT in target.resolve().parents or target.resolve() == ROOT
    for link, anchor in re.findall(r"\]\(([^)\s#:]*)#([^)\s]+)\)", text):
        target = ROOT / site.target_of(link, page) if link else path
        assert anchor in anchors(target), f"{page}: {link}#{anchor}"


def test_links_of_the_site():
    """The same links, as the site needs them; a file outside of docs/ is copied to source/."""
    for page, link, wanted in (
        ("README.md", "docs/ppo.md#recipes", "ppo.md#recipes"),
        ("README.md", "CONTRIBUTING.md", "contributing.md"),
        ("README.zh-CN.md", "docs/zh/sft.md", "sft.md"),
        ("README.zh-CN.md", "README.md#limits", "../index.md#limits"),
        ("docs/zh/sft.md", "../data.md", "../data.md"),
        ("docs/research.md", "../README.md#batches", "index.md#batches"),
        ("docs/launching.md", "../scripts/launch/slurm.sh", "source/scripts/launch/slurm.sh"),
        ("docs/ppo.md", "conventions.md#ppo", "conventions.md#ppo"),
        ("docs/ppo.md", "#recipes", "#recipes"),
    ):
        assert site.rewrite(f"see [it]({link}).", page) == f"see [it]({wanted})."
    assert site.rewrite("see [recipes](configs/recipes).", "README.md") == "see recipes."
    assert site.links_of("`[a](b)` and\n```\n[c](d)\n```\n[e](f.md)") == [("e", "f.md")]


def test_the_reference_has_every_public_name():
    named = re.findall(r"^::: (jaxalign[\w.]+)$", (ROOT / "docs/api.md").read_text("utf-8"), re.M)
    assert len(set(named)) == len(named)
    found = []
    for name in named:
        module, _, attribute = name.rpartition(".")
        found.append(getattr(importlib.import_module(module), attribute))  # there is such a thing
    for name in jaxalign.__all__:
        value = getattr(jaxalign, name)
        is_module = name in ("losses", "sft", "reward", "dpo", "kto", "ppo")
        assert is_module or any(value is one for one in found), f"docs/api.md lacks {name}"


def test_a_page_that_is_missing_would_be_seen():
    assert "nowhere.md" not in navigation()
    assert site.place_of("nowhere.md") is None
    assert "recipes" in anchors(ROOT / "docs/ppo.md")
    assert "no-such-heading" not in anchors(ROOT / "docs/ppo.md")
