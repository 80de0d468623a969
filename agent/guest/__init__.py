"""What we ask of the guest's kernel (mounts, memory figures, hardening, routes, uevents) and of a CoCo guest; initdata. All but
`uevents.py` is standard library only.
"""
