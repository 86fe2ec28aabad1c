"""Conversations, the target's answers, and the features captured from them."""
