"""The reference key broker (`keyturn broker`): nonces, a policy row per key URI, tokens, sealed keys, an audit log.

Holds policy, not cryptography: evidence is verified by `agent/verify`. Not part of a guest image.
"""
