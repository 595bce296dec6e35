"""Honest numbers: latency, memory, device identity, fidelity to dense, paired statistics."""
