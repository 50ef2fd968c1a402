"""Adapters for slime: prompts that change inside a run, and its rollouts as trajectory records."""
