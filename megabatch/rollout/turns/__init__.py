"""Conversations of several turns: the model and an environment, or tools, answer each other."""
