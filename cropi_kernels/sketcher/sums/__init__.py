"""The open batch: the sums to which taps add, the kernels that add, and what is asked once a batch."""
