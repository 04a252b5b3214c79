"""Serving the newest checkpoint of a run whose training goes on."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from fastllm.command import log
from fastllm.generation.decoding import start_decoding
from fastllm.models.decoder import DecoderModel
from fastllm.serving.app import Service
from fastllm.serving.model import ServedModel
from fastllm.serving.scheduler import AnyDecoding
from fastllm.training.checkpoint import CheckpointError, find_checkpoint, read_progress

# Seconds between two looks for a newer checkpoint; a look reads one small file. After a failure
# they grow to RETRY_S: a damaged checkpoint must not be read all the time.
INTERVAL_S = 2.0
RETRY_S = 60.0

Load = Callable[[Path], tuple[ServedModel, DecoderModel]]


async def keep_newest(service: Service, run: Path, load: Load) -> None:
    """Loads every newer checkpoint of the run; later requests are computed with it.

    One that cannot be loaded is reported once and tried again, since it may be incomplete or out of
    reach only for a while; the model that is served stays meanwhile. During a load both are in
    memory.

    Args:
        run: what `load` takes: a run folder, or a checkpoint, which never becomes newer.
    """
    wait, reported = INTERVAL_S, None
    while True:
        await asyncio.sleep(wait)
        step = await asyncio.to_thread(_newest_step, run)
        if step is None or step == service.served.step:
            continue
        try:
            served, decoding = await asyncio.to_thread(_prepare, service, run, load)
        except Exception as error:  # nothing that a training run writes may end the server
            wait = min(2 * wait, RETRY_S)
            # Unless training has replaced the checkpoint while it was read.
            if step != reported and await asyncio.to_thread(_newest_step, run) == step:
                reported = step
                log(f"cannot serve step {step:,}: {error}")
            continue
        wait = INTERVAL_S
        service.renew(served, decoding)
        log(f"serving step {served.step:,}")


def _newest_step(run: Path) -> int | None:
    try:
        progress = read_progress(find_checkpoint(run))
    except (CheckpointError, OSError):  # training has just removed it
        return None
    return None if progress is None else progress.step


def _prepare(service: Service, run: Path, load: Load) -> tuple[ServedModel, AnyDecoding]:
    served, model = load(run)
    now = service.served
    if (served.tokenizer.fingerprint, served.max_seq_len) != (
        now.tokenizer.fingerprint,
        now.max_seq_len,
    ):
        raise ValueError(
            "its vocabulary or max_seq_len differs from the served model's; start the server again"
        )
    return served, start_decoding(
        model, service.slots, precision=served.precision, capacity=served.max_seq_len
    )
