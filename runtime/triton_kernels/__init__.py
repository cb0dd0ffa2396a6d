"""Triton kernels for the ops, on the same packed codes: for CUDA tensors, and in Triton's interpreter for tests.

Nothing here is imported before a kernel is first wanted, but for ``backends.py`` in this folder, which knows no Triton:
``import prequant`` needs neither Triton nor a GPU. No kernel has run on a GPU so far; all are compiled for one, and run
in the interpreter.
"""
