"""Small models with tokenizers in Hugging Face's format, as transformers writes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastllm.tokenization import SubwordTokenizer
from tests.tokenizer_kinds import TEXT, byte_fallback, unigram


def library_of(tokenizer: SubwordTokenizer) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer.to_json())


def with_template(library: Any, single: str) -> Any:
    """The tokenizer with a template such as `<s> $A` for texts."""
    from tokenizers.processors import TemplateProcessing

    library.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    library.post_processor = TemplateProcessing(
        single=single,
        special_tokens=[(token, library.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    return library


def like_gpt2() -> Any:
    """Byte-level BPE without anything around a text."""
    library = library_of(SubwordTokenizer.train([TEXT], "bpe", 300))
    library.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    return library


def like_llama() -> Any:
    """SentencePiece's BPE, whose bytes are ordinary tokens."""
    from tokenizers import Tokenizer

    data = json.loads(byte_fallback().to_json())
    kept = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps({**data, "added_tokens": kept}))


LIBRARIES: dict[str, Callable[[], Any]] = {
    "like GPT-2": like_gpt2,
    "with bos": lambda: with_template(like_gpt2(), "<s> $A"),
    "like Llama": lambda: with_template(like_llama(), "<s> $A"),
    "Unigram with eos": lambda: with_template(library_of(unigram()), "$A </s>"),
    "bos twice": lambda: with_template(like_gpt2(), "<s> <s> $A </s>"),
}
# For each architecture, its tokenizer and its configuration.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("like GPT-2", "GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "llama": (
        "like Llama",
        "Llama",
        {
            "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        },
    ),
}  # fmt: skip


def save_hf_model(folder: Path, kind: str, **generation: Any) -> tuple[Any, Any]:
    """Saves a model of random weights with its tokenizer, and returns both.

    Args:
        generation: for generation_config.json.
    """
    import transformers

    library, name, sizes = MODELS[kind]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=LIBRARIES[library](),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<PAD>",
    )
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer) + 5,  # more than there are tokens
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    model_class = transformers.AutoModelForCausalLM
    model = model_class.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():  # the logits of an untrained model are nearly uniform
        parameter.data = parameter.data * 3 + 0.1 * torch.randn_like(parameter)
    for key, value in generation.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompt: str, count: int) -> list[int]:
    """The ids that transformers gives, those of the prompt included."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids: list[int] = model.generate(**inputs, do_sample=False, max_new_tokens=count)[0].tolist()
    return ids
