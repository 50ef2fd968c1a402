"""The policy: loading it, where it comes from, and its fingerprint."""
