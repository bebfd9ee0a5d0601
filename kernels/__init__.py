"""Triton kernels of eefast, installed as `eefast.kernels`: device kernel and launcher per op."""

if __name__ == "kernels":
    raise ImportError("this folder is eefast.kernels; the import name `kernels` belongs to another package")
