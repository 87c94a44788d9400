"""Lets a torchvision built for CUDA be imported beside a torch built for the CPU.

torchvision's C++ operators do not load there, and it says nothing; but then it describes two of them to torch, which
fails for operators that nobody has declared. Declaring them is enough. Nothing is imported, torch included, until
somebody imports torchvision.
"""

import importlib.abc
import sys

#: The operators that torchvision describes while it is imported, whether or not it has them.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _DeclareFirst(importlib.abc.MetaPathFinder):
    """Finds no module; declares the operators when torchvision is asked for, once."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if not torch.cuda.is_available():
                # Kept: a library that is collected takes its declarations along.
                _DeclareFirst.library = torch.library.Library("torchvision", "DEF")
                for schema in SCHEMAS:
                    self.library.define(schema)
        return None


sys.meta_path.insert(0, _DeclareFirst())
