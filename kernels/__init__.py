"""Triton kernels of ptq4adm, installed as the package ``ptq4adm.kernels``: one file a kernel.

``launch.py`` runs or compiles them, ``tuning.py`` knows their tiles. Importing this package imports
no Triton; its modules do. Operators that use the kernels are in ``ptq4adm.ops``.

With the repository root on ``sys.path`` (``python`` started there) the folder also is found as a
top-level ``kernels``, which is what transformers looks for to find an unrelated package. Under that
name it is empty, and of version 0, which transformers takes for too old.
"""

if __name__ != "ptq4adm.kernels":
    __version__ = "0"
    __path__ = []

    def __getattr__(name: str) -> object:
        raise AttributeError(
            f"{__name__}.{name}: this folder is the package 'ptq4adm.kernels'; run "
            "`pip install -e .` and import it by that name"
        )
