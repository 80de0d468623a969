"""Signatures, chains and claims of evidence: the only place. Broker, `doctor`, `verify` and the GPU gate call it.

A verifier answers "did genuine silicon say this, and what exactly?". Whether that is good enough is the broker's policy.
"""
