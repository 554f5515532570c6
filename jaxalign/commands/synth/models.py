"""Writers around models that are loaded here: one that answers, one that scores."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign.commands.synth.config import LocalConfig, RewardModelConfig, WriterConfig
from jaxalign.commands.synth.preferences import TOO_LONG
from jaxalign.commands.synth.writer import FunctionWriter, Request
from jaxalign.data.chat import encode_conversations, encode_prompts, stop_token_ids
from jaxalign.data.extent import Limits, extent_of
from jaxalign.data.packing import prompt_rows, token_rows
from jaxalign.data.rows import Conversation
from jaxalign.data.writers import Style
from jaxalign.hf import load_language_model, load_reward_model, load_tokenizer
from jaxalign.models.scorer import pooled_scores
from jaxalign.parallel.sharding import row_shards, shard_batch, use_mesh
from jaxalign.run.config.mesh import MeshConfig
from jaxalign.sampling.generate import sample

_STEP = 64  # prompts and answers are padded to a multiple of this, so that few shapes are compiled


def _mesh(config: MeshConfig | None) -> Mesh | None:
    if config is None:
        return None
    return config.make()


def _rows(count: int, mesh: Mesh | None) -> int:
    """Rows of a batch: a multiple of what the mesh splits them into."""
    parts = 1 if mesh is None else row_shards(mesh)
    return -(-count // parts) * parts


def local_writer(config: WriterConfig, mesh_config: MeshConfig | None = None) -> FunctionWriter:
    """A writer around a model that this process loads and samples from."""
    local = LocalConfig() if config.local is None else config.local
    template = local.chat_template
    style = Style(local.chat_template_kwargs, thinking=local.thinking)
    mesh = _mesh(mesh_config)
    tok = load_tokenizer(config.model)
    model, params = load_language_model(config.model, option="writer.model", mesh=mesh)
    stops = stop_token_ids(tok, template, model)
    pad = tok.pad_token_id if isinstance(tok.pad_token_id, int) else 0
    rows = _rows(config.concurrency, mesh)

    def write(requests: Sequence[Request]) -> list[tuple[str, str]]:
        first = requests[0]
        conversations = [tuple(request.messages) for request in requests]
        encoded = encode_prompts(
            tok, conversations, template, [request.name for request in requests], style=style
        )
        Limits.of(model, first.sampling.max_tokens, tok).check(extent_of(encoded), "prompts")
        length = -(-max(map(len, encoded)) // _STEP) * _STEP
        out = sample(
            model,
            params,
            prompt_rows(encoded, range(len(encoded)), rows, length, pad),
            jax.random.key(first.seed),
            max_new_tokens=first.sampling.max_tokens,
            temperature=first.sampling.temperature,
            top_p=first.sampling.top_p,
            stop_tokens=stops,
            pad_token=pad,
        )
        tokens, mask, finished = map(np.asarray, (out.tokens, out.mask, out.finished))
        return [
            (
                str(tok.decode(tokens[row][mask[row]], skip_special_tokens=True)),
                "stop" if finished[row] else "length",
            )
            for row in range(len(requests))
        ]

    return FunctionWriter(config.model, write, rows)


def score_writer(
    config: RewardModelConfig, mesh_config: MeshConfig | None = None
) -> FunctionWriter:
    """A writer whose replies are a reward model's scores of the conversations in the requests."""
    mesh = _mesh(mesh_config)
    tok = load_tokenizer(config.source)
    model, params = load_reward_model(config.source, option="reward_model.source", mesh=mesh)
    pad = tok.pad_token_id if isinstance(tok.pad_token_id, int) else 0
    rows = _rows(config.rows, mesh)
    scores = jax.jit(lambda params, batch: pooled_scores(model, params, batch))

    def score(requests: Sequence[Request]) -> list[tuple[str, str]]:
        documents = []
        conversations = [Conversation(tuple(r.messages), r.name) for r in requests]
        for document in encode_conversations(tok, conversations, config.chat_template):
            end = int(np.flatnonzero(document.trained)[-1]) + 1  # where a rollout would stop
            ids, trained = document.ids[:end], document.trained[:end]
            documents.append(document._replace(ids=ids, trained=trained))
        fits = [n for n, document in enumerate(documents) if len(document.ids) <= config.length]
        replies: dict[int, str] = {}
        if fits:
            longest = max(len(documents[n].ids) for n in fits)
            length = min(-(-longest // _STEP) * _STEP, config.length)
            batch = token_rows(documents, [[n] for n in fits], rows, length, pad)
            with use_mesh(mesh):
                placed = batch if mesh is None else shard_batch(batch, mesh)
                values = np.asarray(scores(params, placed), np.float64)
            replies = {n: repr(float(value)) for n, value in zip(fits, values, strict=False)}
        return [
            (replies[n], "stop") if n in replies else ("", TOO_LONG) for n in range(len(requests))
        ]

    return FunctionWriter(config.source, score, rows)
