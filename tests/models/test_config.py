import math
from typing import Any

import pytest
from pydantic import ValidationError

from fastllm.models.config import DecoderConfig, RopeScaling, rotation

SIZES = {"vocab_size": 11, "hidden_size": 24, "num_layers": 2, "num_heads": 4}
ROPE = {"pos_encoding": "rope"}


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"num_kv_heads": 3}, r"num_kv_heads \(3\) must divide num_heads \(4\)"),
        ({"hidden_size": 25}, r"hidden_size \(25\) must be divisible by num_heads \(4\)"),
        ({"norm_offset": 1.0}, "norm_offset needs norm rms"),
        ({"norm": "rms", "norm_weight": False, "norm_offset": 1.0}, "norm_offset needs norm rms"),
        ({"norm": "rms", "norm_offset": 1.0, "qk_norm": "all_heads"}, "has no norm_offset"),
        ({"padding_idx": 11}, "outside the vocabulary of 11"),
        ({"window": 3, "causal": False}, "window needs a causal attention"),
        ({"window": 0}, "window"),
        ({"window_pattern": ()}, "window_pattern"),
        ({"local_rope_base": 1e4, "window": 3}, "local_rope_base needs pos_encoding rope"),
        ({"local_rope_base": 1e4, **ROPE}, "local_rope_base needs pos_encoding rope and a window"),
        ({"head_dim": 5, **ROPE}, "makes 5 elements, not an even number"),
        ({"rope_fraction": 0.1, **ROPE}, "makes 0 elements"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, "rope_scaling needs pos_encoding"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}, **ROPE}, "needs original_max"),
        ({"attn_softcap": 0.0}, "attn_softcap"),
        ({"mlp": "swigul"}, r"mlp: choose from gelu, .*, reglu, .* \(got 'swigul'\)$"),
        ({"attn_dropout_p": 1.5}, "attn_dropout_p"),
        ({"heads": 4}, "heads"),
    ],
    ids=str,
)
def test_impossible_combinations_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        DecoderConfig(**{**SIZES, **settings})
    assert "pydantic" not in str(error.value)


def test_sizes_by_default() -> None:
    config = DecoderConfig(**SIZES)
    assert (config.num_kv_heads, config.head_dim, config.mlp_intermediate_size) == (4, 6, 96)
    gated = DecoderConfig(**{**SIZES, "hidden_size": 384, "mlp": "swiglu"})
    assert gated.mlp_intermediate_size == 1024
    again = DecoderConfig.model_validate_json(gated.model_dump_json())
    assert again == gated
    with pytest.raises(ValidationError, match="frozen"):
        config.head_dim = 8


def test_windows_and_bases_of_layers() -> None:
    pattern = {"window": 3, "window_pattern": (True, False), "local_rope_base": 100.0}
    config = DecoderConfig(**SIZES, **pattern, **ROPE)
    assert [config.window_of(i) for i in range(4)] == [3, None, 3, None]
    local, global_ = (config.rotation_of(i)[0] for i in range(2))
    assert local == (1.0, 100 ** (-1 / 3), 100 ** (-2 / 3))
    assert global_ == (1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3))


def test_scaling_slows_what_turns_slowly() -> None:
    plain, _ = rotation(64, 1e4, None)
    length = {"original_max_position_embeddings": 512}
    for kind in ("yarn", "llama3"):
        scaling = RopeScaling(rope_type=kind, factor=8, **length)
        angles, factor = rotation(64, 1e4, scaling)
        assert angles[0] == plain[0]
        assert angles[-1] == pytest.approx(plain[-1] / 8)
        assert factor == (1 + 0.1 * math.log(8) if kind == "yarn" else 1)
    angles, _ = rotation(64, 1e4, RopeScaling(rope_type="ntk", factor=8))
    assert angles[0] == 1 and angles[-1] == pytest.approx(plain[-1] / 8)
