"""The tests, how their threads wait, and where the Triton kernels run in them."""

import os
from importlib import import_module
from importlib.util import find_spec

# The tests' operations take microseconds. Threads that spin while they wait for the next one would
# take a core from it, and from the tests beside: five times the CPU time in all.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# On a CPU that is Triton's interpreter, which must be asked for while they are imported; programs
# that tests start are not to inherit it.
TRITON_DEVICE = os.environ.get("FASTLLM_TEST_TRITON", "cpu")
TRITON_OPERATIONS = "adam attention dropout embedding linear_cross_entropy mlp norm rope".split()
if TRITON_DEVICE == "cpu" and find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"
    import_module("triton.experimental.gluon")  # which the first launch would import
    for operation in TRITON_OPERATIONS:
        import_module(f"fastllm.ops.{operation}_triton")
    del os.environ["TRITON_INTERPRET"]
