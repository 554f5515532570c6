"""Rollouts on disk: what a resumed run keeps of an earlier one's."""

import json

from jaxalign.run.tasks import rollout_log


def test_answers_with_other_ends_of_lines_are_kept(tmp_path):
    """JSON may hold U+2028, U+2029 and U+0085 as they are; they end no line of the file."""
    path = tmp_path / "rollouts.jsonl"
    rows = [{"step": step, "answer": f"a\u2028b\u2029c\u0085d{step}"} for step in (1, 2, 3)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text + '{"step": 3, "ans', encoding="utf-8")  # the last line was cut off
    rollout_log._keep_before(path, 3)
    kept = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert [json.loads(line) for line in kept] == rows[:2]
    assert [file.name for file in tmp_path.iterdir()] == ["rollouts.jsonl"]
