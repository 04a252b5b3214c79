"""How much memory training takes, and whether this machine has it."""

from fastllm.models.decoder import DecoderModel
from fastllm.ops import decoder_loss, dispatch
from fastllm.ops.parameters import LARGE
from fastllm.training.config import TrainConfig


def estimate_memory_mb(model: DecoderModel, config: TrainConfig, threads: int) -> float:
    """What training adds to the resident memory, in MiB, to about 10 % on a CPU.

    The peak is either where the backward begins, with weights, two moments and all activations
    there, or where it ends, with all gradients.

    Args:
        model: may be on the meta device.
    """
    B, S, L, H, V = (
        config.batch_size,
        config.max_seq_len,
        config.num_layers,
        config.hidden_size,
        model.vocab_size,
    )
    parameters = sum(p.numel() for p in model.parameters())
    # A tied weight has two gradients until autograd adds them up.
    gradients = parameters + (V * H if model.tie_word_embeddings else 0)
    if dispatch.kernels is None or dispatch.requested() == "ref":
        activations = _reference_floats(config, V)
        floats = 3 * parameters + max(activations, gradients)
    elif decoder_loss.why_not_shape(B, S, V) is None:
        # A group of sequences goes through all layers in each thread; weights are packed twice.
        rows = -(-decoder_loss.GROUP_ROWS // S) * S
        per_row = (10 * L + 16) * H + V
        floats = 5 * parameters + gradients + threads * rows * per_row
    else:
        # A layer keeps 10 H floats a token, its backward works on as many. Under gradient
        # checkpointing a third of it stays behind in the allocator.
        layers = 1 + L // 3 if config.gradient_checkpointing else L
        activations = B * S * H * (10 * layers + L + 10)
        logits = min(B * S * V, 2**24)
        floats = 3 * parameters + max(V * H + activations, gradients) + logits
        # A checkpoint adds up one weight after the other in float64, in a copy that finds room
        # where gradients were, but for those that keep their memory.
        floats += 2 * max((p.numel() for p in model.parameters() if p.nbytes >= LARGE), default=0)
    libraries = 125  # loaded on the way: kernels of PyTorch's own, matplotlib
    return libraries + 4 * floats / 2**20


def _reference_floats(config: TrainConfig, V: int) -> int:
    """Activations and logits of the reference.

    A layer keeps 30 H + 3 N S floats a token with dropout and 27 H + 2 N S without (measured).
    Under gradient checkpointing every layer keeps its input, one has all of that, and a third of it
    stays behind in the allocator for each of the others.
    """
    B, S, N, L, H = (
        config.batch_size,
        config.max_seq_len,
        config.num_heads,
        config.num_layers,
        config.hidden_size,
    )
    layer = B * S * (30 * H + 3 * N * S if config.dropout else 27 * H + 2 * N * S)
    kept = layer + L * (B * S * H + layer // 3) if config.gradient_checkpointing else L * layer
    return kept + 3 * B * S * V
