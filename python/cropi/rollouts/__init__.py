"""Rollouts: prompts and a reward function in, trajectory records with token ids and log-probs out."""
