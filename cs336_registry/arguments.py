"""Seeded arguments for cases, laws and error cases.

Every draw comes from numpy's PCG64 in float64 and is cast afterwards, so a case has the same values in every dtype, on
every device and with every version of PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch


class ArgumentMaker:
    """Draws tensors and writes input files. `dtype` is the floating dtype's name; `folder` receives files."""

    def __init__(
        self,
        seed: int = 0,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        folder: Path | None = None,
    ) -> None:
        import numpy as np

        self.seed, self.dtype_name, self.device, self.folder = seed, dtype, device, folder
        self.generator: np.random.Generator = np.random.Generator(np.random.PCG64(seed))

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype_name)

    def tensor(self, values: Any) -> torch.Tensor:
        """`values` (anything numpy takes) as a floating tensor of this maker's dtype and device."""
        import numpy as np
        import torch

        return torch.from_numpy(np.array(values, dtype=np.float64)).to(self.dtype).to(self.device)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return self.tensor(self.generator.standard_normal(shape) * scale + mean)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return self.tensor(self.generator.uniform(low, high, shape))

    def integers(self, *shape: int, low: int = 0, high: int) -> torch.Tensor:
        """int64 values in [low, high)."""
        import torch

        return torch.from_numpy(self.generator.integers(low, high, shape, dtype="int64")).to(self.device)

    def boolean(self, *shape: int, probability: float = 0.5) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.generator.random(shape) < probability).to(self.device)

    def file(self, content: bytes | str, name: str = "input.txt") -> Path:
        """`content` written into this maker's folder; text is encoded as UTF-8."""
        if self.folder is None:
            raise ValueError("this ArgumentMaker has no folder: pass folder=tmp_path")
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def choice(self, items: Sequence[Any]) -> Any:
        return items[int(self.generator.integers(len(items)))]
