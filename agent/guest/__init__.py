"""What we ask of the guest's kernel: mounts, memory figures, process hardening. Standard library only."""
