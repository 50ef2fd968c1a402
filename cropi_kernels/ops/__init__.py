"""One folder an op: the plain-torch reference, the kernels, and the public function that checks and dispatches."""
