"""`jaxalign export` and `import`: parts, dtypes, tables, and Orbax folders as sources."""

import json

import chatmodel
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxalign
from jaxalign.commands import cli
from jaxalign.parallel.mesh import make_mesh
from jaxalign.run.config.runs import load_config
from jaxalign.run.export import export_run, import_model
from jaxalign.run.loop import train

pytestmark = pytest.mark.usefixtures("kept_programs")


@pytest.mark.parametrize("name", ["chat", "scorer"])
def test_an_imported_model_is_a_source_like_any_other(chat_models, tmp_path, name, capsys):
    source, out = chat_models / name, tmp_path / "imported"
    assert cli.main(["import", str(source), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "float32" in told.splitlines()[-2]
    assert f"{source} → {out}" in told
    model, params = jaxalign.load_pretrained(source)
    again, loaded = jaxalign.load_pretrained(out, mesh=make_mesh(1, 8, 1))
    assert type(again) is type(model)
    jax.tree.map(np.testing.assert_array_equal, params, loaded)
    kernel = loaded["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 4, 48)
    _, half = jaxalign.load_pretrained(out, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}
    tok, theirs = jaxalign.load_tokenizer(out), jaxalign.load_tokenizer(source)
    assert tok("hi there").input_ids == theirs("hi there").input_ids
    assert tok.chat_template == theirs.chat_template
    jaxalign.save_pretrained(again, loaded, tmp_path / "back", tokenizer=tok, dtype="source")
    assert chatmodel.weights(tmp_path / "back") == chatmodel.weights(source)


def test_a_run_from_an_imported_model(chat_models, tmp_path):
    import_model(str(chat_models / "chat"), str(tmp_path / "imported"), dtype="bfloat16")
    values = chatmodel.settings("sft", chat_models, tmp_path / "run")
    values["model"]["source"] = str(tmp_path / "imported")
    values["run"] |= {"steps": 1, "checkpoint": True, "export": False}
    folder = str(train(load_config("sft", values)).folder)
    export_run(folder, str(tmp_path / "out"))
    saved = load_file(tmp_path / "out/model.safetensors")
    assert {value.dtype.name for value in saved.values()} == {"bfloat16"}


def test_imports_replace_models_only(chat_models, tmp_path):
    out = tmp_path / "imported"
    for _ in range(2):
        import_model(str(chat_models / "chat"), str(out))
    assert [path.name for path in tmp_path.iterdir()] == ["imported"]
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"holds thesis\.tex"):
        import_model(str(chat_models / "chat"), str(out))


def test_damaged_imports_say_what_to_do(chat_models, tmp_path):
    out = tmp_path / "imported"
    import_model(str(chat_models / "chat"), str(out))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"do not fit config\.json.*import the model again"):
        jaxalign.load_pretrained(out)
    (out / "config.json").write_text(json.dumps(config))
    (out / "params/_METADATA").write_text("{")
    with pytest.raises(ValueError, match=r"params is not a readable Orbax checkpoint"):
        jaxalign.load_pretrained(out)
