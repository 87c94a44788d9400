"""Stands where SGLang's kernel package would be: importable, and every function of it says that it is missing.

SGLang imports ``sgl_kernel`` by name when it runs on a CPU; there is no build of it for CPUs on the package index.
"""


def __getattr__(name: str):
    if name.startswith("__") or not name.endswith("_cpu"):
        raise AttributeError(f"module 'sgl_kernel' has no attribute {name!r}: this is llmir's stand-in for it")

    def missing(*args, **kwargs):
        raise NotImplementedError(
            f"sgl_kernel.{name} does not exist here: there is no CPU build of sgl_kernel on the package index, "
            f"and what needs this function cannot be served (see shims/sglang-cpu/README.md)"
        )

    missing.__name__ = name
    return missing
