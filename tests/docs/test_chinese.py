"""The Chinese README and pages hold the same commands, code and figures as the English ones."""

import io
import re
import tokenize

import blocks
import pytest
import test_blocks

ROOT = blocks.ROOT
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
PAGES = sorted((ROOT / "docs/zh").glob("*.md"))


def commands(path):
    """The commands of a page, in order, without comments."""
    bash = [block.code for block in blocks.blocks_of(path) if block.language == "bash"]
    return [words for code in bash for words in test_blocks.commands_of(code)]


def code(text):
    """Python without its comments: what the tokens say."""
    dropped = (tokenize.COMMENT, tokenize.NL)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token.string for token in tokens if token.type not in dropped]


def python(path):
    return [code(block.code) for block in blocks.blocks_of(path) if block.language == "python"]


def numbers(text):
    """Every number, as printed; 1.35 亿 and other words for numbers are left to the reader."""
    return re.findall(r"\d[\d,]*(?:\.\d+)?", text)


def first_table(path):
    text = path.read_text("utf-8")
    return [line for line in text.split("\n## ")[0].splitlines() if line.startswith("| ")]


def test_readme_has_the_same_commands():
    english, chinese = commands(README), commands(CHINESE)
    missing = [" ".join(words) for words in english if words not in chinese]
    assert not missing, f"add to README.zh-CN.md: {missing}"
    assert english == chinese


def test_readme_has_the_same_program():
    assert python(README) == python(CHINESE)
    assert len(python(README)) == 1


def test_readme_has_the_same_figures():
    english, chinese = first_table(README), first_table(CHINESE)
    assert [numbers(line) for line in english] == [numbers(line) for line in chinese]
    assert len(english) == 5
    for path in (README, CHINESE):  # the processors that they were measured on
        text = path.read_text("utf-8").split("\n## ")[0]
        assert "AMD EPYC" in text
        assert "Intel Xeon" in text
        assert [text.count(ratio) for ratio in ("1.12", "1.79", "1.11")] == [1, 1, 1]


def test_readme_has_the_same_picture_of_a_batch():
    def batch(path):
        lines = re.findall(
            r"^(?:inputs|targets|loss_mask|positions|segment_ids) .*$",
            path.read_text("utf-8"),
            re.M,
        )
        return [re.split(r" {5}(?=True|attention|[^\x00-\x7f])", line)[0].split() for line in lines]

    assert batch(README) == batch(CHINESE)
    assert len(batch(README)) == 5


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_has_the_commands_of_its_english_one(path):
    english = ROOT / "docs" / path.name
    assert commands(path) == commands(english)
    assert commands(path), "each page has something to run"
    for block in blocks.blocks_of(path):
        assert block.language in ("bash", ""), "its code belongs into the English page too"


def test_the_chapter_is_whole():
    assert {path.stem for path in PAGES} == {
        *("quickstart", "sft", "reward_models", "ppo", "memory", "dpo"),
    }
    linked = re.findall(r"docs/zh/(\w+)\.md\)", CHINESE.read_text("utf-8"))
    assert list(dict.fromkeys(linked)) == [
        *("quickstart", "sft", "reward_models", "ppo", "memory", "dpo"),
    ]
    assert "README.zh-CN.md" in README.read_text("utf-8")


@pytest.mark.parametrize("path", [CHINESE, *PAGES], ids=lambda path: path.name)
def test_punctuation_is_chinese(path):
    """Beside a Chinese character stands a full-width mark, outside code."""
    text = path.read_text("utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*`|\]\([^)]*\)|^    .*$", "", text, flags=re.MULTILINE)
    assert re.findall(r"[\u4e00-\u9fff][,:;(!?]|[,:;)!?][\u4e00-\u9fff]", text) == []
