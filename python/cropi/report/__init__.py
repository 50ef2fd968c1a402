"""What tells whether a selection can be trusted: the check of a model on its own data, and the report page."""
