# Sourced by tests/run.sh and examples/quickstart/run.sh, not run by itself.
#
#   source tools/environment.sh        from the root of the checkout
#   prepare_environment cpu,dev        the extras of setup.py that are needed
#   prepare_browser                    a Chromium, for the tests of the server's page
#   prepare_shellcheck                 for the tests of the launch scripts
#
# Ensures that `python` is 3.11 or 3.12 and has this checkout installed with the extras: in the active virtual
# environment, else in .venv, which is created if missing. Does nothing if the environment is up to date.

prepare_environment() {
    local extras="$1" candidate stamp wanted pip_options=()
    # With this variable set, every process would compile all modules to bytecode at start.
    unset PYTHONDONTWRITEBYTECODE
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        if [ ! -f .venv/bin/activate ]; then
            candidate="$(_find_python)" || return 2
            echo "making .venv with $("$candidate" --version)" >&2
            "$candidate" -m venv .venv || return 2
            pip_options=(--no-compile)  # compiling all 14,000 modules takes a minute; most are never imported
        fi
        source .venv/bin/activate
    elif python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
        # Keep the environment's own torch (a CUDA build, a container's); the pins of cpu and gpu would replace it.
        extras="$(tr ',' '\n' <<<"$extras" | sed '/^[cg]pu$/d' | paste -s -d , -)"
    fi
    stamp="$VIRTUAL_ENV/share4v-${extras:-base}"
    wanted="$(cat setup.py pyproject.toml | sha256sum)"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && [ "$(_installed_from)" = "$(pwd -P)" ]; then
        return 0
    fi
    echo "installing megatron_share4v[$extras] into $VIRTUAL_ENV" >&2
    python -m pip install "${pip_options[@]}" -e ".${extras:+[$extras]}" >&2 || return 2
    echo "$wanted" >"$stamp"
}

# Install a Chromium for the tests of the server's page, as root with apt-get; else print what to install.
prepare_browser() {
    command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null ||
        _install chromium "the tests of the server's page fail"
}

# A shellcheck for the launch scripts.
prepare_shellcheck() {
    command -v shellcheck >/dev/null || _install shellcheck "the launch scripts are checked by bash -n alone"
}

# _install PACKAGE CONSEQUENCE: a package of the distribution, as root on a Debian system; never through sudo.
_install() {
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing $1" >&2
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq >&2 && apt-get install -y -qq --no-install-recommends "$1" >&2 && return
    fi
    echo "no $1: $2; install it with your distribution's package manager (Debian, Ubuntu: apt-get install $1)" >&2
}

_find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    echo "no Python 3.11 or 3.12 found on PATH: install one, or activate a virtual environment made with one" >&2
    return 2
}

_installed_from() {
    (cd / && python -c '
import pathlib, megatron_share4v
print(pathlib.Path(megatron_share4v.__file__).resolve().parents[1])' 2>/dev/null)
}
