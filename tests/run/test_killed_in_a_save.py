"""A run killed while it saves, or between its last save and its end: what is on disk then serves.

A copy of the folder at that moment is what a kill leaves. `scripts/faults/kills.py` kills for real.
"""

import shutil

import chatmodel
import pytest

from jaxalign.run import loop
from jaxalign.run.checkpoint import Checkpoints
from jaxalign.run.config.runs import load_config

pytestmark = pytest.mark.usefixtures("kept_programs")


@pytest.fixture(scope="module")
def moments(chat_models, tmp_path_factory):
    """An uninterrupted run, and copies of its folder: within its second save, and before export."""
    place = tmp_path_factory.mktemp("killed")
    values = chatmodel.settings(
        "sft", chat_models, place / "run", save_every=1, eval_every=2, keep_best="eval/loss/nll"
    )
    held_out = chatmodel.write_rows(place / "held.jsonl", chatmodel.ROWS["sft"][:3])
    values["data"]["eval"] = [held_out]

    def leave(name):
        shutil.copytree(place / "run", place / name, ignore=shutil.ignore_patterns(".lock"))

    def write_checksums(self):
        if self._saving == 2:
            leave("in a save")  # everything is written but what says that it is complete
        plain(self)

    def export(*args):
        leave("before the export")
        return plain_export(*args)

    plain, plain_export = Checkpoints._write_checksums, loop._export
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "_write_checksums", write_checksums)
        patch.setattr(loop, "_export", export)
        loop.train(load_config("sft", values))
    return place


@pytest.mark.parametrize(("moment", "step"), [("in a save", 1), ("before the export", 4)])
def test_what_a_kill_leaves_becomes_the_uninterrupted_run(moments, moment, step, capsys):
    folder = moments / moment
    unfinished = list((folder / "checkpoints").glob("*tmp*"))
    assert bool(unfinished) == (moment == "in a save")
    options = [f"run.folder={folder}", "run.resume=true"]
    loop.train(load_config("sft", moments / "run/config.yaml", options))
    assert f"resuming after step {step} of 4" in capsys.readouterr().out
    ours, theirs = chatmodel.lines(folder), chatmodel.lines(moments / "run")
    assert chatmodel.timeless(ours) == chatmodel.timeless(theirs)
    assert chatmodel.weights(folder / "model") == chatmodel.weights(moments / "run/model")
    there = [
        {path.name for path in (place / "checkpoints").iterdir()}
        for place in (folder, moments / "run")
    ]
    assert there[0] == there[1]  # and nothing of the save that was cut off
