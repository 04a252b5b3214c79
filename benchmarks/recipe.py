"""nanoGPT's CPU recipe in plain PyTorch, to compare with `python -m fastllm.train`.

The same model from the same weights, the same batches in the same order, the same schedule and
optimizer, with PyTorch's fused attention and fused AdamW:

    python benchmarks/recipe.py --file_path tinyshakespeare.txt --out_dir runs/plain ...

takes the flags of `fastllm.train` (a Pre-LN model without dropout, `--optimizer adamw`).
"""

import sys
import time

import torch

from fastllm.benchmarking.shapes import StepShape
from fastllm.benchmarking.steps import build_stock
from fastllm.training.config import parse_train_config
from fastllm.training.engine import make_optimizers
from fastllm.training.evaluation import evaluate
from fastllm.training.run import choose_run_dir, prepare, resolve


def main(arguments: list[str]) -> None:
    config = parse_train_config(arguments)
    trainer = prepare(resolve(config, choose_run_dir(config, "plain")), print)
    model = trainer.model
    shape = StepShape(
        config.hidden_size,
        config.num_layers,
        config.num_heads,
        config.max_seq_len,
        config.batch_size,
        model.vocab_size,
        config.dropout,
    )
    stock = build_stock(shape, "tuned", model)
    theirs = dict(zip(model.parameters(), stock.parameters(), strict=True))
    (ours,) = make_optimizers(model, config)
    groups = [
        {"params": [theirs[p] for p in group["params"]], "weight_decay": group["weight_decay"]}
        for group in ours.param_groups
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True
    )
    start = time.perf_counter()
    with trainer._loader() as loader:
        for step in range(trainer.total_steps):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * trainer.learning_rate_factor(step)
            stock(next(loader)).backward()
            torch.nn.utils.clip_grad_norm_(stock.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        for ours_parameter, parameter in theirs.items():
            ours_parameter.copy_(parameter)
    if trainer.val_set is None:
        raise SystemExit("error: there is no validation set; set --val_fraction above 0")
    loss = evaluate(model, trainer.val_set, config.batch_size).loss
    print(f"plain PyTorch: {seconds:.1f} s of training, validation loss {loss:.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
