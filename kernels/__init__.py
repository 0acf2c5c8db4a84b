"""Triton kernels of ptq4adm, installed as the package ``ptq4adm.kernels``: one file a kernel.

``launch.py`` runs or compiles them, ``tuning.py`` knows their tiles. Importing this package imports
no Triton; its modules do. Operators that use the kernels are in ``ptq4adm.ops``.

The folder also is importable as a top-level ``kernels`` when the repository root is on
``sys.path``, which would shadow the unrelated package of that name: the guard below refuses it.
"""

if __name__ != "ptq4adm.kernels":
    raise ImportError(
        f"imported as {__name__!r}, but this folder is the package 'ptq4adm.kernels': "
        "run `pip install -e .` and keep the repository root off sys.path"
    )
