"""fastllm's kernels under the models of transformers, in place: `accelerate(model)`.

`accelerate` gives a module one of the classes in `architectures`, a subclass of the one it had that
differs in `forward` alone: parameters, names, checkpoints and `isinstance` are unaffected. A fused
operation takes the parameters of several modules and calls none of them, so each layer first checks
that nothing is attached to these, and otherwise calls its modules; peft's LoRA is understood.
Attention outside a fused layer is reached through transformers' own attention interface. `generate`
gets a cache in the kernels' memory, and its tokens go through the whole model in one operation.

All of this is for CPUs.
"""

from fastllm.integrations.huggingface.api import accelerate, accelerated

__all__ = ["accelerate", "accelerated"]
