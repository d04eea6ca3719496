"""A vision-language model behind an OpenAI-compatible HTTP endpoint as a reward: vLLM, SGLang, llama.cpp, hosted APIs.

With its defaults this is VQAScore (Lin et al., Evaluating Text-to-Visual Generation, 2024, arXiv:2404.01291): the
probability of "yes" to a question about the prompt, here normalised over "yes" and "no". JSON and encoded pictures are
all that is exchanged.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Facts, RewardOutput
from diffalign.rewards.http_client import post_json, with_retries
from diffalign.rewards.preprocess import check_batch

Mode = Literal["yes-logprob", "number"]

QUESTIONS: dict[str, str] = {
    "yes-logprob": 'Does this figure show "{prompt}"? Please answer yes or no.',
    "number": 'How well does this figure show "{prompt}"? Please answer with one number from {low} to {high}.',
}
NUMBER = r"-?\d+(?:\.\d+)?"
TOP_LOGPROBS = 20  # the most that the protocol allows


class HttpJudge:
    """Scores by asking a vision-language model about each picture.

    Args:
        url: of the endpoint, `http://HOST:PORT/v1` or the full `.../chat/completions`.
        model: its name at the endpoint.
        mode: `yes-logprob` reads the probability of "yes" against "no" from the log-probabilities of the first token,
            range [0, 1]. A server that returns none is judged by its words: 1 for yes, 0 for no. `number` reads the
            first number of the answer, range [low, high].
        question: with `{prompt}` (and `{low}`, `{high}` for numbers); None for the default of the mode.
        low, high: the range of `number`; an answer outside counts as no answer.
        pattern: regular expression of the number; its first group if it has one.
        timeout: seconds for one request. retries: further tries after a timeout, a lost connection, or a transient
            status (429, 5xx). backoff: seconds before the first retry, doubled for each next one.
        concurrency: requests in flight at once.
        api_key_env: environment variable that holds the key, sent as a bearer token; empty for none.
        image_format: `png` is exact, `jpeg` (quality 95) is smaller.
        extra: further fields of the request, or other values for its own ones, for servers that need them.
        on_error: `raise` ends the batch with an error; `skip` gives NaN for that picture, counts it in `skipped`, and
            warns once per batch.

    Raises:
        DiffalignError: an option is out of range, or the environment variable is not set.
    """

    name = "http-judge"
    modality: Literal["image", "audio"] = "image"
    differentiable = False
    kind: Literal["sample", "set"] = "sample"

    def __init__(
        self,
        url: str,
        model: str,
        mode: Mode = "yes-logprob",
        question: str | None = None,
        low: float = 0.0,
        high: float = 10.0,
        pattern: str = NUMBER,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        concurrency: int = 8,
        api_key_env: str = "",
        image_format: Literal["png", "jpeg"] = "png",
        extra: Mapping[str, Any] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        self.url = endpoint(url)
        self.model = model
        self.mode = _one_of("mode", mode, tuple(QUESTIONS))
        self.question = QUESTIONS[mode] if question is None else question
        self.low, self.high = low, high
        self.pattern = _compiled(pattern)
        self.timeout, self.retries, self.backoff, self.concurrency = timeout, retries, backoff, concurrency
        self.key = _secret(api_key_env)
        self.image_format = _one_of("image_format", image_format, ("png", "jpeg"))
        self.extra = dict(extra or {})
        self.on_error = _one_of("on_error", on_error, ("raise", "skip"))
        self.skipped = 0
        self._check()
        span = "0 to 1, the probability of yes" if mode == "yes-logprob" else f"{low:g} to {high:g}"
        self.facts = Facts(
            scale=span, licence="of the model served", backbone=model, source="arXiv:2404.01291"
        )

    def _check(self) -> None:
        if "{prompt}" not in self.question:
            raise DiffalignError(f"http-judge got the question {self.question!r}; it must contain {{prompt}}")
        if not self.low < self.high:
            raise DiffalignError(
                f"http-judge got low {self.low} and high {self.high}; expected low below high"
            )
        if self.timeout <= 0 or self.backoff < 0 or self.retries < 0 or self.concurrency < 1:
            raise DiffalignError(
                f"http-judge got timeout {self.timeout}, backoff {self.backoff}, retries {self.retries}, concurrency "
                f"{self.concurrency}; expected a positive timeout, at least one request, and nothing negative"
            )

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score pictures `[B, 3, H, W]` in [0, 1] for `B` prompts; NaN where one was skipped.

        Raises:
            DiffalignError: the batch is empty or has another shape; or, with `on_error: raise`, the endpoint cannot be
                reached, answers with an error status, or gives no usable answer.
        """
        check_batch(self.name, media, prompts)
        pictures = [data_url(picture, self.image_format) for picture in media.detach().float().cpu()]
        with ThreadPoolExecutor(self.concurrency) as pool:
            results = list(pool.map(self._attempt, pictures, prompts))
        failures = [result for result in results if isinstance(result, DiffalignError)]
        if failures and self.on_error == "raise":
            raise failures[0]
        if failures:
            self.skipped += len(failures)
            warnings.warn(
                f"http-judge skipped {len(failures)} of {len(media)} pictures; first: {failures[0]}",
                stacklevel=2,
            )
        values = [math.nan if isinstance(result, DiffalignError) else result for result in results]
        return RewardOutput(torch.tensor(values, dtype=torch.float32, device=media.device))

    def _attempt(self, picture: str, prompt: str) -> float | DiffalignError:
        """The score of one picture, or why there is none."""
        try:
            answer = with_retries(lambda: self._ask(picture, prompt), self.retries, self.backoff)
            return yes_probability(answer) if self.mode == "yes-logprob" else self._number(answer)
        except DiffalignError as error:
            return DiffalignError(f"{error} (http-judge, model {self.model!r} at {self.url})")

    def _number(self, answer: Mapping[str, Any]) -> float:
        return first_number(words(answer), self.pattern, self.low, self.high)

    def _ask(self, picture: str, prompt: str) -> Mapping[str, Any]:
        """The endpoint's first choice for one picture."""
        text = self.question.replace("{low}", f"{self.low:g}").replace("{high}", f"{self.high:g}")
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": text.replace("{prompt}", prompt)},
        ]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": 256,
        }
        if self.mode == "yes-logprob":
            body |= {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return first_choice(post_json(self.url, body | self.extra, self.key, self.timeout))


def endpoint(url: str) -> str:
    """The address of chat completions under a base address; a query is kept.

    Raises:
        DiffalignError: not an http(s) address with a host, or it holds a password.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of a port that is no number, or an unfinished IPv6 address
        usable = False
    if not usable:
        raise DiffalignError(f"http-judge got the url {url!r}; expected one like http://127.0.0.1:8000/v1")
    if parts.username or parts.password:
        raise DiffalignError(
            "http-judge got a url with a user or password; give a key by `api_key_env` instead"
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    return urlunsplit(parts._replace(path=path))


def data_url(picture: Tensor, image_format: str) -> str:
    """A picture `[3, H, W]` in [0, 1] as a `data:` address of an 8-bit PNG or JPEG."""
    from PIL import Image

    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **({"quality": 95} if image_format == "jpeg" else {}))
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def first_choice(document: Any) -> Mapping[str, Any]:
    """`choices[0]` of a chat completion.

    Raises:
        DiffalignError: there is none.
    """
    choices = document.get("choices") if isinstance(document, Mapping) else None
    if isinstance(choices, list) and choices and isinstance(choices[0], Mapping):
        return choices[0]
    raise DiffalignError(f"the answer has no choices: {str(document)[:200]}; expected a chat completion")


def words(choice: Mapping[str, Any]) -> str:
    """The text of a choice, empty when it has none."""
    message = choice.get("message")
    content = message.get("content") if isinstance(message, Mapping) else None
    return content if isinstance(content, str) else ""


def yes_probability(choice: Mapping[str, Any]) -> float:
    """`P(yes) / (P(yes) + P(no))` of the first token; without log-probabilities 1 for a yes in words and 0 for a no.

    Spellings are added up whatever their case and blanks (`Yes`, ` yes`). A word that is not among the tokens listed
    counts as probability zero.

    Raises:
        DiffalignError: the answer is neither yes nor no.
    """
    chances = {"yes": 0.0, "no": 0.0}
    for token, logprob in first_logprobs(choice):
        word = token.strip().lower()
        if word in chances:
            chances[word] += math.exp(min(logprob, 0.0))
    if not any(chances.values()):
        said = re.match(r"\W*(yes|no)\b", words(choice).lower())
        if said is None:
            raise DiffalignError(f"the answer is neither yes nor no: {words(choice)[:80]!r}")
        return float(said.group(1) == "yes")
    return chances["yes"] / (chances["yes"] + chances["no"])


def first_logprobs(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Tokens and log-probabilities listed for the first token of an answer; empty when the server sent none."""
    try:
        listed = choice["logprobs"]["content"][0]["top_logprobs"]
        pairs = [(str(one["token"]), float(one["logprob"])) for one in listed]
    except (KeyError, IndexError, TypeError, ValueError):
        return []
    return [(token, logprob) for token, logprob in pairs if not math.isnan(logprob)]


def first_number(text: str, pattern: re.Pattern[str], low: float, high: float) -> float:
    """The first match of `pattern` in `text` as a number.

    Raises:
        DiffalignError: there is none, or it lies outside `[low, high]`.
    """
    found = pattern.search(text)
    try:
        value = float(found.group(min(1, pattern.groups))) if found else math.nan
    except (TypeError, ValueError):
        value = math.nan
    if not low <= value <= high:
        raise DiffalignError(f"the answer {text[:80]!r} holds no number from {low:g} to {high:g}")
    return value


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise DiffalignError(f"http-judge got {option} {value!r}; expected one of: {', '.join(allowed)}")
    return value


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise DiffalignError(
            f"http-judge got the pattern {pattern!r}, which is no regular expression: {error}"
        ) from error


def _secret(variable: str) -> str:
    """The value of an environment variable; empty for no variable."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise DiffalignError(
            f"http-judge reads its key from the environment variable {variable!r}, which is not set"
        )
    if not (key.isascii() and key.isprintable()):
        raise DiffalignError(
            f"the key in the environment variable {variable!r} holds characters that no header takes"
        )
    return key
