"""GGUF, llama.cpp's file format: settings, and tensors in many number formats."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class GgufFile:
    """The content of a GGUF file.

    Attributes:
        path: of the file.
        architecture: of the model, by llama.cpp's name.
        settings: everything but the tensors, by key.
        shapes: of the tensors, by name, as PyTorch orders dimensions.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, incomplete, or not a GGUF file.
        ImportError: the gguf package is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ImportError(f"{path} needs the gguf package: pip install gguf") from error
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        try:
            reader = GGUFReader(path)
            self.settings: dict[str, Any] = {
                key: field.contents() for key, field in reader.fields.items()
            }
        except Exception as error:  # the package has no error of its own for a damaged file
            problem = f"{path} is not a GGUF file, or is damaged or incomplete: {error}"
            raise ValueError(problem) from error
        self.path = path
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.shapes = {
            name: [int(size) for size in reversed(tensor.shape)]
            for name, tensor in self._tensors.items()
        }
        self.architecture = str(self.settings.get("general.architecture"))
        if self.settings.get("split.count", 1) not in (0, 1):
            raise ValueError(f"{path} is one of several parts; join them with llama-gguf-split")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A setting.

        Args:
            default: for a key that the file lacks; without one, the key is required.

        Raises:
            ValueError: it is missing, or not of this kind; the message names the key alone.
        """
        value = self.settings.get(key, default)
        if value is None:
            raise ValueError(f"it has no {key}")
        if type(value) is not kind:
            raise ValueError(f"{key} must be of type {kind.__name__}, not {value!r}")
        # The shortest number that rounds to the one in the file: 1e-05, not 9.99999974e-06.
        return float(str(np.float32(str(value)))) if kind is float else value

    def model(self, key: str, kind: type, default: Any = None) -> Any:
        """A setting of the architecture; see `get`."""
        return self.get(f"{self.architecture}.{key}", kind, default)

    def read(self, name: str) -> Tensor:
        """A tensor, in float32.

        Raises:
            ValueError: its number format is unknown.
        """
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise ValueError(f"{self.path}: {name} is of the unknown type {kind}") from None
        return torch.from_numpy(np.array(values, dtype=np.float32)).view(self.shapes[name])
