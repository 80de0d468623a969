import subprocess
import sys


def test_nobody_but_the_kernel_starts_it() -> None:
    done = subprocess.run([sys.executable, "-m", "agent", "init"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "only the kernel starts this" in done.stderr
