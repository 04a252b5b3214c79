"""A model as one of lm-eval-harness: `lm_eval.simple_evaluate(FastllmLM(FOLDER), tasks=[...])`.

`python -m fastllm.integrations.lm_eval` is the harness's own command, which then knows it as
`--model fastllm --model_args checkpoint=runs/book`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import Tensor
from tqdm import tqdm

from fastllm.device import choose_device
from fastllm.generation import generate_text
from fastllm.integrations.any_model import load_trained_model
from fastllm.integrations.hf_tokenizer import begin_and_end

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

# Positions whose logits are computed at a time.
LOGIT_ROWS = 512
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p")


@register_model("fastllm")
class FastllmLM(TemplateLM):
    """Any model that fastllm loads, for lm-eval-harness.

    Args:
        checkpoint: what `load_trained_model` takes: a run, a folder in Hugging Face's format, a
            GGUF file, or the like.
        max_length: tokens that the model sees, at most; by default as many as it can.
        prefix_token_id: stands before the first token of a text, which nothing could predict
            otherwise. By default the first of these that there is: the token that the model expects
            before prompts, the one that ends its texts, padding.
        batch_size: sequences in a forward.
        max_batch_size: for the harness; there is no automatic batch size.
        device: cpu or cuda, which falls back to the CPU; the harness asks for cuda:0 by itself.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        trained = load_trained_model(checkpoint)
        self.tokenizer = trained.tokenizer
        self._device = torch.device(choose_device("cuda" if "cuda" in device else "cpu"))
        self.model = trained.model.eval().to(self._device)
        self.max_length = min(max_length or self.model.max_seq_len, self.model.max_seq_len)
        self.batch_size = int(batch_size)
        self._prefix_token_id = prefix_token_id

    @property
    def eot_token_id(self) -> int:
        return begin_and_end(self.tokenizer)[1][0]

    @property
    def prefix_token_id(self) -> int:
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        return begin_and_end(self.tokenizer)[0]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The ids of a text, after the tokens that the model expects before it unless the text
        begins with them, or `add_special_tokens` is false."""
        ids = self.tokenizer.encode(string)
        start = list(self.tokenizer.start_tokens)
        if add_special_tokens is False or ids[: len(start)] == start:
            return ids
        return [*start, *ids]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each text, in windows that do not overlap."""
        texts = [
            [
                (None, *utils.make_disjoint_window(window))
                for window in utils.get_rolling_token_windows(
                    self.tokenizer.encode(request.args[0]),
                    self.prefix_token_id,
                    self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        scores = iter(self._loglikelihood_tokens(list(itertools.chain(*texts)), disable_tqdm))
        totals = [sum(score for score, _ in itertools.islice(scores, len(each))) for each in texts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether each of its tokens is the likeliest.

        Args:
            requests: a key for the harness's cache, the context's ids, and the continuation's.
        """
        # Sequences of about the same length share a batch, the longest first.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood")
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            pairs = [requests[i][1:] for i in chosen]
            for i, result in zip(chosen, self._score(pairs), strict=True):
                results[i] = result
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
            progress.update(len(chosen))
        progress.close()
        return results

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        """The results of a batch of contexts and continuations; early tokens of a context that is
        too long are left out."""
        inputs = [(context + target)[:-1][-self.max_length :] for context, target in pairs]
        ids = torch.zeros(len(inputs), max(map(len, inputs)), dtype=torch.long)
        for row, tokens in zip(ids, inputs, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        hidden = self.model.hidden_states(ids.to(self._device))
        for x, tokens, (_, target) in zip(hidden, inputs, pairs, strict=True):
            targets = torch.tensor(target[-len(tokens) :], device=self._device)
            last = x[len(tokens) - len(targets) : len(tokens)]
            parts = zip(last.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
            scores = [self._score_tokens(*part) for part in parts]
            yield sum(score for score, _ in scores), all(greedy for _, greedy in scores)

    def _score_tokens(self, x: Tensor, targets: Tensor) -> tuple[float, bool]:
        """The log-likelihood of `targets` [n] after the hidden states [n, H], and whether all of
        them are the likeliest tokens."""
        logprobs = self.model.capped(self.model.lm_head(x)).float().log_softmax(-1)
        score = logprobs.gather(-1, targets[:, None]).sum()
        return float(score), bool((logprobs.argmax(-1) == targets).all())

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context, up to a stop text of its settings or the end of the text.

        Without `do_sample`, tokens are the likeliest ones.
        """
        texts = []
        for request in tqdm(requests, disable=disable_tqdm, desc="generate_until"):
            context, settings = request.args
            stops = settings.get("until") or []
            stops = [stops] if isinstance(stops, str) else [stop for stop in stops if stop]
            count = next((settings[name] for name in LENGTHS if name in settings), 256)
            sampling = {name: settings[name] for name in SAMPLING if name in settings}
            if not settings.get("do_sample"):
                sampling = {"temperature": 0}
            # As in the harness's other models: all that is generated has room after the context.
            room = max(self.max_length - count, self.max_length // 2)
            prompt = self.tok_encode(context)[-room:]
            text = ""
            for piece in generate_text(self.model, self.tokenizer, prompt, count, **sampling):
                text += piece
                if any(stop in text for stop in stops):
                    break
            for stop in stops:
                text = text.partition(stop)[0]
            texts.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
