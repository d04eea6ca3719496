"""The HTTP judge against a real server on the loopback interface."""

import base64
import io
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.rewards import Reward, load_reward
from diffalign.rewards.http_judge import HttpJudge, data_url, endpoint, yes_probability


class Server:
    """Answers each request with the next of `replies`, the last one again and again; keeps what it was asked."""

    def __init__(self):
        self.replies, self.requests = [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append((self.path, dict(self.headers), json.loads(body)))
                reply = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                reply(self, json.loads(body))

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(monkeypatch):
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    running = Server()
    yield running
    running.close()


def raw(body, status=200, headers=()):
    def reply(handler, asked):
        handler.send_response(status)
        for name, value in headers:
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def says(text, logprobs=None, status=200):
    choice = {"message": {"role": "assistant", "content": text}}
    if logprobs is not None:
        listed = [{"token": token, "logprob": math.log(p)} for token, p in logprobs]
        choice["logprobs"] = {"content": [{"token": listed[0]["token"], "top_logprobs": listed}]}
    return raw(json.dumps({"choices": [choice]}).encode(), status)


def judge(server, **options):
    return HttpJudge(url=server.url, model="tiny-vlm", **{"backoff": 0.001, "timeout": 5.0} | options)


IMAGES = torch.rand(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat", "a dog", 'a "red" {cube}']


def test_probability_of_yes_is_normalised_over_yes_and_no(server):
    server.replies = [says("Yes", [("Yes", 0.5), (" yes", 0.1), ("No", 0.15), ("maybe", 0.2), ("NO", 0.05)])]
    output = judge(server).score(IMAGES, PROMPTS)
    torch.testing.assert_close(output.mean, torch.full((3,), 0.6 / 0.8))
    assert output.mean.dtype == torch.float32
    assert output.std is None


def test_request_carries_question_picture_and_key(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    server.replies = [says("Yes", [("Yes", 1.0)])]
    judge(server, api_key_env="JUDGE_KEY", extra={"seed": 7}).score(IMAGES[:1], PROMPTS[2:])
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer s3cret"
    assert (body["model"], body["temperature"], body["max_tokens"], body["seed"]) == ("tiny-vlm", 0, 1, 7)
    assert body["logprobs"] is True
    picture, question = body["messages"][0]["content"]
    assert question["text"] == 'Does this figure show "a "red" {cube}"? Please answer yes or no.'
    encoded = picture["image_url"]["url"].removeprefix("data:image/png;base64,")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
    np.testing.assert_array_equal(pixels, (IMAGES[0].permute(1, 2, 0) * 255).round().numpy())


def test_no_key_sends_no_authorization(server):
    server.replies = [says("yes", [("yes", 1.0)])]
    judge(server).score(IMAGES[:1], PROMPTS[:1])
    assert "Authorization" not in server.requests[0][1]


def test_words_decide_without_logprobs(server):
    server.replies = [says("Yes, it does."), says("**No**"), says(" yes")]
    assert judge(server, concurrency=1).score(IMAGES, PROMPTS).mean.tolist() == [1.0, 0.0, 1.0]


def test_numbers_are_read_from_words(server):
    server.replies = [says("8 out of 10"), says("Final Score: 4.5"), says("0")]
    output = judge(server, mode="number", concurrency=1).score(IMAGES, PROMPTS)
    assert output.mean.tolist() == [8.0, 4.5, 0.0]
    text = server.requests[0][2]["messages"][0]["content"][1]["text"]
    assert text == 'How well does this figure show "a cat"? Please answer with one number from 0 to 10.'


def test_pattern_with_a_group_finds_the_final_score(server):
    server.replies = [says("Step 3 looks good. Final Score: 4.5")]
    reward = judge(server, mode="number", low=1, high=5, pattern=r"Final Score:\s*([\d.]+)")
    assert reward.score(IMAGES[:1], PROMPTS[:1]).mean.tolist() == [4.5]


@pytest.mark.parametrize("text", ["great", "11", "-1", ""])
def test_number_out_of_range_or_missing_is_an_error(server, text):
    server.replies = [says(text)]
    with pytest.raises(DiffalignError, match="holds no number from 0 to 10"):
        judge(server, mode="number").score(IMAGES[:1], PROMPTS[:1])


def test_server_error_is_tried_again(server):
    server.replies = [
        raw(b"busy", 500),
        raw(b"slow down", 429, [("Retry-After", "0")]),
        says("yes", [("yes", 1.0)]),
    ]
    assert judge(server).score(IMAGES[:1], PROMPTS[:1]).mean.item() == 1.0
    assert len(server.requests) == 3


def test_server_error_that_stays_ends_with_status_and_url(server):
    server.replies = [raw(b"out of memory", 503)]
    with pytest.raises(DiffalignError, match=r"status 503.*out of memory.*127\.0\.0\.1.*chat/completions"):
        judge(server, retries=2).score(IMAGES[:1], PROMPTS[:1])
    assert len(server.requests) == 3


def test_client_error_is_not_tried_again(server):
    server.replies = [raw(b'{"error": "bad key"}', 401)]
    with pytest.raises(DiffalignError, match=r"status 401.*api_key_env.*bad key"):
        judge(server).score(IMAGES[:1], PROMPTS[:1])
    assert len(server.requests) == 1


def test_redirect_is_not_followed(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    server.replies = [raw(b"", 302, [("Location", server.url + "/elsewhere")])]
    with pytest.raises(DiffalignError, match="status 302"):
        judge(server, api_key_env="JUDGE_KEY").score(IMAGES[:1], PROMPTS[:1])
    assert len(server.requests) == 1


def test_timeout_names_the_limit(server):
    free = threading.Event()
    server.replies = [lambda handler, asked: free.wait(5)]
    try:
        with pytest.raises(DiffalignError, match=r"no answer within 0\.05 s.*timeout"):
            judge(server, timeout=0.05, retries=0).score(IMAGES[:1], PROMPTS[:1])
    finally:
        free.set()


def test_trickling_answer_meets_the_deadline(server):
    stop = threading.Event()

    def trickle(handler, asked):
        handler.send_response(200)
        handler.end_headers()
        while not stop.is_set():
            try:
                handler.wfile.write(b" ")
                handler.wfile.flush()
            except OSError:
                return
            time.sleep(0.01)

    server.replies = [trickle]
    try:
        with pytest.raises(DiffalignError, match="no answer within"):
            judge(server, timeout=0.2, retries=0).score(IMAGES[:1], PROMPTS[:1])
    finally:
        stop.set()


def test_nobody_listening_is_a_clear_error(server):
    server.close()
    with pytest.raises(DiffalignError, match=r"cannot reach the endpoint.*Is the server running"):
        judge(server, retries=1).score(IMAGES[:1], PROMPTS[:1])


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (raw(b"<html>hello</html>"), "not JSON"),
        (raw(b"[" * 200_000), "not JSON"),
        (raw(b" " * ((1 << 20) + 1)), "longer than 1048576 bytes"),
        (raw(b'{"choices": []}'), "no choices"),
        (raw(b"[1, 2]"), "no choices"),
        (raw(b'{"choices": [{"message": null}]}'), "neither yes nor no"),
        (says("perhaps", [("perhaps", 0.9), ("nope", 0.1)]), "neither yes nor no"),
    ],
)
def test_garbage_is_a_clear_error(server, reply, message):
    server.replies = [reply]
    with pytest.raises(DiffalignError, match=message):
        judge(server).score(IMAGES[:1], PROMPTS[:1])


def test_skipped_pictures_are_nan_counted_and_named(server):
    server.replies = [says("yes"), raw(b"oops", 400), says("no"), raw(b"oops", 400)]
    reward = judge(server, on_error="skip", concurrency=1)
    with pytest.warns(UserWarning, match=r"skipped 1 of 3 pictures; first: status 400"):
        mean = reward.score(IMAGES, PROMPTS).mean
    assert mean[0] == 1
    assert mean[1].isnan()
    assert mean[2] == 0
    with pytest.warns(UserWarning, match="skipped 3 of 3"):
        reward.score(IMAGES, PROMPTS)
    assert reward.skipped == 4


def test_scores_keep_the_order_of_pictures_under_concurrency(server):
    last_is_answered = threading.Event()

    def first_comes_last(handler, asked):
        prompt = asked["messages"][0]["content"][1]["text"]
        if prompt == "0":
            last_is_answered.wait(5)
        says(prompt)(handler, asked)
        if prompt == "3":
            last_is_answered.set()

    server.replies = [first_comes_last]
    reward = judge(server, mode="number", question="{prompt}", concurrency=4)
    images = IMAGES[:1].expand(4, -1, -1, -1)
    assert reward.score(images, ["0", "1", "2", "3"]).mean.tolist() == [0, 1, 2, 3]


def test_is_a_reward_of_the_catalogue(server):
    reward = load_reward({"reward": "http-judge", "url": server.url, "model": "m"})
    assert isinstance(reward, Reward)
    assert (reward.name, reward.differentiable, reward.kind) == ("http-judge", False, "sample")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "ftp://host/v1"}, "expected one like http"),
        ({"url": "http://host:port/v1"}, "expected one like http"),
        ({"url": "http://[::1"}, "expected one like http"),
        ({"url": "127.0.0.1:80"}, "expected one like http"),
        ({"url": "http://me:pw@host/v1"}, "api_key_env"),
        ({"mode": "yes"}, "yes-logprob, number"),
        ({"question": "Is it good?"}, "must contain {prompt}"),
        ({"low": 5, "high": 5}, "low below high"),
        ({"pattern": "("}, "no regular expression"),
        ({"timeout": 0}, "positive timeout"),
        ({"concurrency": 0}, "at least one request"),
        ({"image_format": "gif"}, "png, jpeg"),
        ({"on_error": "ignore"}, "raise, skip"),
        ({"api_key_env": "DIFFALIGN_NO_SUCH_VARIABLE"}, "is not set"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(DiffalignError, match=message):
        HttpJudge(**{"url": "http://127.0.0.1:1/v1", "model": "m"} | options)


def test_empty_batch_is_refused_before_any_request():
    with pytest.raises(DiffalignError, match="empty batch"):
        HttpJudge(url="http://127.0.0.1:1/v1", model="m").score(torch.zeros(0, 3, 4, 4), [])


def test_endpoint_accepts_base_and_full_address():
    full = "https://host/v1/chat/completions"
    assert endpoint("https://host/v1/") == endpoint(full) == full
    assert endpoint("https://host/v1?version=2") == full + "?version=2"


def test_key_that_no_header_takes_is_refused(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "one\ntwo")
    with pytest.raises(DiffalignError, match="no header takes") as caught:
        HttpJudge(url="http://127.0.0.1:1/v1", model="m", api_key_env="JUDGE_KEY")
    assert "two" not in str(caught.value)


def test_jpeg_is_close_to_the_picture():
    smooth = torch.linspace(0, 1, 32).expand(3, 32, 32)
    url = data_url(smooth, "jpeg").removeprefix("data:image/jpeg;base64,")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(url)))).astype(float) / 255
    assert np.abs(pixels - smooth.permute(1, 2, 0).numpy()).max() < 0.03


@given(yes=st.floats(-30, 0), no=st.floats(-30, 0))
def test_yes_and_no_exchange_roles(yes, no):
    def probability(first, second):
        listed = [{"token": "Yes", "logprob": first}, {"token": "No", "logprob": second}]
        return yes_probability({"logprobs": {"content": [{"top_logprobs": listed}]}})

    assert probability(yes, no) == pytest.approx(1 / (1 + math.exp(no - yes)))
    assert probability(yes, no) + probability(no, yes) == pytest.approx(1)


def test_nan_logprob_is_ignored():
    listed = [{"token": "Yes", "logprob": math.nan}, {"token": "No", "logprob": -1.0}]
    assert yes_probability({"logprobs": {"content": [{"top_logprobs": listed}]}}) == 0
