"""What the kernels take on this machine, beside the floors that the same run measures. ``cropi bench`` prints it."""
