"""Differential privacy: what was released, what it cost, and the randomness that it rests on."""
