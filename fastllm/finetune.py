"""Fine-tune a model of transformers: `fastllm finetune --model DIR book.txt`."""

import sys
from contextlib import ExitStack

from fastllm.command import Log, command, errors_in_one_line, log, no_log, stop_on_signals
from fastllm.finetuning.config import FinetuneConfig
from fastllm.training.config import parse_run_settings


@command
def main(arguments: list[str]) -> None:
    config = parse_run_settings(FinetuneConfig, arguments)
    # After the flags: help and their errors need not wait for PyTorch.
    from fastllm.finetuning.checkpoint import last_checkpoint
    from fastllm.finetuning.inputs import find_inputs
    from fastllm.finetuning.run import (
        check_packages,
        go_offline_if_unreachable,
        prepare,
        report,
        run_name,
        save_model,
        write_csv,
    )
    from fastllm.threads import set_threads
    from fastllm.training.metrics import plot_losses
    from fastllm.training.run import run_folder

    info: Log = no_log if config.quiet else log
    threads = set_threads(config.threads)
    with errors_in_one_line(Exception), ExitStack() as stack:
        check_packages(config)
        corpora = find_inputs(config)
        go_offline_if_unreachable(config)
        run_dir = None
        if not config.eval_only:
            run_dir = stack.enter_context(run_folder(config, run_name(config.model)))
        trainer = prepare(config, corpora, run_dir, info)
        info(f"threads     {threads}")
        if run_dir is None:
            metrics = trainer.evaluate()
            loss, perplexity = metrics["eval_loss"], metrics["eval_perplexity"]
            print(f"evaluation  loss {loss:.4f}, perplexity {perplexity:,.3f}")
            return
        info(f"run         {run_dir}")
        checkpoint = str(last_checkpoint(run_dir)) if config.resume else None
        if checkpoint:
            info(f"resuming    from {checkpoint}")
        with trainer.saving_on_error():
            with stop_on_signals(trainer.monitor):
                trainer.train(resume_from_checkpoint=checkpoint)
            number = trainer.monitor.stopped_by
            if not number:
                save_model(trainer, run_dir / "model")
            write_csv(run_dir / "metrics.jsonl", run_dir / "metrics.csv")
            plot_losses(run_dir / "metrics.jsonl", run_dir / "loss.png")
        if number:
            log(
                f"stopped by {number.name} at step {trainer.state.global_step:,}; continue with: "
                f"fastllm finetune --out_dir {run_dir} --resume"
            )
            raise SystemExit(128 + number)
    report(trainer, run_dir, info)


if __name__ == "__main__":
    main(sys.argv[1:])
