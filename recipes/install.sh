# shellcheck shell=bash
# Sourced by quickstart.sh, install_gpu.sh and tests/run.sh: makes .venv beside the code (TAWIN_VENV: another folder), installs
# requirements once, activates it. TAWIN_PYTHON chooses the interpreter (3.11 or 3.12), TAWIN_TORCH_INDEX the package index
# of torch. On a GPU machine: bash recipes/install_gpu.sh
python="${TAWIN_PYTHON:-python3}" venv="${TAWIN_VENV:-.venv}"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || {
    echo "Python 3.11 or 3.12 is needed, $python is $("$python" --version); set TAWIN_PYTHON" >&2
    exit 2
}
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then # Debian keeps venv in a package of its own
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -y -qq python3-venv python3-pip >&2
    else
        echo "$python cannot make virtual environments; install python3-venv, or set TAWIN_PYTHON" >&2
        exit 2
    fi
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
stamp="$(cat requirements.txt pyproject.toml - <<<"${TAWIN_TORCH_INDEX:-}" | sha256sum | cut -d' ' -f1)"
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$stamp" ]; then
    echo "installing into $venv (a few minutes, once)" >&2
    # torch by itself first: whatever build the machine's index offers for this version satisfies all later pins
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        ${TAWIN_TORCH_INDEX:+--index-url "$TAWIN_TORCH_INDEX"} "$(grep '^torch==' requirements.txt)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e .
    echo "$stamp" > "$venv/installed"
fi
# shellcheck source=/dev/null
source "$venv/bin/activate"
