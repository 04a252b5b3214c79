"""The model to fine-tune: its task, its weights, and LoRA."""

from __future__ import annotations

import bisect
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastllm import command
from fastllm.command import Log
from fastllm.finetuning.config import FinetuneConfig, Task
from fastllm.integrations import hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def choose_task(model_config: Any, asked: str | None) -> Task:
    """The task that the architecture is made for.

    Raises:
        ValueError: another one was asked for, or it is not a language model at all.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    config_class, name = type(model_config), model_config.model_type
    if name == "xlnet":
        raise ValueError("xlnet predicts tokens in a random order, which is not supported")
    if getattr(model_config, "is_encoder_decoder", False):
        raise ValueError(f"{name} has an encoder and a decoder; only one of them can be trained")
    # Every masked model can also be built as a decoder; its weights were not trained for that.
    is_decoder = getattr(model_config, "is_decoder", False)
    masked = config_class in MODEL_FOR_MASKED_LM_MAPPING and not is_decoder
    if not masked and config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{name} is not a language model")
    task: Task = "mlm" if masked else "causal"
    if asked not in (None, task):
        made_for = "masked tokens (--task mlm)" if masked else "the next token (--task causal)"
        raise ValueError(f"task {asked}: {name} is made to predict {made_for}")
    return task


def load_model(
    config: FinetuneConfig,
    model_config: Any,
    tokenizer: PreTrainedTokenizerBase,
    log: Log,
) -> Any:
    """The model with an embedding for every token, and with LoRA if `config` asks for it."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, set_seed

    set_seed(config.seed)
    auto_class = AutoModelForMaskedLM if config.task == "mlm" else AutoModelForCausalLM
    model, missing = hub.load_weights(config.model, model_config, auto_class)
    start = "random weights" if missing is None else config.model
    log(f"model       {type(model).__name__}, {model.num_parameters():,} parameters, {start}")
    if missing and not config.resume:
        parts = modules_without_weights(model, missing)
        parts |= {name for name in missing if not any(name.startswith(f"{m}.") for m in parts)}
        then = "this run learns it, and the loss before it says little"
        if config.eval_only:
            then = "the loss says little before a run has learnt it"
        command.log(
            "warning: not in the model's files and therefore random: "
            f"{', '.join(sorted(parts))}. This part is new; {then}"
        )
    check_length(model, config.max_seq_len)
    rows = model.get_input_embeddings().weight.size(0)
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer))
        log(f"vocabulary  {rows:,} embeddings extended to the tokenizer's {len(tokenizer):,}")
    set_padding(model, tokenizer.pad_token_id)
    if not config.lora:
        return model
    if missing is None:
        command.log(
            "warning: all weights are random, and --lora leaves them so; train without it first"
        )
    # Nothing reads the row of the padding.
    added = [row for row in range(rows, len(tokenizer)) if row != tokenizer.pad_token_id]
    return add_lora(config, model, missing or set(), added, log)


def check_length(model: Any, length: int) -> None:
    """Raises a `ValueError` if the model has fewer positions than its configuration says."""

    @torch.no_grad()
    def fits(length: int) -> bool:
        # RoBERTa gives padding no position.
        ids = torch.full((1, length), 0 if model.config.pad_token_id != 0 else 1)
        try:
            model.base_model(input_ids=ids)
        except (IndexError, RuntimeError):
            return False
        return True

    model.eval()
    if fits(length) or not fits(1):  # not even one: not for want of positions
        return
    longest = bisect.bisect_left(range(1, length), True, key=lambda n: not fits(n))
    raise ValueError(
        f"max_seq_len {length}: the model takes at most {longest}, fewer than its "
        "configuration says"
    )


def set_padding(model: Any, pad_token_id: int) -> None:
    """Tells the model which token is padding: its row of the embeddings gets no gradient.

    Raises:
        ValueError: the model counts positions from another padding token, as RoBERTa does.
    """
    embeddings, own = model.get_input_embeddings(), model.config.pad_token_id
    others = [each for each in model.modules() if isinstance(each, nn.Embedding)]
    if own != pad_token_id and any(
        each.padding_idx is not None for each in others if each is not embeddings
    ):
        raise ValueError(
            f"{model.config.model_type} counts positions from its padding token, number {own}; the "
            f"tokenizer's is {pad_token_id}. Give the model's own tokenizer, or train a "
            "config.json whose pad_token_id is that of the tokenizer"
        )
    model.config.pad_token_id = pad_token_id
    if getattr(embeddings, "padding_idx", None) is not None:
        embeddings.padding_idx = pad_token_id


def add_lora(
    config: FinetuneConfig, model: Any, missing: set[str], added: list[int], log: Log
) -> Any:
    """The model with LoRA's matrices beside its frozen weights.

    Args:
        missing: names of parameters that start at random. Modules with only such parameters are
            trained as a whole.
        added: rows of the embeddings that start at random; they are trained as well, unless the
            head shares them and has a bias.

    Raises:
        ValueError: a target is not a linear module of this model.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    known = {name.split(".")[-1] for name in linear}
    if unknown := set(config.lora_targets) - known:
        raise ValueError(
            f"lora_targets: this model has no module {', '.join(sorted(unknown))}; it has "
            f"{', '.join(sorted(known))}"
        )
    untie(model, [linear[name] for name in linear if name.split(".")[-1] in config.lora_targets])
    untrained = modules_without_weights(model, missing)
    head = model.get_output_embeddings()
    is_tied = head is not None and head.weight is model.get_input_embeddings().weight
    if added and is_tied and getattr(head, "bias", None) is not None:
        # peft would compute the head without its bias.
        command.log(f"warning: --lora leaves {len(added)} added embeddings at their random start")
        added = []
    frozen = sorted(p for p in missing if not any(p.startswith(f"{name}.") for name in untrained))
    if frozen:
        command.log(f"warning: --lora leaves these at their random start: {', '.join(frozen)}")
    with warnings.catch_warnings():
        # peft's use of transformers, and what it chooses by itself for heads.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        adapted = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM" if config.task == "causal" else None,
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                target_modules=config.lora_targets or None,
                modules_to_save=sorted(untrained) or None,
                trainable_token_indices=added or None,
                fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
            ),
        )
    # Otherwise every checkpoint asks the hub for the configuration of that name.
    adapted.peft_config["default"].base_model_name_or_path = None
    trainable, total = adapted.get_nb_trainable_parameters()
    log(f"trainable   {trainable:,} parameters, {trainable / total:.2%}")
    return adapted


def untie(model: Any, targets: list[nn.Module]) -> None:
    """Gives modules parameters of their own in place of those that they share with others.

    Merging LoRA would change a shared weight for all who use it.
    """
    uses = Counter(id(each) for _, each in model.named_parameters(remove_duplicate=False))
    for module in targets:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if uses[id(parameter)] > 1:
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
                model.config.tie_word_embeddings = False


def modules_without_weights(model: nn.Module, missing: set[str]) -> set[str]:
    """The outermost modules whose parameters are all among the missing ones."""
    found: set[str] = set()
    for name, module in model.named_modules():
        own = {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
        if name and own and own <= missing and not any(name.startswith(f"{f}.") for f in found):
            found.add(name)
    return found
