"""The example data that the package ships: it loads, there is enough, nothing is said twice."""

import importlib.resources
import itertools

import pytest

from jaxalign.data import read_rows, to_conversation, to_preference, to_prompt

_FOLDER = importlib.resources.files("jaxalign") / "commands/quickstart/example_data"
_LEAST = {
    "conversations": 240,
    "several_turns": 40,
    "preferences": 240,
    "judge": 96,
    "prompts": 64,
    "held": 24,
}
_READ = {
    "conversations": to_conversation,
    "preferences": to_preference,
    "judge": to_preference,
    "prompts": to_prompt,
}


def _load(language, name):
    read = _READ[name.removesuffix("_heldout")]
    return [read(row) for row in read_rows(str(_FOLDER / language / f"{name}.jsonl"))]


def _instructions(language):
    """(origin, instruction) of every example, training and held out.

    The judge's pairs come in groups: one prompt and chosen answer, several rejected ones.
    """
    found: dict[str, str] = {}
    for name, heldout in itertools.product(_READ, ("", "_heldout")):
        for example in _load(language, name + heldout):
            pairs = name in ("preferences", "judge")
            messages = example.prompt if pairs else example.messages
            asked = next(m["content"] for m in messages if m["role"] == "user")
            origin = example.origin.rpartition("/")[2]
            if name == "judge" and found.get(asked, "").startswith(f"{name}{heldout}.jsonl"):
                continue
            assert asked not in found, f"{origin} and {found[asked]}: {asked!r}"
            found[asked] = origin
    return [(origin, asked) for asked, origin in found.items()]


def _words(language, text):
    """Characters of Chinese, words of English; no punctuation, no case."""
    letters = [c for c in text.lower() if c.isalnum()]
    if language == "zh":
        return letters
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def _common(a, b):
    """Length of the longest common subsequence, a bit for each word of `a` (Hyyrö, 2004)."""
    where: dict[str, int] = {}
    for n, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << n
    full = (1 << len(a)) - 1
    rest = full
    for word in b:
        match = rest & where.get(word, 0)
        rest = ((rest + match) | (rest - match)) & full
    return len(a) - rest.bit_count()


def _rouge_l(a, b):
    return 2 * _common(a, b) / (len(a) + len(b))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_enough_of_everything(language):
    least = {k: n if language == "en" else n // 2 for k, n in _LEAST.items()}
    conversations = _load(language, "conversations")
    several = [c for c in conversations if sum(m["role"] == "assistant" for m in c.messages) > 1]
    assert len(conversations) >= least["conversations"]
    assert len(several) >= least["several_turns"]
    pairs = _load(language, "preferences")
    assert len(pairs) >= least["preferences"]
    assert all(p.chosen != p.rejected for p in pairs + _load(language, "preferences_heldout"))
    assert len(_load(language, "judge")) >= least["judge"]
    assert len(_load(language, "judge_heldout")) >= least["held"]
    assert len(_load(language, "prompts")) >= least["prompts"]
    assert len(_load(language, "prompts_heldout")) >= least["held"]
    assert _load(language, "conversations_heldout")


def test_chinese_is_chinese():
    for origin, text in _instructions("zh"):
        assert any("\u4e00" <= c <= "\u9fff" for c in text), (origin, text)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_two_instructions_are_alike(language):
    asked = [(origin, text, _words(language, text)) for origin, text in _instructions(language)]
    close = [
        f"{one} {text!r} / {two} {other!r}"
        for (one, text, a), (two, other, b) in itertools.combinations(asked, 2)
        if 2 * min(len(a), len(b)) >= 0.7 * (len(a) + len(b)) and _rouge_l(a, b) >= 0.7
    ]
    assert not close, "ROUGE-L of 0.7 or more:\n" + "\n".join(close)


def test_rouge_l_agrees_with_the_library():
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is not installed")
    measure = scorer.RougeScorer(["rougeL"])
    texts = [text for _, text in _instructions("en")[:12]] + ["a b a c b", "b a a b c c", "z"]
    for one, two in itertools.combinations(texts, 2):
        expected = measure.score(one, two)["rougeL"].fmeasure
        assert _rouge_l(_words("en", one), _words("en", two)) == pytest.approx(expected, abs=1e-9)
    assert _common("ABCBDAB", "BDCABA") == 4  # the textbook's example
