import gc
import random
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest
import torch

from fastllm import DecoderModel
from fastllm.generation.decoding import ModuleDecoding
from fastllm.generation.text_stream import generate_text
from fastllm.ops.sampling import Sampling
from fastllm.serving.scheduler import (
    INTERNAL_ERROR,
    SCORED_TOKENS,
    STOPPED,
    Delta,
    Draining,
    Job,
    QueueFull,
    Scheduler,
)
from fastllm.tokenization import Tokenizer
from tests.conftest import needs_extension
from tests.serving.conftest import make_model, prompt_of, slowed, wait_until

Model = tuple[DecoderModel, Tokenizer]


class Inbox:
    """The deltas that a scheduler delivers, by job."""

    def __init__(self) -> None:
        self.deltas: dict[Job, list[Delta]] = {}

    def __call__(self, deltas: Sequence[tuple[Job, Delta]]) -> None:
        for job, delta in deltas:
            self.deltas.setdefault(job, []).append(delta)

    def done(self, job: Job) -> bool:
        return job in self.deltas and self.deltas[job][-1].is_last

    def error(self, job: Job) -> str:
        return self.deltas[job][-1].error or ""

    def text(self, job: Job) -> str:
        return "".join(delta.text for delta in self.deltas[job])


@contextmanager
def scheduler_of(
    model: Model, slots: int = 5, max_queue: int = 1000, precision: str = "fp32"
) -> Iterator[tuple[Scheduler, Inbox]]:
    inbox = Inbox()
    scheduler = Scheduler(*model, precision, slots, max_queue, inbox)
    try:
        yield scheduler, inbox
    finally:
        scheduler.close()


def random_job(random: random.Random, tokenizer: Tokenizer) -> Job:
    prompt = [random.randint(1, 9) for _ in range(random.choice([1, 3, 150]))]
    sampling = random.choice(
        [Sampling(0), Sampling(), Sampling(0.7, 5), Sampling(1.2, 0, 0.9, 0.05, 1.3)]
    )
    return Job(prompt_of(*prompt), random.randint(1, 60), sampling, random.randrange(2**64))


def alone(model: Model, job: Job, precision: str = "fp32") -> str:
    """The text that `generate_text` gives for the same job."""

    class Prompt:
        """A tokenizer for a prompt that is already encoded."""

        encode = staticmethod(lambda text: job.prompt.tokens)
        decode = staticmethod(model[1].decode)
        start_tokens, end_tokens = (), model[1].end_tokens

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
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["characters", "subwords"])
def test_each_job_gets_what_it_would_get_alone(
    kind: str, precision: str, request: pytest.FixtureRequest
) -> None:
    """Whatever its neighbours, as jobs come and go, and whatever its slot held before."""
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
        wait_until(lambda: not scheduler.running and not scheduler.queued)
    for job in kept:
        assert inbox.text(job) == alone(model, job, precision)
        assert sum(delta.tokens for delta in inbox.deltas[job]) == job.max_tokens


def test_the_modules_run_models_that_the_kernel_cannot(characters: Model) -> None:
    calls = []
    model = make_model(characters[1])
    model.lm_head.register_forward_hook(lambda *a: calls.append(1))
    source = random.Random(2)
    jobs = [random_job(source, characters[1]) for _ in range(8)]
    with scheduler_of((model, characters[1]), slots=3) as (scheduler, inbox):
        assert isinstance(scheduler._decoding, ModuleDecoding)
        scheduler.submit(jobs)
        wait_until(lambda: all(map(inbox.done, jobs)))
    assert calls
    for job in jobs:
        assert inbox.text(job) == alone(characters, job)


@needs_extension
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_scheduler_keeps_no_weights_beside_the_packed_ones(
    characters: Model, precision: str
) -> None:
    tokenizer = characters[1]
    model = make_model(tokenizer)
    job = random_job(random.Random(2), tokenizer)
    expected, weight = alone((model, tokenizer), job, precision), weakref.ref(model.lm_head.weight)
    inbox = Inbox()
    scheduler = Scheduler(model, tokenizer, precision, 3, 10, inbox)
    try:
        del model
        gc.collect()
        assert weight() is None
        scheduler.submit([job])
        wait_until(lambda: inbox.done(job))
    finally:
        scheduler.close()
    assert inbox.text(job) == expected


@pytest.mark.parametrize("kind", ["characters", "subwords"])
def test_logprobs_are_the_models_own(kind: str, request: pytest.FixtureRequest) -> None:
    """Of prompt and continuation, whatever the sampling; offsets say where the text is."""
    model, tokenizer = request.getfixturevalue(kind)
    source = random.Random(3)
    prompts = [
        [source.randint(1, 9) for _ in range(size)]
        for size in (1, 2, SCORED_TOKENS, SCORED_TOKENS + 1, 200)
    ]
    jobs = [
        Job(prompt_of(*prompt), count, Sampling(1.3, 7, 0.9, 0, 1.2), i, (), 3, score_prompt=True)
        for i, prompt in enumerate(prompts)
        for count in (0, 1, 20)
    ]
    with scheduler_of((model, tokenizer)) as (scheduler, inbox):
        scheduler.submit(jobs)
        wait_until(lambda: all(map(inbox.done, jobs)))
    for job in jobs:
        logprobs = [each for delta in inbox.deltas[job] for each in delta.logprobs]
        assert len(logprobs) == len(job.prompt.tokens) + job.max_tokens
        assert logprobs[0].logprob is None and logprobs[0].top is None
        with torch.no_grad():
            logits = model(torch.tensor([job.prompt.tokens]))[0]
        logits[:, model.padding_idx] = -torch.inf
        for position in range(1, len(job.prompt.tokens)):
            expected = logits[position - 1].log_softmax(-1)
            each, token = logprobs[position], job.prompt.tokens[position]
            assert each.token == tokenizer.decode([token])
            assert each.logprob == pytest.approx(float(expected[token]), abs=1e-4)
            assert each.top is not None and 1 <= len(each.top) <= 4
            assert max(each.top.values()) == pytest.approx(float(expected.max()), abs=1e-4)
        if kind == "characters":
            assert [each.offset for each in logprobs[: len(job.prompt.tokens)]] == list(
                range(len(job.prompt.tokens))
            )
            new = logprobs[len(job.prompt.tokens) :]
            assert "".join(each.token for each in new) == inbox.text(job)
            assert [each.offset for each in new] == list(range(job.max_tokens))


@pytest.mark.parametrize("max_seq_len", [1, 2, 3, 20, 100])
def test_beyond_max_seq_len_jobs_get_what_they_would_get_alone(
    characters: Model, max_seq_len: int
) -> None:
    """With and without scores of the prompt, which cross several windows."""
    model = make_model(characters[1], max_seq_len), characters[1]
    source = random.Random(9)
    jobs = [random_job(source, model[1]) for _ in range(10)]
    for job in jobs[::2]:
        job.max_tokens, job.logprobs, job.score_prompt = 150, 2, source.random() < 0.5
    with scheduler_of(model) as (scheduler, inbox):
        scheduler.submit(jobs)
        wait_until(lambda: all(map(inbox.done, jobs)))
    for job in jobs:
        assert inbox.text(job) == alone(model, job)
        scores = [each for delta in inbox.deltas[job] for each in delta.logprobs]
        prompt = len(job.prompt.tokens) if job.score_prompt else 0
        assert len(scores) == (0 if job.logprobs is None else prompt + job.max_tokens)


def test_a_text_has_the_same_scores_as_prompt_and_as_continuation(characters: Model) -> None:
    """Far beyond max_seq_len: the window moves alike."""
    model, tokenizer = make_model(characters[1], 25), characters[1]
    drawn = Job(prompt_of(1), 150, logprobs=0)
    with scheduler_of((model, tokenizer)) as (scheduler, inbox):
        scheduler.submit([drawn])
        wait_until(lambda: inbox.done(drawn))
        text = prompt_of(1, *tokenizer.encode(inbox.text(drawn)))
        scored = Job(text, 0, logprobs=0, score_prompt=True)
        scheduler.submit([scored])
        wait_until(lambda: inbox.done(scored))
    first, second = (
        [each.logprob for delta in inbox.deltas[job] for each in delta.logprobs]
        for job in (drawn, scored)
    )
    assert first == pytest.approx(second[1:], abs=1e-4) and len(first) == 150


def test_stop_texts_end_a_job_and_are_not_shown(subwords: Model) -> None:
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
        assert inbox.deltas[stopped][-1].finish_reason == "stop"
        logprobs = [each for delta in inbox.deltas[stopped] for each in delta.logprobs]
        assert all(each.offset < end for each in logprobs)


def test_free_slots_count_before_queued_jobs_move_into_them(characters: Model) -> None:
    jobs = [Job(prompt_of(1), 5) for _ in range(6)]
    with scheduler_of(characters, slots=2, max_queue=3) as (scheduler, inbox):
        with scheduler._changed:  # the scheduler cannot admit anything meanwhile
            for job in jobs[:5]:
                scheduler.submit([job])
            with pytest.raises(QueueFull):
                scheduler.submit(jobs[5:])
        wait_until(lambda: all(map(inbox.done, jobs[:5])))


def test_the_queue_is_limited_and_cancelling_frees_slots(characters: Model) -> None:
    long = [Job(prompt_of(1), 250) for _ in range(9)]
    with (
        scheduler_of(characters, slots=2, max_queue=3) as (scheduler, inbox),
        slowed(scheduler, 0.01),
    ):
        scheduler.submit(long[:2])
        wait_until(lambda: scheduler.running == 2)
        scheduler.submit(long[2:5])
        with pytest.raises(QueueFull):
            scheduler.submit(long[5:6])
        assert (scheduler.running, scheduler.queued) == (2, 3)
        scheduler.cancel(long[1:3])  # one running, one queued
        wait_until(lambda: scheduler.queued == 1 and scheduler.running == 2)
        wait_until(lambda: long[3] in inbox.deltas)
        scheduler.submit(long[5:7])
        with pytest.raises(QueueFull):  # all or none
            scheduler.submit(long[7:9])
        assert scheduler.queued == 3
        count = len(inbox.deltas[long[1]])
        scheduler.drain()
        with pytest.raises(Draining):
            scheduler.submit(long[7:8])
        scheduler.cancel(long[5:7])
        assert len(inbox.deltas[long[1]]) == count
        scheduler.close()
        for job in (long[0], long[3], long[4]):
            assert inbox.error(job) == STOPPED
        assert not scheduler.alive and not scheduler.running and not scheduler.queued


def test_logits_that_are_not_numbers_fail_their_job_alone(characters: Model) -> None:
    tokenizer = characters[1]
    broken = make_model(tokenizer)
    broken.embedding_layer.token_embeddings.weight.data[3] = torch.nan
    good = [Job(prompt_of(1, 2), 1), Job(prompt_of(2), 1)]
    bad = [Job(prompt_of(3), 5), Job(prompt_of(1, 3, 2), 0, logprobs=2, score_prompt=True)]
    with scheduler_of((broken, tokenizer)) as (scheduler, inbox):
        scheduler.submit([good[0], *bad, good[1]])
        wait_until(lambda: all(map(inbox.done, [*bad, *good])))
        assert scheduler.alive
    for job in bad:
        assert "not numbers" in inbox.error(job)
    for job in good:
        assert inbox.text(job) == alone(characters, job)


def test_padding_is_never_an_alternative(characters: Model) -> None:
    """Even if all others are listed, impossible tokens among them, and in a prompt."""
    model, tokenizer = make_model(characters[1]), characters[1]
    model.lm_head.bias.data[1:4] = -torch.inf
    padding = tokenizer.pad_token_id
    job = Job(prompt_of(5, padding, padding, 6), 3, logprobs=20, score_prompt=True)
    with scheduler_of((model, tokenizer)) as (scheduler, inbox):
        scheduler.submit([job])
        wait_until(lambda: inbox.done(job))
    scores = [each for delta in inbox.deltas[job] for each in delta.logprobs]
    others = set(tokenizer.chars) - {tokenizer.pad_char}
    assert [each.top and set(each.top) for each in scores] == [None] + 6 * [others]


def test_an_id_without_a_token_fails_its_job_alone(characters: Model) -> None:
    tokenizer = characters[1]

    class Holes:
        pad_token_id, end_tokens = tokenizer.pad_token_id, tokenizer.end_tokens

        def decode(self, tokens: list[int]) -> str:
            if 0 in tokens:
                raise KeyError("Token ID '0' not found")
            return tokenizer.decode(tokens)

    biased = make_model(tokenizer)
    biased.lm_head.bias.data[0] = 1000
    job = Job(prompt_of(1), 5)
    with scheduler_of((biased, Holes())) as (scheduler, inbox):  # type: ignore[arg-type]
        scheduler.submit([job])
        wait_until(lambda: inbox.done(job))
        assert scheduler.alive
    assert inbox.error(job) == "Token ID '0' not found"


def test_an_alternative_without_a_token_is_left_out(characters: Model) -> None:
    tokenizer = characters[1]

    class Holes:
        pad_token_id, end_tokens = tokenizer.pad_token_id, tokenizer.end_tokens

        def decode(self, tokens: list[int]) -> str:
            if 0 in tokens:
                raise KeyError("Token ID '0' not found")
            return tokenizer.decode(tokens)

    count = tokenizer.vocab_size
    job = Job(prompt_of(1, 2), 0, logprobs=count, score_prompt=True)
    with scheduler_of((make_model(tokenizer), Holes())) as (scheduler, inbox):  # type: ignore[arg-type]
        scheduler.submit([job])
        wait_until(lambda: inbox.done(job))
        assert scheduler.alive
    top = [each.top for delta in inbox.deltas[job] for each in delta.logprobs if each.top]
    assert top and all(len(each) == count - 2 for each in top)  # nor is padding there


@pytest.mark.parametrize("attached", [False, True], ids=["kernel", "modules"])
def test_a_job_that_fails_leaves_the_others_alone(characters: Model, attached: bool) -> None:
    """When it joins, halfway through its prompt, or in the middle of its text."""
    model = make_model(characters[1])
    if attached:
        model.lm_head.register_forward_hook(lambda *a: None)
    source = random.Random(6)
    good = [random_job(source, characters[1]) for _ in range(20)]
    unknown = [
        Job(prompt_of(1, 999), 5),
        Job(prompt_of(999), 5, Sampling(1.0, 0, 1.0, 0.0, 1.2)),
        Job(prompt_of(*[1] * SCORED_TOKENS, 999), 5, logprobs=2, score_prompt=True),
    ]
    jobs = [*good, *unknown]
    source.shuffle(jobs)
    with scheduler_of((model, characters[1])) as (scheduler, inbox):
        scheduler.submit(jobs)
        wait_until(lambda: all(map(inbox.done, jobs)))
        assert scheduler.alive
    for job in unknown:
        assert "999" in inbox.error(job)
    for job in good:
        assert inbox.text(job) == alone(characters, job)


def test_running_out_of_memory_fails_no_more_jobs_than_needed(
    characters: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """Several at a time do not fit, nor does a prompt of seven tokens alone."""
    source = random.Random(7)
    good = [random_job(source, characters[1]) for _ in range(6)]
    bad = Job(prompt_of(*[1] * 7), 5)
    with scheduler_of(characters) as (scheduler, inbox):
        append = scheduler._decoding.append

        def append_in_little_memory(
            tokens: Mapping[int, Sequence[int]], every: bool = False
        ) -> torch.Tensor:
            if len(tokens) > 2 or any(len(each) == 7 for each in tokens.values()):
                raise MemoryError
            return append(tokens, every)

        scheduler._decoding.append = append_in_little_memory  # type: ignore[method-assign]
        scheduler.submit([*good[:3], bad, *good[3:]])
        wait_until(lambda: all(map(inbox.done, [bad, *good])))
        assert scheduler.alive
    assert inbox.error(bad) == "the server ran out of memory"
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [MemoryError]
    for job in good:
        assert inbox.text(job) == alone(characters, job)


def test_an_unexpected_error_fails_its_job_and_is_logged(
    characters: Model, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        end_tokens = characters[1].end_tokens

        def decode(self, tokens: list[int]) -> str:
            if len(tokens) == 4:
                raise RuntimeError("no text")
            return characters[1].decode(tokens)

    short, long = Job(prompt_of(1), 2), Job(prompt_of(1), 5)
    with scheduler_of((characters[0], Broken())) as (scheduler, inbox):  # type: ignore[arg-type]
        scheduler.submit([short, long])
        wait_until(lambda: inbox.done(short) and inbox.done(long))
        assert scheduler.alive
    assert inbox.error(long) == INTERNAL_ERROR and "no text" in caplog.text
    assert inbox.text(short) == alone(characters, short)


def test_no_client_waits_for_a_scheduler_that_broke(
    characters: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = []
    monkeypatch.setattr(threading, "excepthook", lambda args: errors.append(args.exc_type))
    with scheduler_of(characters) as (scheduler, inbox):
        deliver = scheduler._deliver

        def fail_once(deltas: list[tuple[Job, Delta]]) -> None:
            scheduler._deliver = deliver
            raise ZeroDivisionError

        scheduler._deliver = fail_once
        job = Job(prompt_of(1), 5)
        scheduler.submit([job])
        wait_until(lambda: inbox.done(job))
        wait_until(lambda: not scheduler.alive)
        with pytest.raises(Draining):
            scheduler.submit([Job(prompt_of(1), 5)])
    assert errors == [ZeroDivisionError]
    assert inbox.error(job) == STOPPED
