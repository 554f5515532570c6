"""The model's interface to lm-eval: answers its requests in this process, without an export."""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM

from jaxalign.data.chat import Encoded
from jaxalign.run.evaluation.language_model import EvaluatedModel


class JaxLM(TemplateLM):
    """lm-eval's interface to a language model; texts become tokens as in its own `hf` model.

    Its length limit is `EvalOptions.length`: longer contexts lose their start, as in `hf`.

    Args:
      model: the model.
    """

    def __init__(self, model: EvaluatedModel):
        super().__init__()
        self._model, self.tokenizer = model, model.tok

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return self._model.tok.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        bos = self._model.tok.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's cache of requests."""
        return str(self._model.tok.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as the text of a prompt."""
        return str(
            self._model.tok.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; the tokenizer's own special tokens unless the text begins with bos."""
        tok = self._model.tok
        if add_special_tokens is None:
            bos = tok.bos_token
            add_special_tokens = not (isinstance(bos, str) and string.startswith(bos))
        return list(tok.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        documents = []
        for _, context, continuation in requests:
            ids = np.asarray([*context, *continuation], np.int32)[-self._longest :]
            documents.append(Encoded(ids, np.arange(len(ids)) >= len(ids) - len(continuation)))
        return [
            (float(logprobs.sum()), bool(greedy.all()))
            for logprobs, greedy in self._model.logprobs_and_greedy(documents)
        ]

    @property
    def _longest(self) -> int:
        # The last token of a document is only a target.
        return self._model.options.length + 1

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """log π of whole texts, in windows if they are longer than the limit."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._model.options.length,
                context_len=1,
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += total
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, cut at the first of their stop texts."""
        groups: dict[str, list[int]] = collections.defaultdict(list)
        for number, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(number)
        answers = [""] * len(requests)
        for text, members in groups.items():
            options = json.loads(text)
            most = options.get("max_gen_toks", options.get("max_new_tokens", 256))
            room = self._model.options.length - most
            if room < 1:
                raise ValueError(
                    f"a task wants answers of {most} tokens within --length "
                    f"{self._model.options.length}; give a larger one"
                )
            sampled = self._model.sample_encoded(
                [
                    np.asarray(self.tok_encode(requests[i].args[0])[-room:], np.int32)
                    for i in members
                ],
                max_new_tokens=most,
                temperature=options.get("temperature", 1.0) if options.get("do_sample") else 0.0,
                top_p=options.get("top_p", 1.0),
                top_k=options.get("top_k", 0),
            )
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            for i, one in zip(members, sampled, strict=True):
                ids = one.document.ids[one.document.trained]
                answer = str(self._model.tok.decode(ids, skip_special_tokens=True))
                for stop in filter(None, stops):
                    answer = answer.split(stop)[0]
                answers[i] = answer
        return answers
