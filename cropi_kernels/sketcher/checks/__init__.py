"""What is compared with autograd before the first batch and in it."""
