import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from fastllm import DecoderModel
from fastllm.generation.decoding import ModuleDecoding
from fastllm.generation.text_stream import generate_text
from fastllm.ops.sampling import Sampling
from fastllm.serving.scheduler import SCORED_TOKENS, Busy, Draining, Job, Piece, Scheduler
from fastllm.tokenization import Tokenizer
from tests.conftest import needs_extension
from tests.serving.conftest import make_model, slowed, wait_until

Model = tuple[DecoderModel, Tokenizer]


class Inbox:
    """What an scheduler posts, by job."""

    def __init__(self) -> None:
        self.pieces: dict[Job, list[Piece]] = {}

    def __call__(self, pieces: Sequence[tuple[Job, Piece]]) -> None:
        for job, piece in pieces:
            self.pieces.setdefault(job, []).append(piece)

    def done(self, job: Job) -> bool:
        last = self.pieces.get(job, [Piece()])[-1]
        return last.finish is not None or last.error is not None

    def text(self, job: Job) -> str:
        return "".join(piece.text for piece in self.pieces[job])


@contextmanager
def scheduler_of(
    model: Model, places: int = 5, longest_queue: int = 1000, precision: str = "fp32"
) -> Iterator[tuple[Scheduler, Inbox]]:
    inbox = Inbox()
    scheduler = Scheduler(*model, precision, places, longest_queue, inbox)
    try:
        yield scheduler, inbox
    finally:
        scheduler.close()


def random_job(random: random.Random, tokenizer: Tokenizer) -> Job:
    prompt = [random.randint(1, 9) for _ in range(random.choice([1, 3, 150]))]
    sampling = random.choice(
        [Sampling(0), Sampling(), Sampling(0.7, 5), Sampling(1.2, 0, 0.9, 0.05, 1.3)]
    )
    return Job(prompt, random.randint(1, 60), sampling, random.randrange(2**64))


def alone(model: Model, job: Job, precision: str = "fp32") -> str:
    """What `generate` makes of the same."""

    class Prompt:
        """Already encoded."""

        encode = staticmethod(lambda text: job.prompt)
        decode = staticmethod(model[1].decode)

    pieces = generate_text(
        model[0],
        Prompt(),  # type: ignore[arg-type]
        "",
        job.max_tokens,
        **job.sampling._asdict(),
        seed=job.seed,
        precision=precision,
    )
    return "".join(pieces)


@needs_extension
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("kind", ["characters", "subwords"])
def test_each_job_gets_what_it_would_get_alone(
    kind: str, precision: str, request: pytest.FixtureRequest
) -> None:
    """Whoever is beside it, as they come and go, and whatever became of who had its place."""
    model: Model = request.getfixturevalue(kind)
    source = random.Random(1)
    jobs = [random_job(source, model[1]) for _ in range(25)]
    with scheduler_of(model, precision=precision) as (scheduler, inbox):
        for i, job in enumerate(jobs):
            scheduler.submit([job])
            time.sleep(source.choice([0, 0.002]))
            if i % 5 == 4:
                scheduler.cancel([jobs[i - 2]])
        kept = [job for i, job in enumerate(jobs) if i % 5 != 2]
        wait_until(lambda: all(map(inbox.done, kept)))
        wait_until(lambda: not scheduler.running and not scheduler.waiting)
    for job in kept:
        assert inbox.text(job) == alone(model, job, precision)
        assert sum(piece.tokens for piece in inbox.pieces[job]) == job.max_tokens


def test_the_modules_serve_where_the_kernel_cannot(characters: Model) -> None:
    heard = []
    model = make_model(characters[1])
    model.lm_head.register_forward_hook(lambda *a: heard.append(1))
    source = random.Random(2)
    jobs = [random_job(source, characters[1]) for _ in range(8)]
    with scheduler_of((model, characters[1]), places=3) as (scheduler, inbox):
        assert isinstance(scheduler._decoding, ModuleDecoding)
        scheduler.submit(jobs)
        wait_until(lambda: all(map(inbox.done, jobs)))
    assert heard
    for job in jobs:
        assert inbox.text(job) == alone(characters, job)


@pytest.mark.parametrize("kind", ["characters", "subwords"])
def test_probabilities_are_the_models_own(kind: str, request: pytest.FixtureRequest) -> None:
    """Of prompt and continuation, whatever the sampling; offsets say where the text stands."""
    model, tokenizer = request.getfixturevalue(kind)
    source = random.Random(3)
    prompts = [
        [source.randint(1, 9) for _ in range(size)]
        for size in (1, 2, SCORED_TOKENS, SCORED_TOKENS + 1, 200)
    ]
    jobs = [
        Job(prompt, count, Sampling(1.3, 7, 0.9, 0, 1.2), i, (), 3, True)
        for i, prompt in enumerate(prompts)
        for count in (0, 1, 20)
    ]
    with scheduler_of((model, tokenizer)) as (scheduler, inbox):
        scheduler.submit(jobs)
        wait_until(lambda: all(map(inbox.done, jobs)))
    for job in jobs:
        scores = [score for piece in inbox.pieces[job] for score in piece.scores]
        assert len(scores) == len(job.prompt) + job.max_tokens
        assert scores[0].logprob is None and scores[0].top is None
        with torch.no_grad():
            logits = model(torch.tensor([job.prompt]))[0]
        logits[:, model.padding_idx] = -torch.inf
        for position in range(1, len(job.prompt)):
            expected = logits[position - 1].log_softmax(-1)
            score, token = scores[position], job.prompt[position]
            assert score.token == tokenizer.decode([token])
            assert score.logprob == pytest.approx(float(expected[token]), abs=1e-4)
            assert score.top is not None and 1 <= len(score.top) <= 4
            assert max(score.top.values()) == pytest.approx(float(expected.max()), abs=1e-4)
        if kind == "characters":
            assert [score.offset for score in scores[: len(job.prompt)]] == list(
                range(len(job.prompt))
            )
            new = scores[len(job.prompt) :]
            assert "".join(score.token for score in new) == inbox.text(job)
            assert [score.offset for score in new] == list(range(job.max_tokens))


def test_stop_texts_end_it_and_show_nothing_of_themselves(subwords: Model) -> None:
    source = random.Random(4)
    for _ in range(12):
        job = random_job(source, subwords[1])
        job.max_tokens = 60
        whole = alone(subwords, job)
        at = source.randrange(len(whole) - 3)
        stops = [whole[at : at + source.randint(1, 3)], "never there", whole[-1]]
        end = min((whole.index(stop) + len(stop), whole.index(stop)) for stop in stops[::2])[1]
        stopped = Job(job.prompt, 60, job.sampling, job.seed, stops, 2)
        with scheduler_of(subwords) as (scheduler, inbox):
            scheduler.submit([stopped])
            wait_until(lambda: inbox.done(stopped))  # noqa: B023
        assert inbox.text(stopped) == whole[:end]
        assert inbox.pieces[stopped][-1].finish == "stop"
        scores = [score for piece in inbox.pieces[stopped] for score in piece.scores]
        assert all(score.offset < end for score in scores)


def test_who_is_about_to_be_taken_up_is_not_in_the_way(characters: Model) -> None:
    jobs = [Job([1], 5) for _ in range(6)]
    with scheduler_of(characters, places=2, longest_queue=3) as (scheduler, inbox):
        with scheduler._changed:  # the scheduler cannot take up what comes meanwhile
            for job in jobs[:5]:
                scheduler.submit([job])
            with pytest.raises(Busy):
                scheduler.submit(jobs[5:])
        wait_until(lambda: all(map(inbox.done, jobs[:5])))


def test_the_queue_has_an_end_and_places_come_free(characters: Model) -> None:
    long = [Job([1], 250) for _ in range(9)]
    with (
        scheduler_of(characters, places=2, longest_queue=3) as (scheduler, inbox),
        slowed(scheduler, 0.01),
    ):
        scheduler.submit(long[:2])
        wait_until(lambda: scheduler.running == 2)
        scheduler.submit(long[2:5])
        with pytest.raises(Busy):
            scheduler.submit(long[5:6])
        assert (scheduler.running, scheduler.waiting) == (2, 3)
        scheduler.cancel(long[1:3])  # one that runs, one that waits
        wait_until(lambda: scheduler.waiting == 1 and scheduler.running == 2)
        wait_until(lambda: long[3] in inbox.pieces)
        scheduler.submit(long[5:7])
        with pytest.raises(Busy):  # all or none
            scheduler.submit(long[7:9])
        assert scheduler.waiting == 3
        count = len(inbox.pieces[long[1]])
        scheduler.drain()
        with pytest.raises(Draining):
            scheduler.submit(long[7:8])
        scheduler.cancel(long[5:7])
        assert len(inbox.pieces[long[1]]) == count
        scheduler.close()
        for job in (long[0], long[3], long[4]):
            assert inbox.pieces[job][-1].error == "the server has stopped computing"
        assert not scheduler.alive and not scheduler.running and not scheduler.waiting


def test_one_that_cannot_be_drawn_leaves_the_others_alone(characters: Model) -> None:
    tokenizer = characters[1]
    broken = make_model(tokenizer)
    broken.embedding_layer.token_embeddings.weight.data[3] = torch.nan
    bad, good = Job([3], 5), [Job([1, 2], 1), Job([2], 1)]
    with scheduler_of((broken, tokenizer)) as (scheduler, inbox):
        scheduler.submit([good[0], bad, good[1]])
        wait_until(lambda: all(map(inbox.done, [bad, *good])))
        assert scheduler.alive
    assert "not numbers" in (inbox.pieces[bad][-1].error or "")
    for job in good:
        assert inbox.text(job) == alone(characters, job)


def test_an_id_without_a_token_is_an_error_of_its_job_alone(characters: Model) -> None:
    tokenizer = characters[1]

    class Holes:
        def decode(self, tokens: list[int]) -> str:
            if 0 in tokens:
                raise KeyError("Token ID '0' not found")
            return tokenizer.decode(tokens)

    biased = make_model(tokenizer)
    biased.lm_head.bias.data[0] = 1000
    job = Job([1], 5)
    with scheduler_of((biased, Holes())) as (scheduler, inbox):  # type: ignore[arg-type]
        scheduler.submit([job])
        wait_until(lambda: inbox.done(job))
        assert scheduler.alive
    assert inbox.pieces[job][-1].error == "Token ID '0' not found"


def test_an_alternative_without_a_token_is_left_out(characters: Model) -> None:
    tokenizer = characters[1]

    class Holes:
        is_lossless = True

        def decode(self, tokens: list[int]) -> str:
            if 0 in tokens:
                raise KeyError("Token ID '0' not found")
            return tokenizer.decode(tokens)

    count = tokenizer.vocab_size
    job = Job([1, 2], 0, logprobs=count, score_prompt=True)
    with scheduler_of((make_model(tokenizer), Holes())) as (scheduler, inbox):  # type: ignore[arg-type]
        scheduler.submit([job])
        wait_until(lambda: inbox.done(job))
        assert scheduler.alive
    top = [score.top for piece in inbox.pieces[job] for score in piece.scores if score.top]
    assert top and all(len(each) == count - 1 for each in top)


def test_nobody_waits_for_an_engine_that_broke(
    characters: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_type))
    with scheduler_of(characters) as (scheduler, inbox):
        scheduler._decoding.append = lambda *a: 1 / 0  # type: ignore[method-assign]
        job = Job([1], 5)
        scheduler.submit([job])
        wait_until(lambda: inbox.done(job))
        wait_until(lambda: not scheduler.alive)
        with pytest.raises(Draining):
            scheduler.submit([Job([1], 5)])
    assert seen == [ZeroDivisionError]
    assert inbox.pieces[job][-1].error == "the server has stopped computing"
