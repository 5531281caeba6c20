"""The move of all tensors of a group as one kernel, written in Triton. Where Triton does not run, the rules' loops do.

`table.py` says which elements move with which rate, `programs.py` has the kernels, and `launch.py` starts them.
"""
