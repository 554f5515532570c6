"""The model to evaluate: log-probabilities of documents, and answers to prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.data.chat import Encoded, encode_prompt, stop_token_ids
from jaxalign.data.extent import Limits, extent_of
from jaxalign.data.packing import bucket, prompt_rows, token_rows
from jaxalign.models.decoder import Decoder
from jaxalign.models.lm_head import target_logprobs
from jaxalign.sampling.generate import generate, sample
from jaxalign.types import Params, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options for running the model, the same for all evaluations.

    Attributes:
      batch: documents per forward pass, and answers sampled at a time.
      length: the longest document, tokens.
      max_new_tokens: the longest answer, tokens.
      temperature: sampling temperature; 0 is greedy.
      seed: seed of sampling and of the bootstrap.
      chat_template: a built-in name, a jinja file, or "none"; None: the tokenizer's own.
      thinking: "on", "off" or "auto".
      limit: rows per evaluation (for the loss, per file); None: all.
    """

    batch: int = 16
    length: int = 2048
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    chat_template: str | None = None
    thinking: str = "auto"
    limit: int | None = None

    def __post_init__(self):
        for name in ("batch", "length", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: wanted 1 or more")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: wanted 1 or more, or none")


class Sampled(NamedTuple):
    """A prompt and its answer as tokens, with the answer's tokens marked.

    Attributes:
      document: the ids; `trained` marks the answer, including its stop token.
      finished: whether the answer has a stop token.
    """

    document: Encoded
    finished: bool


class EvaluatedModel:
    """A language model with its tokenizer and options.

    Args:
      model: the model.
      params: its parameters.
      tok: its tokenizer.
      options: how it is asked.
    """

    def __init__(
        self, model: Decoder, params: Params, tok: PreTrainedTokenizerBase, options: EvalOptions
    ):
        self.model, self.params, self.tok, self.options = model, params, tok, options
        self._logprobs = jax.jit(_logprobs(model, greedy=False))
        self._logprobs_and_greedy = jax.jit(_logprobs(model, greedy=True))

    @classmethod
    def load(cls, source: str, options: EvalOptions, option: str = "model") -> EvaluatedModel:
        """Reads a model.

        Args:
          source: folder, `.gguf` file or hub id.
          options: how it is asked.
          option: the option that holds `source`, for messages.
        """
        from jaxalign.hf import load_language_model, load_tokenizer

        tok = load_tokenizer(source)
        return cls(*load_language_model(source, option=option), tok, options)

    def logprobs(self, documents: Sequence[Encoded]) -> list[np.ndarray]:
        """The log-probability of each marked token of each document, in nats, float64.

        A document's first token has no prediction, so it does not count. Documents of similar
        length share a batch, padded to one of few widths.

        Raises:
          ValueError: a document beyond the model's positions or vocabulary.
        """
        return [value for (value,) in self._at_marks(self._logprobs, documents)]

    def logprobs_and_greedy(
        self, documents: Sequence[Encoded]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Like `logprobs`, and also whether each token is the most probable one.

        The latter needs all logits of a row at once, `[T, V]`.
        """
        return [
            (logprobs, greedy > 0)
            for logprobs, greedy in self._at_marks(self._logprobs_and_greedy, documents)
        ]

    def _at_marks(
        self, run: Callable[..., Any], documents: Sequence[Encoded]
    ) -> list[list[np.ndarray]]:
        """The results of `run` at the marked tokens of each document."""
        extent = extent_of(document.ids for document in documents)
        Limits.of(self.model).check(extent, "documents to evaluate")
        sizes = [len(document.ids) for document in documents]
        order = sorted(range(len(documents)), key=lambda i: -sizes[i])
        found: list[list[np.ndarray]] = [[] for _ in documents]
        batch = self.options.batch
        for start in range(0, len(order), batch):
            group = order[start : start + batch]
            width = bucket(sizes[group[0]])
            rows = token_rows(documents, [[i] for i in group], batch, width, 0)
            arrays = [np.asarray(x, np.float64) for x in run(self.params, rows)]
            for row, i in enumerate(group):
                marks = documents[i].trained[1:]
                found[i] = [array[row, : sizes[i] - 1][marks] for array in arrays]
        return found

    def answers(self, prompts: Sequence[Any]) -> list[str]:
        """Answers each prompt: user messages, or conversations."""
        options = self.options
        return generate(
            self.model,
            self.params,
            self.tok,
            prompts,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            key=jax.random.key(options.seed),
            chat_template=options.chat_template,
            thinking=options.thinking,
            rows=options.batch,
        )

    def samples(self, prompts: Sequence[Any], temperature: float = 1.0) -> list[Sampled]:
        """An answer to each prompt as tokens, from the whole distribution."""
        options = self.options
        encoded = [
            np.asarray(
                encode_prompt(self.tok, prompt, options.chat_template, thinking=options.thinking),
                np.int32,
            )
            for prompt in prompts
        ]
        return self.sample_encoded(
            encoded, max_new_tokens=options.max_new_tokens, temperature=temperature
        )

    def sample_encoded(
        self, encoded: Sequence[np.ndarray], *, max_new_tokens: int, **sampling: Any
    ) -> list[Sampled]:
        """An answer to each prompt of token ids.

        Args:
          encoded: the prompts.
          max_new_tokens: the longest answer.
          **sampling: other options of `jaxalign.sample`, such as the temperature.
        """
        options, tok = self.options, self.tok
        limits = Limits.of(self.model, max_new_tokens, tok)
        limits.check(extent_of(encoded), "prompts")
        length = bucket(max(map(len, encoded)))
        pad = tok.pad_token_id if isinstance(tok.pad_token_id, int) else 0
        found = []
        for start in range(0, len(encoded), options.batch):
            group = list(range(start, min(start + options.batch, len(encoded))))
            out = sample(
                self.model,
                self.params,
                prompt_rows(encoded, group, options.batch, length, pad),
                jax.random.fold_in(jax.random.key(options.seed), start),
                max_new_tokens=max_new_tokens,
                stop_tokens=stop_token_ids(tok, options.chat_template, self.model),
                pad_token=pad,
                **sampling,
            )
            tokens, mask, ends = map(np.asarray, (out.tokens, out.mask, out.finished))
            for row, i in enumerate(group):
                answer = tokens[row][mask[row]]
                marks = np.arange(len(encoded[i]) + len(answer)) >= len(encoded[i])
                document = Encoded(np.concatenate([encoded[i], answer]), marks)
                found.append(Sampled(document, bool(ends[row])))
        return found


def _logprobs(model: Decoder, *, greedy: bool) -> Callable[..., tuple[jax.Array, ...]]:
    def run(params: Params, tokens: TokenBatch) -> tuple[jax.Array, ...]:
        hidden = model.apply(params, tokens.inputs, tokens.positions, tokens.segment_ids)
        targets = jnp.asarray(tokens.targets)
        mask = jnp.asarray(tokens.loss_mask)
        logprobs = target_logprobs(model, params, hidden, targets, mask=mask)
        if not greedy:
            return (logprobs,)

        def best(row: jax.Array) -> jax.Array:
            return jnp.argmax(model.logits(params, row[None])[0], axis=-1)

        return logprobs, jax.lax.map(best, hidden) == targets

    return run
