"""Holds the code that kernels on Hopper (sm_90) share. Import its files: this door is empty.

`constants.py` has the numbers of the hardware, of tiles and of softmax, `ptx.py` the launch of persistent kernels and
words of PTX that Pallas lacks, `simt.py` a small vocabulary for one thread's registers, and `work_split.py` equal
shares of work whose items have different lengths.
"""
