"""Readers of the rollout files that trainers write."""
