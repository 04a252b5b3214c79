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
            self.settings = {key: field.contents() for key, field in reader.fields.items()}
        except Exception as error:  # the package has no error of its own for a damaged file
            problem = f"{path} is not a GGUF file, or is damaged or incomplete: {error}"
            raise ValueError(problem) from error
        self.path = path
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.shapes = {
            name: [int(size) for size in reversed(tensor.shape)]
            for name, tensor in self._tensors.items()
        }
        self.architecture = self.get("general.architecture", str)
        if self.get("split.count", int, 1) > 1:
            raise ValueError(f"{path} is one of several parts; join them with llama-gguf-split")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A setting.

        Args:
            default: for a key that the file lacks; without one, the key is required.

        Raises:
            ValueError: it is missing, or not of this kind.
        """
        value = self.settings.get(key, default)
        if value is None:
            raise ValueError(f"{self.path} has no {key}")
        if not isinstance(value, kind):
            raise ValueError(f"{self.path}: {key} must be of type {kind.__name__}, not {value!r}")
        return value

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
            raise ValueError(
                f"{self.path}: {name} has numbers of type {kind}; export it in another"
            ) from None
        return torch.from_numpy(np.array(values, dtype=np.float32)).view(self.shapes[name])
